"""How classes are laid out, and what merges them: plain torch and, under its interpreter or on a GPU, Triton.

``test_triton.py`` starts them under the interpreter.
"""

import os

import pytest
import torch
from torch import Tensor

from akl_lightning.kernels import classes as plain
from akl_lightning.kernels import triton_classes
from akl_lightning.kernels.classes import Classes
from akl_lightning.kernels.pairs import Comparison

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_A_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_A_GPU else "cpu"
KERNELS = pytest.mark.skipif(not (INTERPRETED or ON_A_GPU), reason="needs a GPU or TRITON_INTERPRET=1")

SIZES = [1] * 30 + [2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 34, 1100, 1, 1]


def maps() -> tuple[Tensor, Tensor]:
    """Of classes of these sizes, and of such as the teacher has one or two outputs for; one has none there."""
    student = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    teacher = torch.cat([torch.arange(len(SIZES) - 1), torch.arange(20, 40)])
    return student[torch.randperm(len(student))], teacher[torch.randperm(len(teacher))]


def test_every_output_has_its_column() -> None:
    of_student, of_teacher = maps()
    classes = Classes(of_student, of_teacher, len(SIZES))
    assert classes.width == len(SIZES) and classes.alone == 21
    assert sorted(classes.numbers.tolist()) == list(range(len(SIZES)))
    for side, of in ((classes.student, of_student), (classes.teacher, of_teacher)):
        outputs = torch.arange(len(of))
        assert torch.equal(side.order[side.place], outputs)
        assert torch.equal(classes.numbers[side.of_output], of)
        columns = torch.cat([torch.arange(classes.alone), classes.alone + side.of_column])
        assert torch.equal(classes.numbers[columns[side.place]], of)
        assert len(side.order) == len(of) + len(side.empty)
    assert classes.student.empty.tolist() == []
    assert classes.numbers[classes.alone + classes.teacher.empty].tolist() == [len(SIZES) - 1]
    # What stands first stands there in the student's order.
    assert (classes.student.order[: classes.alone].diff() > 0).all()
    moved = classes.to("cpu")
    assert moved is classes
    there = classes.to("meta")
    assert {x.device.type for x in (there.numbers, there.student.place, there.teacher.buckets[0].columns)} == {"meta"}
    assert (there.alone, there.width, there.count) == (classes.alone, classes.width, classes.count)


def test_equal_vocabularies_have_nothing_to_merge() -> None:
    classes = Classes(torch.arange(9), torch.arange(9).flip(0), 9)
    assert (classes.alone, classes.width) == (9, 9)
    assert not classes.student.buckets and classes.student.order.tolist() == list(range(9))
    logits = torch.randn(2, 9)
    before = logits.clone()
    shares = plain.merge(logits, classes.student, classes, 1.0, True)
    assert torch.equal(logits, before) and shares is not None and shares.shape == (2, 0)


def case(rows: int = 3) -> tuple[Classes, Tensor, Tensor, Tensor]:
    classes = Classes(*maps(), len(SIZES)).to(DEVICE)
    wide = 2 * torch.randn(rows, len(classes.student.order) + 5, device=DEVICE)
    student, teacher = wide[:, :-5], 2 * torch.randn(rows, len(classes.teacher.order), device=DEVICE)
    labels = torch.tensor([0, len(classes.student.place) // 2, len(classes.student.place) - 1], device=DEVICE)
    return classes, student, teacher, labels[:rows]


@KERNELS
@pytest.mark.parametrize("t", [1.0, 2.5])
def test_the_kernel_merges_as_plain_torch_does(t: float, monkeypatch: pytest.MonkeyPatch) -> None:
    classes, student, teacher, _ = case()
    columns = classes.student.of_column.tolist()
    same = [column for column, of in enumerate(columns) if columns.count(of) > 100]
    student[0, classes.alone + torch.tensor(same, device=DEVICE)] = -torch.inf  # all of two classes
    student[1, classes.alone + 3] = student[1, -1] = -torch.inf
    for logits, side in ((student, classes.student), (teacher, classes.teacher)):
        ours, right = logits.clone(), logits.double()
        shares = plain.merge(ours, side, classes, t, True)
        again = logits.clone()
        assert plain.merge(again, side, classes, t, False) is None and torch.equal(ours, again)
        with monkeypatch.context() as patch:
            patch.setattr(triton_classes, "supports", lambda _: False)
            of_right = plain.merge(right, side, classes, t, True)
        assert shares is not None and of_right is not None
        # Behind the classes, what was merged into them is still as it was.
        assert torch.equal(ours[:, classes.width :], logits[:, classes.width :])
        torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(shares.double(), of_right, rtol=1e-5, atol=1e-7)
        assert torch.equal(ours[:, : classes.alone], logits[:, : classes.alone])


@KERNELS
@pytest.mark.parametrize(("t", "dtype"), [(1.0, torch.bfloat16), (2.0, torch.float32)])
def test_the_whole_comparison(t: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    classes, student, teacher, labels = case()
    for alpha in (0.6, torch.tensor([0.6, 0.0, 1.0], device=DEVICE)):
        how, into = Comparison("adaptive_kl", 0.0, alpha, t), torch.empty_like(student, dtype=dtype)
        ours = plain.compare(student.clone(), teacher.clone(), labels, how, classes, into)
        with monkeypatch.context() as patch:
            patch.setattr(triton_classes, "supports", lambda _: False)
            of_right = torch.empty_like(student, dtype=torch.double)
            right = plain.compare(student.double(), teacher.double(), labels, how, classes, of_right)
        for name, values in right.items():
            assert ((ours[name] - values).abs() <= 1e-5 * values.abs() + 2e-6).all(), name
        tolerance = 1e-5 if dtype == torch.float32 else 5e-3
        assert (into.double() - of_right).norm() <= tolerance * of_right.norm()
    in_place = student.clone()
    plain.compare(in_place, teacher.clone(), labels, how, classes, in_place)
    assert (in_place.double() - of_right).norm() <= 1e-5 * of_right.norm()


@KERNELS
def test_no_number_is_hidden() -> None:
    classes, student, _, _ = case()
    for column in (classes.alone + 3, classes.width + 1, student.shape[1] - 1):
        logits = student.clone()
        logits[1, column] = torch.nan
        plain.merge(logits, classes.student, classes, 1.0, True)
        assert logits[:, : classes.width].isnan().sum(-1).tolist() == [0, 1, 0]
