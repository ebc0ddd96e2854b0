import copy
import json
import re
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from akl_lightning.callbacks import StudentExport
from akl_lightning.cli import run_command
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.divergences import AdaptiveKL
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2
from tests.test_module import Bigram, loader, samples, stack


def fit(
    data: InstructionDataModule,
    export: StudentExport,
    tmp_path: Path,
    epochs: int = 2,
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[DistillationModule, ModelCheckpoint]:
    """Train away from the teacher, so that the best student is the first one."""
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/divergence", save_last=True)
    # A step up the gradient.
    optimizer = partial(torch.optim.SGD, lr=0.5, maximize=True)
    module = DistillationModule(gpt2(16), gpt2(24), optimizer=optimizer, **settings)
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=epochs, callbacks=[export, best])
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, best


def test_last_and_best_student_load_and_answer_alike(data: InstructionDataModule, tmp_path: Path) -> None:
    export = StudentExport(str(tmp_path / "student"))
    criterion = DistillationCriterion(AdaptiveKL(mu=0.4), alpha=0.8)
    module, best = fit(data, export, tmp_path, criterion=criterion)
    assert (export.exported, export.exported_best) == (tmp_path / "student", tmp_path / "student-best")
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert all(files <= {file.name for file in path.iterdir()} for path in (export.exported, export.exported_best))

    batch = AutoTokenizer.from_pretrained(export.exported)("Say one", return_tensors="pt")
    last, first = (AutoModelForCausalLM.from_pretrained(path) for path in (export.exported, export.exported_best))
    assert torch.equal(last(**batch).logits, module.student.model.eval()(**batch).logits)
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    assert checkpoint["epoch"] == 0
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, checkpoint["state_dict"][f"student.model.{name}"])
    assert not torch.equal(last(**batch).logits, first(**batch).logits)
    generation = GenerationConfig.from_pretrained(export.exported)
    assert generation.eos_token_id == generation.pad_token_id == data.tokenizer.eos_token_id


def test_the_model_card_says_where_the_student_comes_from(data: InstructionDataModule, tmp_path: Path) -> None:
    export = StudentExport(str(tmp_path / "student"))
    criterion = DistillationCriterion(AdaptiveKL(mu=0.4), alpha=0.8)
    _, best = fit(data, export, tmp_path, criterion=criterion)
    last, first = (
        ModelCard.load(path / "README.md", ignore_metadata_errors=False)
        for path in (export.exported, export.exported_best)
    )
    assert last.data.library_name == "transformers" and last.data.pipeline_tag == "text-generation"
    teacher, student = (sum(p.numel() for p in model.parameters()) for model in (gpt2(24), gpt2(16)))
    assert f"**Teacher:** GPT2LMHeadModel, {teacher:,} parameters" in last.text
    assert f"{student:,} parameters, compression ratio {teacher / student:.2f}" in last.text
    assert "**Divergence:** AdaptiveKL(mu=0.4, head_rule='cover'), alpha=0.8" in last.text
    assert "**Data:** pairs.jsonl" in last.text
    assert "## License" in last.text and "the terms of both apply" in last.text.replace("\n", " ")
    assert "the last of 2 epochs, after 14 optimizer steps" in last.text
    assert "the best of 2 epochs, epoch=0-step=7.ckpt, after 7 optimizer steps" in first.text
    measured = dict(re.findall(r"^\| (.+) \| (\d.*) \|$", first.text, re.M))
    assert float(measured["divergence"]) == pytest.approx(best.best_model_score.item(), abs=1e-4)
    later = dict(re.findall(r"^\| (.+) \| (\d.*) \|$", last.text, re.M))
    assert float(later["divergence"]) > float(measured["divergence"])


def test_the_default_divergence_is_called_by_its_name(data: InstructionDataModule, tmp_path: Path) -> None:
    export = StudentExport(str(tmp_path / "student"))
    fit(data, export, tmp_path, epochs=1)
    assert "**Divergence:** AdaptiveKL(mu=0.5, head_rule='cover')" in (export.exported / "README.md").read_text()


def test_a_resumed_run_tells_of_the_best_before_and_leaves_the_first_export_alone(
    data: InstructionDataModule, tmp_path: Path
) -> None:
    fit(data, StudentExport(str(tmp_path / "student")), tmp_path, epochs=1)
    before = (tmp_path / "student/README.md").read_text()
    export = StudentExport(str(tmp_path / "student"))
    fit(data, export, tmp_path, ckpt_path=str(tmp_path / "checkpoints/last.ckpt"))
    assert (tmp_path / "student/README.md").read_text() == before
    assert (export.exported, export.exported_best) == (tmp_path / "student-v1", tmp_path / "student-best-v1")
    assert "the best of 2 epochs" in (export.exported_best / "README.md").read_text()
    assert "| divergence | " in (export.exported_best / "README.md").read_text()


