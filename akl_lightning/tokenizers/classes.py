"""Classes of tokens over two vocabularies: what a token of one can be compared with in the other."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from akl_lightning.cached import cache_folder, key_of
from akl_lightning.checkpoint import atomic_file
from akl_lightning.errors import UsageError
from akl_lightning.tokenizers.bytes import TokenBytes


class Partition(NamedTuple):
    """Which class each output of two models belongs to."""

    student: Tensor
    """``[outputs of the student]``, int64, from 0 to ``count`` - 1."""

    teacher: Tensor
    """``[outputs of the teacher]``, likewise."""

    classes: int
    """Number of classes."""


class Vocabulary(NamedTuple):
    """One model's side of the classes."""

    tokens: TokenBytes
    ends: Collection[int]
    """Ids of the tokens that end a response."""

    outputs: int
    """Of the model's head, with its padding."""

    def of(self, token: int) -> bytes | None:
        return None if token in self.ends else self.tokens.of(token)


def partition(student: Vocabulary, teacher: Vocabulary) -> Partition:
    """Tokens of equal bytes are a class; one without a partner joins that of the token with which the other begins it.

    Any that end a response are one class, whatever they are called. All others that say nothing (special tokens,
    padding of a head), and those that the other side cannot begin to say, are one class, too: the last.

    Args:
        student: the vocabulary that is trained.
        teacher: the other one.

    Raises:
        UsageError: they share no token.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    sides = student, teacher
    nodes = student.outputs, teacher.outputs
    first = 0, student.outputs
    end, rest = sum(nodes), sum(nodes) + 1
    said = [[side.of(token) for token in range(side.outputs)] for side in sides]
    # For each token in bytes, one of the other side that says them; of duplicates all are joined below.
    by_bytes: list[dict[bytes, int]] = [{}, {}]
    edges: list[tuple[int, int]] = []
    for side, tokens in enumerate(said):
        for token, of in enumerate(tokens):
            node = first[side] + token
            if token in sides[side].ends:
                edges.append((node, end))
            elif not of:
                edges.append((node, rest))
            elif of in by_bytes[side]:
                edges.append((node, by_bytes[side][of]))
            else:
                by_bytes[side][of] = node
    shared = by_bytes[0].keys() & by_bytes[1].keys()
    if not shared:
        raise UsageError(
            "student and teacher share no token of any text, by which they could be compared: take a teacher whose "
            "tokenizer has some of the student's."
        )
    edges += [(by_bytes[0][of], by_bytes[1][of]) for of in shared]
    for side, other in ((0, 1), (1, 0)):
        alone = [of for of in by_bytes[side] if of not in shared]
        begun = sides[other].tokens.first_tokens(alone)
        for of, begin in zip(alone, begun, strict=True):
            known = begin is not None and begin < nodes[other] and begin not in sides[other].ends
            edges.append((by_bytes[side][of], first[other] + begin if known and begin is not None else rest))
    ends = np.array(edges).T
    graph = coo_array((np.ones(len(edges), bool), (ends[0], ends[1])), shape=(rest + 1, rest + 1))
    _, classes = connected_components(graph, directed=False)
    # The last is the rest, and none is of the two extra nodes alone.
    order = np.where(classes[:end] == classes[rest], np.iinfo(np.int32).max, classes[:end])
    numbers = torch.from_numpy(np.unique(order, return_inverse=True)[1].astype(np.int64))
    return _counted(numbers[: nodes[0]], numbers[nodes[0] :])


def _counted(student: Tensor, teacher: Tensor) -> Partition:
    return Partition(student, teacher, int(max(student.max(), teacher.max())) + 1)


def find_partition(student: Vocabulary, teacher: Vocabulary) -> Partition:
    """:func:`partition`, from the cache of ``datasets`` where it was made before."""
    import scipy

    folder = cache_folder()
    if folder is None:
        return partition(student, teacher)
    depends_on = [[side.tokens.digest, sorted(side.ends), side.outputs] for side in (student, teacher)]
    path = folder / f"classes-{key_of([depends_on, scipy.__version__], (partition, TokenBytes))[:32]}.safetensors"
    with suppress(OSError, SafetensorError):  # it is not there, or damaged
        found = load_file(path)
        return _counted(found["student"], found["teacher"])
    made = partition(student, teacher)
    with atomic_file(path) as file:
        save_file({"student": made.student.contiguous(), "teacher": made.teacher.contiguous()}, file)
    return made


def members(partition: Partition, side: str) -> list[np.ndarray]:
    """Tokens of one side in each class."""
    classes: np.ndarray = getattr(partition, side).numpy()
    order = np.argsort(classes, kind="stable")
    bounds: Sequence[int] = np.searchsorted(classes[order], np.arange(partition.classes + 1)).tolist()
    return [order[start:stop] for start, stop in pairwise(bounds)]
