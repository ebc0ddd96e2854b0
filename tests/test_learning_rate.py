"""The rate of an optimizer that is given none: by what is trained, said, saved, and kept by a run that goes on."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim import SGD, Adam, AdamW

from akl_lightning import optimization, resume
from akl_lightning.learning_rate import ADAPTER, NEW, TRAINED, chosen_rate, class_without_rate
from akl_lightning.models.lora import LoraSettings
from akl_lightning.module import DistillationModule
from tests.conftest import Bigram, gpt2
from tests.test_command_line import RUN, akl, folder  # noqa: F401
from tests.test_optimization import fit, forget_settings

CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 300, "bos_token_id": 0,
          "eos_token_id": 0}  # fmt: skip
NONE = {"optimizer": AdamW}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for where in (optimization, resume):
        monkeypatch.setattr(where, "rank_zero_info", lines.append)
    return lines


def test_it_depends_on_what_is_trained(tmp_path: Path) -> None:
    gpt2(16, layers=2).save_pretrained(tmp_path)

    def chosen(student: Any, **settings: Any) -> Any:
        return chosen_rate(DistillationModule(student, gpt2(24), **settings))

    lora = LoraSettings(target_modules=["c_attn"])
    assert chosen(CONFIG) == NEW
    assert chosen(str(tmp_path)) == chosen({"layers_of": str(tmp_path), "keep": [1]}) == TRAINED
    assert chosen(type(gpt2()).from_pretrained(tmp_path)) == TRAINED
    assert chosen(CONFIG, lora=lora) == chosen(str(tmp_path), lora=lora) == ADAPTER
    # They do not say whether their weights are new.
    assert chosen(gpt2(16)) is None and chosen(Bigram()) is None
    assert chosen(CONFIG, optimizer=Adam) == chosen(CONFIG, optimizer=partial(AdamW, eps=1e-6)) == NEW
    for given in (partial(AdamW, lr=1e-3), SGD, lambda parameters: AdamW(parameters)):
        assert chosen(CONFIG, optimizer=given) is None


def test_a_new_run_has_it_and_says_so(tmp_path: Path, said: list[str]) -> None:
    run, _ = fit(tmp_path, 2, **NONE, student=CONFIG)
    assert run.rates == [NEW.rate] * 2
    assert said == ["learning rate 0.002, for new weights: model.optimizer.lr sets another."]
    run, _ = fit(tmp_path, 4, **NONE, student=CONFIG, lr_scheduler="linear")
    assert run.rates == pytest.approx([NEW.rate * (1 - step / 4) for step in range(4)])
    run, _ = fit(tmp_path, 1, **NONE)
    assert run.rates == [1e-3] and said[2] == "learning rate 0.001, AdamW's own: model.optimizer.lr sets another."
    said.clear()
    run, _ = fit(tmp_path, 1, student=CONFIG, optimizer=partial(AdamW, lr=1e-3))
    assert run.rates == [1e-3] and not said


@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_goes_on_keeps_the_checkpoints(old: bool, tmp_path: Path, said: list[str]) -> None:
    """Whether it was given there, or another version has chosen it; through any number of checkpoints."""
    fit(tmp_path, 2, student=CONFIG, optimizer=partial(AdamW, lr=3e-4), lr_scheduler="linear")
    if old:
        forget_settings(tmp_path)
    for steps in (4, 6):
        run, _ = fit(tmp_path, steps, True, **NONE, student=CONFIG, lr_scheduler="linear")
        assert run.rates == pytest.approx([3e-4 * (1 - step / steps) for step in (steps - 2, steps - 1)])
    assert said.count("the learning rate stays 0.0003, the checkpoint's, as no other is given.") == 2
    assert not any(line.startswith("learning rate") for line in said)
    # One that is given wins, also where it is what torch has for its default.
    run, _ = fit(tmp_path, 8, True, student=CONFIG, optimizer=partial(AdamW, lr=1e-3))
    assert run.rates == pytest.approx([1e-3] * 2)


def test_another_kind_of_optimizer_has_its_own(tmp_path: Path) -> None:
    fit(tmp_path, 2, student=CONFIG, optimizer=partial(SGD, lr=0.5))
    run, _ = fit(tmp_path, 4, True, **NONE, student=CONFIG)
    assert run.rates == [NEW.rate] * 2


def test_unchanged_it_goes_on_bit_by_bit(tmp_path: Path, said: list[str]) -> None:
    _, whole = fit(tmp_path, 4, **NONE, name="whole", student=CONFIG)
    fit(tmp_path, 2, **NONE, student=CONFIG)
    _, resumed = fit(tmp_path, 4, True, **NONE, student=CONFIG)
    ends = [trainer.lightning_module.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert len(set(said)) == 1


def test_a_class_may_stand_anywhere() -> None:
    assert class_without_rate(AdamW) is AdamW
    assert class_without_rate(partial(partial(SGD, momentum=0.9), nesterov=True)) is SGD
    assert class_without_rate(partial(lambda kind, p: kind(p), AdamW)) is AdamW  # as jsonargparse has it


def rates_in(path: Path) -> tuple[Any, set[float]]:
    """The rate in the config.yaml of a run, and those in its checkpoint."""
    (saved,) = path.rglob("config.yaml")
    (checkpoint,) = path.rglob("*.ckpt")
    groups = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    return yaml.safe_load(saved.read_text())["model"]["optimizer"]["init_args"].get("lr"), {g["lr"] for g in groups}


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ([], TRAINED.rate),
        (["--model.optimizer", "AdamW"], TRAINED.rate),
        (["--model.optimizer.weight_decay", "0.1"], TRAINED.rate),
        (["--model.optimizer.lr", "1e-3"], 1e-3),
        (["--model.optimizer", '{"class_path": "AdamW", "init_args": {"lr": 0.001}}'], 1e-3),
        (["--model.optimizer", "SGD"], 1e-3),
    ],
)
def test_on_the_command_line(
    given: list[str],
    rate: float,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is given wins, also where it is what torch has for its default; a printed configuration is the run."""
    assert akl(monkeypatch, "fit", *RUN, *given, "--print_config") == 0
    (folder / "c.yaml").write_text(capsys.readouterr().out)
    assert akl(monkeypatch, "fit", "--config", "c.yaml", "--trainer.default_root_dir", "run") == 0
    saved, made = rates_in(folder / "run")
    assert made == {rate} and (saved == rate or (saved is None and "SGD" in given))


def test_a_command_that_goes_on_without_a_rate_keeps_it(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert akl(monkeypatch, "fit", *RUN, "--trainer.default_root_dir", "one", "--model.optimizer.lr", "1e-4") == 0
    (checkpoint,) = (folder / "one").rglob("*.ckpt")
    go_on = ["--ckpt_path", str(checkpoint), "--trainer.max_steps", "3", "--trainer.default_root_dir", "two"]
    assert akl(monkeypatch, "fit", *RUN, *go_on) == 0
    assert rates_in(folder / "two") == (None, {1e-4})
