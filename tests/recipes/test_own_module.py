"""A user's own module: what its loss, its optimizer and its learning rates do."""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from akl_lightning.data.module import InstructionDataModule
from recipes.own_module import HiddenStateDistillation
from tests.commands.start import python
from tests.conftest import QUIET, gpt2, write
from tests.test_module import loader, parameters, samples, stack

RECIPE = Path(__file__).parents[2] / "recipes/own_module.py"


def module(**settings: Any) -> HiddenStateDistillation:
    torch.manual_seed(1)
    return HiddenStateDistillation(
        gpt2(16, layers=3), settings.pop("teacher", None) or gpt2(24, layers=2), teacher_width=24, **settings
    )


def test_the_extra_loss_is_the_distance_of_hidden_states_per_token() -> None:
    module_, plain = module(hidden_weight=2.0), module(hidden_weight=0.0)
    batch = stack(samples())
    output, without = module_.distill(batch), plain.distill(batch)
    student, teacher = (
        model.transformer(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        for model in (module_.student.model, module_.teacher.model.model)
    )
    positions, _ = module_.criterion.response_positions(batch["labels"])
    student, teacher = (hidden.flatten(0, 1)[positions] for hidden in (student, teacher))
    distance = (module_.regressor(student) - teacher).square().mean(-1).sum()
    assert output.loss.item() == pytest.approx((without.loss + 2 * distance).item(), rel=1e-5)
    output.loss.backward()
    assert module_.regressor.weight.grad.abs().max() > 0


def test_a_split_step_is_the_whole_one() -> None:
    rows, ends = samples(), []
    for batches in ([stack(rows)], [stack(rows[:3]), stack(rows[3:])]):
        module_ = module()
        Trainer(**QUIET, max_epochs=2, accumulate_grad_batches=len(batches)).fit(module_, loader(batches))
        ends.append(parameters(module_))
    start = parameters(module())
    assert (ends[0] - ends[1]).norm() < 1e-4 * (ends[0] - start).norm()


def test_layers_have_learning_rates_of_their_own() -> None:
    module_ = module(learning_rate=0.1, layer_decay=0.5)
    optimizer = module_.configure_optimizers()
    assert isinstance(optimizer, torch.optim.RAdam)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates.keys() == set(module_.parameters())
    layers = [rates[next(layer.parameters())] for layer in module_.student.model.transformer.h]
    assert layers == pytest.approx([0.025, 0.05, 0.1])
    assert rates[module_.regressor.weight] == rates[module_.student.model.transformer.wte.weight] == 0.1


def test_hidden_states_come_closer_from_a_live_teacher_and_from_a_cache(
    data: InstructionDataModule, tmp_path: Path
) -> None:
    teacher = gpt2(24, layers=2)
    cached = write(copy.deepcopy(teacher), tmp_path / "cache", data)
    for source in (teacher, cached):
        distances = []
        for epochs in (1, 8):
            trainer = Trainer(**QUIET, max_epochs=epochs)
            trainer.fit(module(teacher=source, learning_rate=1e-2), data)
            distances.append(trainer.callback_metrics["train/hidden_distance"].item())
        assert distances[1] < 0.8 * distances[0]


def test_a_resumed_run_ends_like_one_that_never_stopped(data: InstructionDataModule, tmp_path: Path) -> None:
    whole, resumed = module(), module()
    Trainer(**QUIET, max_epochs=2).fit(whole, data)
    stopped = Trainer(**QUIET, max_epochs=1)
    stopped.fit(module(), data)
    stopped.save_checkpoint(tmp_path / "one.ckpt")
    Trainer(**QUIET, max_epochs=2).fit(resumed, data, ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(parameters(resumed), parameters(whole))


def test_the_recipe_runs(tokenizer, corpus: str, tmp_path: Path) -> None:
    gpt2(24, positions=256, layers=3).save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    command = [python(), str(RECIPE), "--teacher", "large", "--pairs", corpus, "--batch_size", "8"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'train/hidden_distance': " in result.stdout
