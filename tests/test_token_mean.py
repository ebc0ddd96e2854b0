"""A loss that is no number is noticed, and who gave it is named."""

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.divergences import ForwardKL
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET
from tests.test_module import loader, module, parameters, samples, stack


def fit(module_: DistillationModule, steps: int = 2, **settings: Any) -> None:
    Trainer(**QUIET, max_epochs=1, **settings).fit(module_, loader([stack(samples())] * steps))


class Scaled(DistillationModule):
    """A teacher whose logits of every second token are a number."""

    number = -torch.inf

    def compare(self, student: Any, teacher: Any, labels: Any) -> Any:
        teacher = teacher.logits().clone()
        teacher[:, ::2] = self.number
        return super().compare(student, teacher, labels)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_an_optimizer_whose_eps_is_nothing_in_float16_is_named(kind: Any) -> None:
    with pytest.raises(UsageError) as error:
        fit(module(optimizer=partial(kind, lr=0.0)), 3, precision="16-true")
    assert f"the eps of {kind.__name__}, {inspect.signature(kind).parameters['eps'].default:g}" in str(error.value)
    assert "is 0 in float16" in str(error.value) and "optimizer step 1, epoch 0, batch 1;" in str(error.value)
    fit(module(optimizer=partial(kind, lr=0.0, eps=1e-4)), 3, precision="16-true")
    fit(module(optimizer=partial(kind, lr=0.0)), 3, precision="bf16-true")


def test_a_student_that_diverges_is_not_the_optimizers_eps() -> None:
    for kind, lr, precision in ((torch.optim.SGD, 1e4, "16-true"), (torch.optim.AdamW, 1e30, "bf16-true")):
        with pytest.raises(UsageError, match=r"the loss is .* at optimizer step [1-9].*; the student diverged: look"):
            fit(module(optimizer=partial(kind, lr=lr)), 8, precision=precision)
    broken = module(optimizer=torch.optim.AdamW)
    with torch.no_grad():
        next(broken.student.parameters()).fill_(torch.nan)
    with pytest.raises(UsageError, match="at optimizer step 0, epoch 0, batch 0; the student diverged"):
        fit(broken, precision="16-true")  # no step was made yet


@pytest.mark.parametrize(("number", "said"), [(torch.nan, "NaN"), (1e35, r"\de\+3\d")])
def test_a_teacher_that_gives_no_numbers_is_named(number: float, said: str) -> None:
    model = module()
    model.__class__ = Scaled
    model.number = number
    before = parameters(model.student)
    with pytest.raises(UsageError, match=f"the loss is {said} at .* step 0, .* batch 0; the teacher gives {said}"):
        fit(model)
    assert torch.equal(parameters(model.student), before)


def test_an_infinite_divergence_is_said_once_and_not_the_end() -> None:
    model = module()
    model.__class__ = Scaled
    with pytest.warns(UserWarning, match="the loss is infinite at optimizer step 0") as warned:
        fit(model, 4)
    assert sum("the loss is infinite" in str(warning.message) for warning in warned) == 1
    assert parameters(model.student).isfinite().all()
    model = module(criterion=DistillationCriterion(ForwardKL()))
    model.__class__ = Scaled
    fit(model, 4)
