"""Which teacher a setting means."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn
from torch.distributed.tensor import DTensor

from akl_lightning.errors import UsageError
from akl_lightning.models.load import Precision, look_for_causal_lm
from akl_lightning.models.split import SplitModel
from akl_lightning.teachers.base import Teacher
from akl_lightning.teachers.base_model import BASE, BaseModelTeacher
from akl_lightning.teachers.cache.format import CACHE_PREFIX
from akl_lightning.teachers.cache.reader import CachedTeacher, read_finished
from akl_lightning.teachers.live import LiveTeacher


def has_own_model(teacher: nn.Module | Mapping[str, Any] | str | None) -> bool:
    """Whether a teacher is a model beside the student: neither none, nor a cache, nor the student's base."""
    return teacher is not None and teacher != BASE and not is_cache(teacher)


def is_cache(teacher: object) -> TypeGuard[str]:
    """Whether a setting means a teacher's cache."""
    return isinstance(teacher, str) and teacher.startswith(CACHE_PREFIX)


def look_for_teacher(teacher: Any, trust_remote_code: bool = False) -> None:
    """Ask whether :func:`choose_teacher` will find the teacher of a setting, of which no weights are read.

    Raises:
        UsageError: it will not.
    """
    if is_cache(teacher):
        read_finished(Path(teacher.removeprefix(CACHE_PREFIX)).expanduser())
    elif has_own_model(teacher):
        look_for_causal_lm(teacher, trust_remote_code, "teacher")


def choose_teacher(
    teacher: nn.Module | Mapping[str, Any] | str | None,
    student: SplitModel,
    trust_remote_code: bool = False,
    precision: Precision = "auto",
    attn_implementation: str | None = None,
) -> Teacher | None:
    """The teacher that a setting of :class:`~akl_lightning.module.DistillationModule` means.

    Args:
        teacher: the setting.
        student: whose base it may be, and with which it may share nothing else.
        trust_remote_code: run Python code that comes with the model.
        precision: of the weights of one that is no module.
        attn_implementation: as for :func:`akl_lightning.models.load.load_causal_lm`.

    Raises:
        UsageError: it cannot be had, or shares parameters with the student.
    """
    if teacher is None:
        return None
    if teacher == BASE:
        return BaseModelTeacher(student)
    if is_cache(teacher):
        return CachedTeacher(teacher.removeprefix(CACHE_PREFIX))
    if isinstance(teacher, nn.Module):
        _check_apart(teacher, student)
    return LiveTeacher(
        teacher,
        trust_remote_code,
        precision=precision,
        attn_implementation=attn_implementation,
        packing=student.packing,
    )


def _check_apart(teacher: nn.Module, student: SplitModel) -> None:
    """Before anything is frozen, which would freeze the student's, too."""
    places = {_place(parameter): name for name, parameter in teacher.named_parameters() if parameter.numel()}
    for name, parameter in student.model.named_parameters():
        theirs = places.get(_place(parameter)) if parameter.numel() else None
        if theirs is not None:
            raise UsageError(
                f"the student's {name} is the teacher's {theirs}, which is frozen: give the student a copy of its own "
                f"(copy.deepcopy), or model.teacher {BASE} if the teacher is the model under the student's adapter."
            )


def _place(parameter: nn.Parameter) -> int:
    """What two parameters that share their memory have in common; on the meta device, where none has any, itself."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.untyped_storage().data_ptr() or id(parameter)
