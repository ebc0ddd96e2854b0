"""A run that goes on with other settings: its rates are those of a run that has had them from the start."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import SGD, AdamW, lr_scheduler

from akl_lightning import optimization
from akl_lightning.errors import UsageError
from tests.conftest import QUIET
from tests.test_module import loader, module, parameters, samples, stack


class Rates(Callback):
    """With which rates the optimizer has stepped, and with what it began; leaves a checkpoint."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rates: list[float] = []
        self.group: dict[str, Any] = {}
        self.moments: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        if not self.rates:
            self.group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
            self.moments = [state["exp_avg"].clone() for state in optimizer.state.values() if "exp_avg" in state]
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.path is not None and trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)


def fit(folder: Path, steps: int, go_on: bool = False, name: str = "last", **settings: Any) -> tuple[Rates, Trainer]:
    """Train to this step in epochs of three, from the start or from the checkpoint, and leave one."""
    path = folder / f"{name}.ckpt"
    rates = Rates(path)
    trainer = Trainer(**QUIET, max_steps=steps, callbacks=[rates], limit_val_batches=0)
    trainer.fit(module(**settings), loader([stack(samples())] * 3), ckpt_path=path if go_on else None)
    return rates, trainer


def forget_settings(folder: Path) -> None:
    """Make the checkpoint one of an earlier version."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    del checkpoint["settings"]
    torch.save(checkpoint, folder / "last.ckpt")


def sequence(optimizer: torch.optim.Optimizer, gamma: float) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1), lr_scheduler.ExponentialLR(optimizer, gamma)]
    return lr_scheduler.SequentialLR(optimizer, parts, [1])


LR, LONGER = {"optimizer": partial(AdamW, lr=1e-3)}, {"optimizer": partial(AdamW, lr=1e-2)}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "constant, another rate": (LR, LONGER),
    "linear, more steps": ({**LR, "lr_scheduler": "linear"},) * 2,
    "linear, another rate": ({**LR, "lr_scheduler": "linear"}, {**LONGER, "lr_scheduler": "linear"}),
    "cosine, another warm-up": (
        {**LR, "lr_scheduler": "cosine", "warmup_steps": 2},
        {**LR, "lr_scheduler": "cosine", "warmup_steps": 6},
    ),
    "another name": ({**LR, "lr_scheduler": "linear"}, {**LR, "lr_scheduler": "cosine"}),
    "a name, then a class": (
        {**LR, "lr_scheduler": "linear"},
        {**LR, "lr_scheduler": partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)},
    ),
    **{
        name: ({**LR, "lr_scheduler": partial(kind, **then)}, {**LR, "lr_scheduler": partial(kind, **now)})
        for name, kind, then, now in (
            ("StepLR", lr_scheduler.StepLR, {"step_size": 1, "gamma": 0.1}, {"step_size": 1, "gamma": 0.5}),
            ("CosineAnnealingLR", lr_scheduler.CosineAnnealingLR, {"T_max": 2}, {"T_max": 5, "eta_min": 1e-5}),
            (
                "OneCycleLR",
                lr_scheduler.OneCycleLR,
                {"max_lr": 0.1, "total_steps": 2},
                {"max_lr": 0.2, "total_steps": 6},
            ),
            ("SequentialLR", sequence, {"gamma": 0.5}, {"gamma": 0.9}),
            ("LambdaLR", lr_scheduler.LambdaLR, {"lr_lambda": lambda e: 0.5**e}, {"lr_lambda": lambda e: 0.9**e}),
        )
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_asked_for_now_wins(change: str, tmp_path: Path) -> None:
    then, now = CHANGES[change]
    fit(tmp_path, 5, **then)
    whole, _ = fit(tmp_path, 12, name="whole", **now)
    resumed, _ = fit(tmp_path, 12, go_on=True, **now)
    assert resumed.rates == pytest.approx(whole.rates[5:], rel=1e-9)
    assert resumed.rates[0] > 0
    for key, value in whole.group.items():
        assert key in ("lr", "betas") or resumed.group[key] == value


@pytest.mark.parametrize("old", [False, True])
def test_by_hand(old: bool, tmp_path: Path) -> None:
    fit(tmp_path, 6, optimizer=partial(AdamW, lr=1e-3), lr_scheduler="linear")
    if old:
        forget_settings(tmp_path)
    resumed, _ = fit(tmp_path, 12, go_on=True, optimizer=partial(AdamW, lr=2e-3), lr_scheduler="linear")
    assert resumed.rates == pytest.approx([2e-3 * (1 - step / 12) for step in range(6, 12)], rel=1e-12)


@pytest.mark.parametrize("old", [False, True])
def test_settings_win_and_states_stay(old: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, first = fit(tmp_path, 3, optimizer=partial(AdamW, lr=1e-3, weight_decay=0.1, eps=1e-6))
    moments = [state["exp_avg"].clone() for state in first.optimizers[0].state.values()]
    if old:
        forget_settings(tmp_path)
    now = {"lr": 1e-5, "weight_decay": 0.0, "betas": [0.8, 0.95], "eps": 1e-6}
    resumed, trainer = fit(tmp_path, 5, go_on=True, optimizer=partial(AdamW, **now))
    assert {key: resumed.group[key] for key in now} == {**now, "betas": (0.8, 0.95)}
    assert resumed.rates == [1e-5] * 2
    assert len(moments) == len(resumed.moments) and all(map(torch.equal, moments, resumed.moments))
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {5.0}
    made = torch.load(tmp_path / "last.ckpt", weights_only=True)["settings"]["optimizers"][0]
    assert made["kind"] == "AdamW" and made["groups"][0]["initial_lr"] == 1e-5


def test_the_update_is_that_of_plain_torch(tmp_path: Path) -> None:
    """The moments of the first step, and the second step with another rate, worked out with torch alone."""
    fit(tmp_path, 1, optimizer=partial(AdamW, lr=1e-3, weight_decay=0.1))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    twin = module()
    twin.load_state_dict(checkpoint["state_dict"])
    twin.requires_grad_(True)
    batch = stack(samples())
    output = twin.distill(batch)
    (output.loss / output.statistics["loss"].numel()).backward()
    moved = []
    for name, parameter in twin.named_parameters():
        state, gradient = checkpoint["optimizer_states"][0]["state"][name], parameter.grad.double()
        first = 0.9 * state["exp_avg"].double() + 0.1 * gradient
        second = 0.999 * state["exp_avg_sq"].double() + 0.001 * gradient**2
        step = (first / (1 - 0.9**2)) / ((second / (1 - 0.999**2)).sqrt() + 1e-8)
        moved.append((parameter.detach().double() * (1 - 0.01 * 0.2) - 0.01 * step).flatten())
    _, trainer = fit(tmp_path, 2, go_on=True, optimizer=partial(AdamW, lr=1e-2, weight_decay=0.2))
    assert torch.allclose(parameters(trainer.lightning_module.student), torch.cat(moved), atol=2e-6)


@pytest.mark.parametrize("schedule", ["linear", partial(lr_scheduler.StepLR, step_size=1), "constant"])
@pytest.mark.parametrize("old", [False, True])
def test_unchanged_settings_go_on_bit_by_bit(
    schedule: Any, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**LR, "lr_scheduler": schedule}
    monkeypatch.setattr("akl_lightning.optimization._steps_of_run", lambda *_: 12)
    whole, trainer = fit(tmp_path, 12, name="whole", **settings)
    fit(tmp_path, 5, **settings)
    if old:
        forget_settings(tmp_path)
    resumed, other = fit(tmp_path, 12, go_on=True, **settings)
    assert resumed.rates == whole.rates[5:]
    assert torch.equal(parameters(trainer.lightning_module.student), parameters(other.lightning_module.student))


class Worse(Callback):
    """A monitored figure that gets worse with every epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.log("worse", float(trainer.current_epoch))


