"""A teacher from what the user names: a cache, or a model that runs beside the student."""

from typing import Any

from torch import nn

from akl_lightning.models.load import Precision
from akl_lightning.teachers.base import Teacher
from akl_lightning.teachers.cache.format import CACHE_PREFIX
from akl_lightning.teachers.cache.reader import CachedTeacher
from akl_lightning.teachers.live import LiveTeacher


def build_teacher(
    source: nn.Module | dict[str, Any] | str | None,
    trust_remote_code: bool,
    precision: Precision,
    attn_implementation: str | None,
    packing: bool,
) -> Teacher | None:
    """The teacher, or None where none is named; arguments as for the module.

    Raises:
        UsageError: there is no such cache or model.
    """
    if source is None:
        return None
    if is_cache(source):
        return CachedTeacher(str(source).removeprefix(CACHE_PREFIX))
    return LiveTeacher(
        source, trust_remote_code, precision=precision, attn_implementation=attn_implementation, packing=packing
    )


def is_cache(source: object) -> bool:
    """Whether what is named is a cache."""
    return isinstance(source, str) and source.startswith(CACHE_PREFIX)
