"""The student answers on two processes as on one: real processes on gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerFast

from akl_lightning.callbacks import LastCheckpoint
from akl_lightning.errors import UsageError
from akl_lightning.models.lora import LoraSettings
from akl_lightning.rollouts import GenerateEngine, OnPolicy, Sampling
from akl_lightning.rollouts.batches import samples_of
from akl_lightning.rollouts.weights import WholeModel
from tests.conftest import QUIET
from tests.distributed.training import apart, data_of, launch, module_of, prepare, whole_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    prepare(folder, tokenizer)
    return folder


class Seen(Callback):
    """Keeps each rollout by optimizer step and sample."""

    def __init__(self) -> None:
        self.responses: dict[tuple[int, int], list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if "rollouts" in batch:
            for row, sample in enumerate(samples_of(batch, -100)):
                if batch["rollouts"].samples[row]:
                    key = (trainer.global_step, int(sample.number or 0))
                    self.responses[key] = sample.tokens[sample.starts[0] :]


class Break(Callback):
    """The end of both ranks after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            raise KeyError("killed")


class Failing(GenerateEngine):
    """Fails on the second rank, at the third step."""

    calls = 0

    def generate(self, prompts: Any, decoding: Any, seeds: Any) -> list[list[int]]:
        self.calls += 1
        if self.calls == 3 and torch.distributed.get_rank() == 1:
            raise RuntimeError("no room")
        return super().generate(prompts, decoding, seeds)


def fail_to_gather(after: int) -> None:
    """Let the second rank have no memory for its copy of the student, at the third step, with so many weights in it."""
    whole, calls = WholeModel._filled, []

    def filled(self: WholeModel, weights: Any, *arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 3 and torch.distributed.get_rank() == 1:
            for _ in range(after):
                next(weights)
            raise torch.OutOfMemoryError("no room")
        return whole(self, weights, *arguments)

    WholeModel._filled = filled  # type: ignore[method-assign]  # in a process of its own


def fit(folder: Path, out: Path, ckpt_path: Path | None = None, last: bool = False, **settings: Any) -> None:
    torch.manual_seed(0)
    failing = settings.pop("failing", None)
    engine = Failing() if failing == "engine" else None
    if isinstance(failing, int):
        fail_to_gather(failing)
    on_policy = OnPolicy(
        0.7, Sampling(6), settings.pop("refresh_every", 1), engine=engine, validation_samples=4, seed=2
    )
    lora = LoraSettings(rank=2, target_modules=["c_attn"]) if settings.pop("lora", False) else None
    seen = Seen()
    callbacks: list[Callback] = [seen, *([LastCheckpoint(out, every_n_steps=1)] if last else [])]
    callbacks += [Break(after)] if (after := settings.pop("breaks", 0)) else []
    quiet = {**QUIET, "enable_checkpointing": last}
    trainer = Trainer(**{**quiet, "max_epochs": 1, **settings, "callbacks": callbacks})
    split = trainer.world_size * trainer.accumulate_grad_batches
    module = module_of(folder, "sgd", on_policy=on_policy, lora=lora)
    said = ""
    try:
        trainer.fit(module, data_of(folder, batch_size=8 // split), ckpt_path=ckpt_path)
    except (UsageError, KeyError) as error:
        said = str(error)
    weights = whole_state(trainer) if not said else {}
    rkl = float(trainer.callback_metrics.get("val/rollout_rkl", 0.0))
    torch.save((seen.responses, weights, said, rkl), out / f"rank{trainer.global_rank}.pt")


def fit_on_rank(rank: int, folder: Path, *runs: tuple[Path, dict[str, Any]]) -> None:
    for out, settings in runs:
        out.mkdir(exist_ok=True)
        fit(folder, out, **{"devices": 2, **settings})


def found(out: Path) -> tuple[dict[Any, Any], dict[str, torch.Tensor], str, float]:
    parts = [torch.load(path) for path in sorted(out.glob("rank*.pt"))]
    return {key: value for part in parts for key, value in part[0].items()}, *parts[0][1:]


@pytest.mark.parametrize(("strategy", "accumulated"), [("ddp", 1), ("fsdp2", 2)])
def test_two_ranks_sample_what_one_does(folder: Path, tmp_path: Path, strategy: str, accumulated: int) -> None:
    settings = {"strategy": strategy, "accumulate_grad_batches": accumulated}
    students = {"whole": False, "lora": True}
    launch(fit_on_rank, folder, *((tmp_path / name, {**settings, "lora": lora}) for name, lora in students.items()))
    for name, lora in students.items():
        out = tmp_path / f"{name} on one"
        out.mkdir()
        fit(folder, out, lora=lora)
        (one, weights, _, rkl), (two, same, _, same_rkl) = found(out), found(tmp_path / name)
        assert one == two and len(one) > 10
        assert apart(weights, same) < 1e-5
        assert rkl == pytest.approx(same_rkl, rel=0.05)  # on samples that each rank takes out of its own


@pytest.mark.parametrize(("strategy", "failing"), [("ddp", "engine"), ("fsdp2", "engine"), ("fsdp2", 0), ("fsdp2", 3)])
def test_what_fails_on_one_rank_ends_both_and_nothing_is_lost(
    folder: Path, tmp_path: Path, strategy: str, failing: str | int
) -> None:
    outs = [tmp_path / name for name in ("whole", "failed", "resumed")]
    settings = {"strategy": strategy, "limit_val_batches": 0}
    launch(fit_on_rank, folder, (outs[0], settings), (outs[1], {**settings, "failing": failing, "last": True}))
    for rank in range(2):
        said = torch.load(outs[1] / f"rank{rank}.pt")[2]
        assert said.startswith("no rollouts at optimizer step 2, ") and "says: no room; mend that" in said
    launch(fit_on_rank, folder, (outs[2], {**settings, "ckpt_path": outs[1] / "last.ckpt"}))
    assert apart(found(outs[0])[1], found(outs[2])[1]) == 0


def test_rollouts_that_wait_go_on_on_both_ranks(folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("whole", "stopped", "resumed", "again")]
    settings = {"strategy": "ddp", "refresh_every": 3, "limit_val_batches": 0}
    launch(fit_on_rank, folder, (outs[0], settings), (outs[1], {**settings, "breaks": 2, "last": True}))
    settings["ckpt_path"] = outs[1] / "last.ckpt"
    launch(fit_on_rank, folder, (outs[2], settings), (outs[3], {**settings, "breaks": 3, "last": True}))
    saved = torch.load(outs[1] / "last.ckpt", weights_only=True)["rollouts"]
    keys = [tuple(entry[:2]) for entry in saved["waiting"]]
    assert (
        keys and len(set(keys)) == len(keys) and {step for step, _ in keys} == {2}
    )  # steps 0 to 2 were sampled at once
    assert len(saved["watch"]["lengths"]) == len(found(outs[1])[0])  # of both ranks
    # A run that has gone on keeps no more.
    later = torch.load(outs[3] / "last.ckpt", weights_only=True)["rollouts"]
    assert later["waiting"] == [] and later["watch"] == saved["watch"]
    whole, resumed = found(outs[0]), found(outs[2])
    assert resumed[0] == {key: value for key, value in whole[0].items() if key[0] >= 2}
    assert apart(whole[1], resumed[1]) == 0