def test_an_empty_folder_is_taken_and_a_full_one_refused_before_training(
    data: InstructionDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student").mkdir()
    fit(data, StudentExport(str(tmp_path / "student")), tmp_path, epochs=1)
    before = {path: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    assert len(before) >= 5
    with pytest.raises(SystemExit) as end:
        run_command(lambda: fit(data, StudentExport(str(tmp_path / "student")), tmp_path / "other", epochs=1))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("student is not empty and is never overwritten: give StudentExport another dirpath.")
    assert {path: path.read_bytes() for path in (tmp_path / "student").iterdir()} == before
    assert not (tmp_path / "other/checkpoints").exists() and not list(tmp_path.glob("student-v*"))


def test_the_tokenizer_has_the_template_that_was_given(data: InstructionDataModule, tmp_path: Path) -> None:
    exports = [StudentExport(str(tmp_path / name)) for name in ("none", "own")]
    fit(data, exports[0], tmp_path, epochs=1)
    own = InstructionDataModule(data.tokenizer, data.source, "Q: {instruction}\nA:", 4, 40, test_size=4)
    fit(own, exports[1], tmp_path, epochs=1)
    without, tokenizer = (AutoTokenizer.from_pretrained(export.exported) for export in exports)
    assert without.chat_template is None and data.tokenizer.chat_template is None
    row = own.splits["train"][0]
    asked = json.loads(row["messages"])[:1]
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == row["prompt_ids"]


THINKING = (
    "{% macro say(who) %}{{ '<' ~ who ~ (' quietly' if thinking is defined and not thinking) ~ '>' }}{% endmacro %}"
    "{% for message in messages %}{{ say(message.role) ~ message.content ~ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ say('assistant') ~ (level|default('')) }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["own", "several", "given"])
def test_the_tokenizer_has_the_templates_arguments(kind: str, tokenizer: Any, corpus: str, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    if kind == "own":
        tokenizer.chat_template = THINKING
    if kind == "several":
        tokenizer.chat_template = {"default": THINKING, "tool_use": THINKING + "{{ tools }}"}
    arguments = {"thinking": False, "level": "é, 'a' \"b\" \\ %} {{ 😀"}
    template = THINKING if kind == "given" else None
    data = InstructionDataModule(
        tokenizer, JsonLines(corpus), template, 4, 64, test_size=4, template_arguments=arguments
    )
    export = StudentExport(str(tmp_path / "student"))
    fit(data, export, tmp_path, epochs=1)
    exported = AutoTokenizer.from_pretrained(export.exported)
    messages = [{"role": "user", "content": "Why?"}]

    def written(by: Any, **given: Any) -> list[str]:
        more = [{}, {"add_generation_prompt": True}] + [{"tools": []}] * (kind == "several")
        return [by.apply_chat_template(messages, tokenize=False, **given, **one) for one in more]

    by = {} if kind != "given" else {"chat_template": THINKING}
    assert written(exported) == written(tokenizer, **arguments, **by)
    assert "quietly" in written(exported)[0] and arguments["level"] in written(exported)[1]
    assert "quietly" not in written(exported, thinking=True)[0], "a default, no more"
    assert "level=" in (card := (export.exported / "README.md").read_text()) and "with thinking=False, " in card
    assert "to apply_chat_template" not in card
    again = InstructionDataModule(exported, JsonLines(corpus), max_length=64, template_arguments={"thinking": True})
    assert "quietly" not in again.chat.rendering.text(messages)


def test_a_tokenizer_that_is_given_does_not_have_them(tokenizer: Any, corpus: str, tmp_path: Path) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = THINKING
    data = InstructionDataModule(own, JsonLines(corpus), max_length=60, template_arguments={"level": "x"})
    export = StudentExport(str(tmp_path / "student"), tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="does not have the template's level that it has learnt with") as warned:
        fit(data, export, tmp_path, epochs=1)
    assert len([one for one in warned if "level" in str(one.message)]) == 1 and export.exported_best
    assert "with level='x'; give level to apply_chat_template" in (export.exported / "README.md").read_text()
    for value in (date(2024, 7, 26), float("nan")):
        with pytest.raises(
            UsageError, match=r"data\.template_arguments has level = .*cannot be written into a template"
        ):
            InstructionDataModule(own, JsonLines(corpus), template_arguments={"level": value})


def test_without_a_folder_the_next_free_name_is_taken(
    data: InstructionDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student/mine").write_text("precious")
    export = StudentExport()
    Trainer(**QUIET, max_epochs=1, callbacks=[export]).fit(DistillationModule(gpt2(16), gpt2(24)), data)
    assert export.exported == tmp_path / "student-v1" and export.exported_best is None
    assert (tmp_path / "student/mine").read_text() == "precious"


def test_misuse_is_reported_before_training(
    data: InstructionDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="StudentExport cannot write a Bigram, only transformers models"):
        Trainer(**QUIET, callbacks=[StudentExport()]).fit(DistillationModule(Bigram(), gpt2(24)), data)
    (tmp_path / "file").write_text("mine")
    for folder, reason in ((tmp_path / "file", "File exists"), (Path("/proc/akl"), "No such file or directory")):
        with pytest.raises(SystemExit) as end:
            run_command(lambda folder=folder: fit(data, StudentExport(str(folder / "student")), tmp_path))
        assert end.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error == f"error: cannot write to {folder}: {reason}; choose another folder."
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "checkpoints").exists()


def test_without_a_tokenizer_it_says_so_and_one_can_be_given(
    data: InstructionDataModule, tokenizer_folder: str, tmp_path: Path
) -> None:
    """A model given as a module and a DataLoader of one's own: nothing says which tokenizer they have."""

    def run(export: StudentExport, student: int = 300) -> None:
        module = DistillationModule(gpt2(16, student), gpt2(24, student))
        Trainer(**QUIET, max_steps=1, callbacks=[export]).fit(module, loader([stack(samples())]))

    with pytest.warns(UserWarning, match=r"finds no tokenizer.*Give StudentExport\(tokenizer=...\)"):
        run(StudentExport(str(tmp_path / "without")))
    assert not (tmp_path / "without/tokenizer.json").exists()
    for name, given in (("folder", tokenizer_folder), ("object", data.tokenizer)):
        run(StudentExport(str(tmp_path / name), tokenizer=given))
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() == data.tokenizer.get_vocab()
    with pytest.raises(UsageError, match="the student has no output for the token"):
        run(StudentExport(str(tmp_path / "small"), tokenizer=tokenizer_folder), student=299)
    with pytest.raises(UsageError, match="cannot load the tokenizer"):
        StudentExport(tokenizer=str(tmp_path / "nowhere"))
