"""Which teacher a setting means, and that it has nothing of the student's."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from akl_lightning.cli import DistillationCLI
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.models.layers import prune_layers
from akl_lightning.models.lora import LoraSettings
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.base_model import BaseModelTeacher
from akl_lightning.teachers.live import LiveTeacher
from tests.conftest import QUIET, gpt2
from tests.test_module import parameters


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()] + [each.requires_grad for each in model.parameters()]


def borrowed(how: str, teacher: nn.Module) -> tuple[nn.Module, str]:
    """A student with something of the teacher's, and the names that the sentence says."""
    student = gpt2(16)
    if how == "embeddings and head":
        student.transformer.wte = teacher.transformer.wte
        student.lm_head = teacher.lm_head
        return student, "the student's transformer.wte.weight is the teacher's transformer.wte.weight"
    if how == "a block":
        student.transformer.h[0] = teacher.transformer.h[1]
        return student, "the student's transformer.h.0.ln_1.weight is the teacher's transformer.h.1.ln_1.weight"
    if how == "memory":  # parameters of its own, which would change the teacher as they learn
        student.transformer.wpe.weight = nn.Parameter(teacher.transformer.wpe.weight.data[:32])
        return student, "the student's transformer.wpe.weight is the teacher's transformer.wpe.weight"
    if how == "all":
        return teacher, "the student's transformer.wte.weight is the teacher's"
    adapted = peft.get_peft_model(teacher, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"]))
    return adapted, r"the student's base_model.model.transformer.wte.weight is the teacher's .* or model\.teacher base"


@pytest.mark.parametrize("how", ["embeddings and head", "a block", "memory", "all", "an adapter on it"])
def test_a_student_that_shares_parameters_with_the_teacher_is_refused_by_name(how: str) -> None:
    teacher = gpt2(16, layers=2).train()
    student, said = borrowed(how, teacher)
    before = modes(student), modes(teacher)
    with pytest.raises(UsageError, match=said):
        DistillationModule(student, teacher)
    assert (modes(student), modes(teacher)) == before, "nothing was frozen on the way"


def test_copies_are_no_sharing(data: InstructionDataModule) -> None:
    teacher = gpt2(16, layers=2)
    copied = gpt2(16)
    copied.transformer.wte = copy.deepcopy(teacher.transformer.wte)
    copied.tie_weights()
    for student in (copied, prune_layers(teacher, [1]), copy.deepcopy(teacher)):
        module = DistillationModule(student, teacher, optimizer=lambda p: torch.optim.SGD(p, 1.0))
        start, of_teacher = student.lm_head.weight.clone(), parameters(teacher)
        Trainer(**QUIET, max_epochs=1, limit_train_batches=1).fit(module, data)
        assert not torch.equal(student.lm_head.weight, start) and torch.equal(parameters(teacher), of_teacher)
        student.to("meta")
    with torch.device("meta"):  # where nothing has any memory
        DistillationModule(gpt2(16), gpt2(16))


def test_a_module_is_put_into_eval_mode_and_frozen_in_place(data: InstructionDataModule) -> None:
    teacher = gpt2(24).train()
    module = DistillationModule(gpt2(16), teacher)
    assert isinstance(module.teacher, LiveTeacher) and module.teacher.model.model is teacher
    assert not any(modes(teacher))
    Trainer(**QUIET, max_epochs=1, limit_train_batches=2).fit(module, data)
    assert not any(modes(teacher)) and all(parameter.grad is None for parameter in teacher.parameters())


def test_the_base_is_no_name_of_a_tokenizer(
    tokenizer, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2(16).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    cli = DistillationCLI(
        args=["--model.student", str(tmp_path / "small"), "--model.teacher", "base", "--model.lora.rank", "2",
              "--data.source", "JsonLines", "--data.source.path", corpus],
        run=False,
    )  # fmt: skip
    assert isinstance(cli.model.teacher, BaseModelTeacher) and cli.datamodule.tokenizer.name_or_path.endswith("small")
    assert "the student without its adapter" in cli.model.teacher.description
    DistillationModule(str(tmp_path / "small"), "base", lora=LoraSettings(rank=2))