def plateau(rate: float, patience: int = 0, least: float = 0.0) -> dict[str, Any]:
    def schedule(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer, "worse", factor=0.1, patience=patience, min_lr=least)

    return {"optimizer": partial(AdamW, lr=rate), "lr_scheduler": schedule}


@pytest.mark.parametrize(
    ("now", "old", "rate"),
    [
        (plateau(1e-2), False, 1e-3),
        (plateau(1e-2), True, 1e-3),
        (plateau(1e-2, patience=5), False, 1e-3),
        (plateau(1e-3), False, 1e-4),
        (plateau(1e-3, least=5e-4), False, 5e-4),
        (plateau(1e-3), True, 1e-3),  # it does not say from what the rate was lowered
    ],
)
def test_a_rate_that_was_lowered_stays_lowered(now: dict[str, Any], old: bool, rate: float, tmp_path: Path) -> None:
    def run(epochs: int, settings: dict[str, Any], ckpt_path: Path | None = None) -> Rates:
        rates = Rates()
        trainer = Trainer(**QUIET, max_epochs=epochs, callbacks=[rates, Worse()], limit_val_batches=0)
        trainer.fit(module(**settings), loader([stack(samples())] * 2), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return rates

    assert run(2, plateau(1e-2)).rates == [1e-2] * 4
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"] < 1e-2
    if old:
        forget_settings(tmp_path)
    assert run(3, now, tmp_path / "last.ckpt").rates == pytest.approx([rate] * 2)
    schedule = torch.load(tmp_path / "last.ckpt", weights_only=True)["lr_schedulers"][0]
    assert schedule["patience"] == now["lr_scheduler"](AdamW([torch.zeros(1)])).patience


def test_another_optimizer_begins_with_moments_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(optimization, "rank_zero_info", said.append)
    fit(tmp_path, 3, **LR)
    resumed, trainer = fit(tmp_path, 5, go_on=True, optimizer=partial(SGD, lr=0.5, momentum=0.9))
    assert resumed.rates == [0.5, 0.5] and "betas" not in resumed.group
    assert all(state.keys() == {"momentum_buffer"} for state in trainer.optimizers[0].state.values())
    assert "the optimizer is SGD, whose moments begin anew" in said[0]


def test_a_rate_that_was_found_stays_until_another_is_given(tmp_path: Path) -> None:
    def run(steps: int, found: float | None, given: float, go_on: bool = True) -> list[float]:
        rates = Rates()
        trainer = Trainer(**QUIET, max_steps=steps, callbacks=[rates], limit_val_batches=0)
        module_ = module(optimizer=partial(AdamW, lr=given))
        module_.lr = found
        ckpt_path = tmp_path / "last.ckpt" if go_on else None
        trainer.fit(module_, loader([stack(samples())] * 3), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return rates.rates

    assert run(2, 0.02, 1e-3, go_on=False) == [0.02] * 2
    assert run(4, None, 1e-3) == [0.02] * 2
    assert run(6, None, 1e-4) == [1e-4] * 2


def test_what_cannot_go_on_is_one_sentence(tmp_path: Path) -> None:
    fit(tmp_path, 7, **LR)
    short = {**LR, "lr_scheduler": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=1)}
    with pytest.raises(UsageError, match=r"the schedule OneCycleLR cannot go on at step 2 of the checkpoint \(Tried"):
        fit(tmp_path, 12, go_on=True, **short)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match="the checkpoint holds weights alone, from which no run can go on"):
        fit(tmp_path, 12, go_on=True, **LR)
