"""What cannot be had is refused in one sentence, before any work."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from akl_lightning.criterion import CriterionOutput, DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from akl_lightning.rollouts import OnPolicy, Sampling
from akl_lightning.rollouts.sampler import EngineError
from tests.conftest import QUIET, Bigram, gpt2, write
from tests.test_module import loader, samples


def refused(match: str, data: Any, on_policy: OnPolicy = OnPolicy(0.5, Sampling(4)), **settings: Any) -> None:  # noqa: B008
    kind = settings.pop("kind", DistillationModule)
    trainer = {name: settings.pop(name) for name in ("limit_train_batches",) if name in settings}
    module = kind(**{"student": gpt2(16), "teacher": gpt2(24), "on_policy": on_policy, **settings})
    with pytest.raises(UsageError, match=match) as raised:
        Trainer(**QUIET, max_epochs=1, limit_val_batches=0, **trainer).fit(module, data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_a_fraction(share: float) -> None:
    with pytest.raises(UsageError, match=r"on_policy\.share"):
        OnPolicy(share)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"refresh_every": 0}, "on_policy.refresh_every must be 1 or more, got 0"),
        ({"validation_samples": -1}, "on_policy.validation_samples must be 0 or more, got -1"),
        ({"responses_from": "me"}, "on_policy.responses_from must be one of student, teacher, mix, got 'me'"),
        ({"turns": "first"}, "on_policy.turns must be one of last, random, got 'first'"),
    ],
)
def test_settings_out_of_their_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        OnPolicy(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
    ],
)
def test_sampling_out_of_its_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Sampling(**settings)


def test_somebody_has_to_score_rollouts(data: InstructionDataModule, tmp_path: Path) -> None:
    refused("there is none: give model.teacher", data, teacher=None, criterion=DistillationCriterion(alpha=0))
    cached = write(gpt2(24), tmp_path / "cache", data)
    refused("cached teacher cannot score rollouts.*share to 0", loader(samples(2)), teacher=cached)
    unread = InstructionDataModule(data.tokenizer, data.source)
    refused("cached teacher cannot score rollouts.*share to 0", unread, teacher=cached)
    assert not unread.splits, "said before the data are tokenized"


def test_a_student_has_to_answer(data: InstructionDataModule) -> None:
    refused("Bigram has no generate method", loader(samples(2)), student=Bigram())
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    refused("encoder-decoder", loader(samples(2)), student=T5ForConditionalGeneration(config))


def test_a_response_has_to_end() -> None:
    model = gpt2(16)
    model.generation_config.eos_token_id = None
    refused("which token ends a response", loader(samples(2)), student=model)


def test_prompts_leave_room(data: InstructionDataModule) -> None:
    refused(
        r"longest train prompt, \d+ tokens, .* of on_policy.decoding.max_new_tokens = 60 .*beyond the 64 positions",
        data,
        OnPolicy(0.5, Sampling(60)),
    )
    refused(r"a prompt of \d+ tokens and an answer .* = 63", loader(samples(2)), OnPolicy(1.0, Sampling(63)))
    refused("beyond the 40 positions", data, OnPolicy(0.5, Sampling(30)), teacher=gpt2(24, positions=40))


def test_there_have_to_be_prompts(data: InstructionDataModule) -> None:
    data.setup("fit")
    train = data.splits["train"]
    data.splits["train"] = train.remove_columns(["prompt_length", "prompt_ids"]).map(
        lambda row: {"prompt_length": 0, "prompt_ids": []}
    )
    refused("no training sample has a prompt", data)


def test_steps_to_come_are_those_of_the_epoch(data: InstructionDataModule) -> None:
    refused("refresh_every = 8 is beyond the epoch, which has 7 optimizer steps", data, OnPolicy(1.0, Sampling(4), 8))
    refused(
        "refresh_every = 3 is beyond the epoch, which has 2",
        data,
        OnPolicy(1.0, Sampling(4), 3),
        limit_train_batches=2,
    )
    refused("only InstructionDataModule's loader", loader(samples(4)), OnPolicy(1.0, Sampling(4), 2))


def test_a_loss_of_ones_own_takes_the_weights(data: InstructionDataModule) -> None:
    class Own(DistillationModule):
        def compare(self, student: Any, teacher: Any, labels: Tensor) -> CriterionOutput:  # type: ignore[override]
            return self.criterion(student, teacher, labels)

    refused("Own.compare takes no alpha", data, kind=Own)


def test_a_teacher_that_answers_is_a_model(data: InstructionDataModule) -> None:
    by_teacher = OnPolicy(1.0, Sampling(4), responses_from="teacher")
    refused("responses_from teacher needs a teacher that is a model", data, by_teacher, teacher=Bigram())


def test_nan_while_sampling_is_said(data: InstructionDataModule) -> None:
    model = gpt2(16)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    module = DistillationModule(model, gpt2(24), on_policy=OnPolicy(1.0, Sampling(4)))
    with pytest.raises(EngineError, match="no rollouts at optimizer step 0, GenerateEngine says: the model gives NaN"):
        Trainer(**QUIET, max_epochs=1, limit_val_batches=0).fit(module, data)


def lines(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_data_without_a_prompt_to_answer(tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "text.jsonl", [{"text": "one two three four five"}])
    documents = InstructionDataModule(tokenizer, JsonLines(path), validation_size=0, test_size=0, max_length=32)
    refused("documents, which have no prompt to be answered", documents)
    pairs = lines(tmp_path / "pairs.jsonl", [{"instruction": f"a {number}", "output": "b"} for number in range(8)])
    whole = InstructionDataModule(tokenizer, JsonLines(pairs), learn="everything", max_length=32)
    refused("data.learn everything leaves no prompt to be answered", whole)


@pytest.mark.parametrize("samples", [4, 0])
def test_a_monitor_of_what_prompts_alone_never_have_is_said_before_the_training(
    tokenizer, tmp_path: Path, samples: int
) -> None:
    path = lines(tmp_path / "prompts.jsonl", [{"prompt": f"a {number}"} for number in range(8)])
    watching = [EarlyStopping("val/loss"), ModelCheckpoint(tmp_path, monitor="val/divergence")]
    fine = [ModelCheckpoint(tmp_path, monitor="val/rollout_rkl"), ModelCheckpoint(tmp_path, save_last=True)]
    settings = {**QUIET, "enable_checkpointing": True, "max_steps": 0, "callbacks": [*watching, *fine]}

    def said(path: str) -> list[str]:
        data = InstructionDataModule(tokenizer, JsonLines(path), batch_size=2, max_length=32, validation_size=2)
        on_policy = OnPolicy(1.0, Sampling(4), validation_samples=samples)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(**settings).fit(DistillationModule(gpt2(16), gpt2(24), on_policy=on_policy), data)
        return [str(warning.message) for warning in caught if " watches " in str(warning.message)]

    found = said(path)
    assert len(found) == 2 and found[0].startswith("EarlyStopping watches val/loss, which has no value")
    assert found[1].startswith("ModelCheckpoint watches val/divergence")
    assert all(("val/rollout_rkl." in text) == (samples > 0) for text in found)
    assert all("on_policy.validation_samples above 0" in text for text in found) == (samples == 0)
    answered = [{"instruction": f"a {number}", "output": "b"} for number in range(8)]
    assert said(lines(tmp_path / "pairs.jsonl", answered)) == []


def test_a_validation_before_the_fit(tokenizer, tmp_path: Path) -> None:
    """What it has copied of the student is written over in training."""
    pairs = lines(tmp_path / "pairs.jsonl", [{"instruction": f"a {number}", "output": "b"} for number in range(8)])
    data = InstructionDataModule(tokenizer, JsonLines(pairs), batch_size=2, max_length=32)
    module = DistillationModule(gpt2(16), gpt2(24), on_policy=OnPolicy(1.0, Sampling(4)))
    trainer = Trainer(**QUIET, max_steps=2, precision="bf16-mixed")
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    assert trainer.global_step == 2
    means = trainer.callback_metrics
    assert means["train/rkl"] > 0
    assert means["train/cross_entropy"].isnan(), "of what it says itself there is none"
