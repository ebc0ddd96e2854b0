"""Pictures, answers and settings of a student and a teacher that several processes share."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerFast

from akl_lightning.cli import main
from tests.conftest import QUIET
from tests.distributed.training import apart, data_of, launch, module_of, prepare, run, whole_state


def work(rank: int, settings: dict[str, Any]) -> None:
    run(**settings)


# The only validation sample goes to the first process, the second one has an empty row.
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_pictures_and_answers_on_two_processes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, strategy: str
) -> None:
    prepare(tmp_path, tokenizer)
    launch(
        work,
        {
            "folder": str(tmp_path),
            "output": str(tmp_path / "out"),
            "module": {"max_new_tokens": 4, "optimizer": "sgd"},
            "data": {"batch_size": 4, "validation_size": 1},
            "trainer": {"max_epochs": 1, "strategy": strategy, "devices": 2, "accumulate_grad_batches": 2},
            "pictures": True,
        },
    )
    events = EventAccumulator(str(tmp_path / "out/logs")).Reload()
    assert {name: len(events.Images(name)) for name in events.Tags()["images"]} == {
        "head_tail_error": 1, "head_weight_map": 1, "distributions": 1,
    }  # fmt: skip
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("answers/text_summary")]
    assert [text.count("**answer**") for text in texts] == [1]
    assert (tmp_path / "out/student/model.safetensors").is_file()

    alone = Trainer(**QUIET, max_epochs=1)
    alone.fit(module_of(tmp_path, "sgd"), data_of(tmp_path, validation_size=1))
    assert apart(torch.load(tmp_path / "out/student.pt"), whole_state(alone)) <= 1e-5


def fit_from_the_command_line(rank: int, folder: Path) -> None:
    os.chdir(folder)
    models = ["--model.student", "student", "--model.teacher", "teacher"]
    source = ["--data.source", "JsonLines", "--data.source.path", "pairs.jsonl", "--data.max_length", "40"]
    trainer = ["accelerator=cpu", "devices=2", "strategy=ddp", "logger=false", "max_steps=1"]
    sys.argv = ["akl", "fit", *models, *source, *(f"--trainer.{setting}" for setting in trainer)]
    main()


def test_two_processes_write_their_settings_once_beside_those_of_the_run_before(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prepare(tmp_path, tokenizer)
    (tmp_path / "config.yaml").write_text("of the run before")
    launch(fit_from_the_command_line, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "of the run before"
    (written,) = tmp_path.glob("config-*.yaml")
    assert written.name == "config-v1.yaml" and yaml.safe_load(written.read_text())["trainer"]["devices"] == "2"
