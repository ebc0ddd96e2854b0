"""A teacher's cache in the teacher's place; its shards are memory-mapped."""

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from akl_lightning.batch import Batch, teacher_side
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.facts import data_of, facts_of_run
from akl_lightning.errors import UsageError
from akl_lightning.models.inputs import CONTENT
from akl_lightning.models.vocabulary import tokenizer_of
from akl_lightning.projection import Logits, Projection
from akl_lightning.teachers.base import Teacher
from akl_lightning.teachers.cache.codecs import find_codec
from akl_lightning.teachers.cache.format import (
    HEAD,
    REWRITE,
    file_digest,
    open_shard,
    read_manifest,
    remember_unchanged,
    touched_files,
)
from akl_lightning.teachers.cache.samples import DIGEST, UNRECORDED_INPUTS, sample_digests, tokens_per_sample
from akl_lightning.teachers.cache.top_k import decode_top_k
from akl_lightning.teachers.fingerprint import tokenizer_digests

T = TypeVar("T")

_SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


def read_finished(path: Path) -> dict[str, Any]:
    """The manifest of a cache that is to be trained from.

    Raises:
        UsageError: there is none of this version, or it is unfinished.
    """
    manifest = read_manifest(path)
    if not manifest["complete"]:
        raise UsageError(f"{path} is unfinished: run the same akl cache again, it goes on where it stopped.")
    return manifest


class CachedTeacher(Teacher):
    """What ``akl cache`` has written, in the teacher's place.

    Args:
        path: folder of the cache.

    Raises:
        UsageError: no finished cache of this version, or one with a file missing or cut.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.manifest = read_finished(self.path)
        self._files = {entry["file"]: entry for entry in [*self.manifest["shards"], self.manifest["head"]] if entry}
        for name, entry in self._files.items():
            file = self.path / name
            if not file.is_file():
                raise UsageError(f"{file} is missing, which the manifest names: {REWRITE}.")
            if (size := file.stat().st_size) != entry["bytes"]:
                raise UsageError(f"{file} is damaged, it has {size} bytes instead of {entry['bytes']}: {REWRITE}.")
        self._shards = [open_shard(self.path / shard["file"]) for shard in self.manifest["shards"]]
        self._names = [name for name in self._shards[0] if name not in ("digests", "offsets")]
        self._starts = np.cumsum([0, *(len(shard["digests"]) for shard in self._shards)])
        digests = np.concatenate([shard["digests"].numpy().view(DIGEST)[:, 0] for shard in self._shards])
        self._order = np.argsort(digests, kind="stable")  # numbers of samples, counted over all shards
        self._digests = digests[self._order]

        self.fingerprint = self.manifest["teacher"]["weights"]
        self.longest = self.manifest["data"].get("longest")
        self.max_positions: int | None = self.manifest["data"]["max_length"]
        """Tokens of the longest sample that the cache may hold, or None where that is not known."""
        self.top_k, self.soft_cap = self.manifest["top_k"], self.manifest["soft_cap"]
        self._inputs: Collection[str] | None = self.manifest.get("inputs", UNRECORDED_INPUTS)
        self.head: nn.Module | None = None
        if self.top_k is None:
            self.codec = find_codec(self.manifest["codec"])
            self.head = _head(open_shard(self.path / HEAD))
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._max_length: int | None = None
        self._template: str | None = None
        self._checked = False
        self._warned = False

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)  # memory maps do not travel to a spawned process

    @property
    def description(self) -> str:
        kind = self.manifest["codec"] if self.top_k is None else f"top {self.top_k}"
        return f"{self.manifest['teacher']['name']}, cached ({kind})"

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The one beside the teacher, where that is still the one that the cache was made with."""
        found = tokenizer_of(self.manifest["teacher"]["name"])
        return found if found is not None and tokenizer_digests(found) == self.manifest["tokenizer"] else None

    def to(self, device: torch.device) -> Self:
        if device.type != "meta" and self.head is not None:
            self.head.to(device)
        return self

    def prepare(self, batch: Batch, positions: Tensor) -> dict[str, Any]:
        """Read the samples of a batch, while the device is still at the batch before.

        Raises:
            UsageError: one of them is not in the cache.
        """
        samples, missing = self._find(batch, positions)
        if missing:
            what = f"{len(missing)} of {len(batch['input_ids'])} samples of this batch"
            raise UsageError(self._lacks(batch, missing, what))
        slices = [(self._shards[0], slice(0, 0))]
        for sample, number in zip(samples, np.searchsorted(self._starts, samples, "right") - 1, strict=True):
            shard, row = self._shards[number], sample - self._starts[number]
            start, stop = shard["offsets"][row : row + 2].tolist()
            slices.append((shard, slice(start, stop)))
        parts = {name: torch.cat([shard[name][rows] for shard, rows in slices]) for name in self._names}
        # Pinned, so that their way to the device is not waited for.
        return {
            "cached": {name: part.pin_memory() if torch.cuda.is_available() else part for name, part in parts.items()}
        }

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: Tensor) -> Logits:
        """What was cached for the samples of a batch."""
        parts = batch.get("cached") or self.prepare(batch, positions)["cached"]
        parts = {name: part.to(positions.device) for name, part in parts.items()}
        if self.head is None:
            return decode_top_k(parts, self.vocab_size)
        return Projection(self.codec.decode(parts), self.head, self.soft_cap)

    def _find(self, batch: Batch, positions: Tensor) -> tuple[np.ndarray, list[int]]:
        """Numbers in the cache of the samples that have response tokens; rows of those that are not in it."""
        odd = () if self._inputs is None else sorted((CONTENT & batch.keys()) - set(self._inputs))
        if odd:
            raise UsageError(
                f"the batch has {odd[0]!r}, which the teacher of the cache {self.path} cannot be given: leave it out "
                "of the batch, or cache a teacher that knows it."
            )
        wanted = np.array(sample_digests(batch, positions, self._inputs), DIGEST)
        has_tokens = np.array(tokens_per_sample(batch, positions)) > 0
        places = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        is_here = self._digests[places] == wanted
        return self._order[places[has_tokens & is_here]], np.flatnonzero(has_tokens & ~is_here).tolist()

    def _lacks(self, batch: Batch, missing: list[int], what: str) -> str:
        row = missing[0]
        tokens = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        text = str(tokens[:20]) if self._tokenizer is None else repr(self._tokenizer.decode(tokens)[:80])
        message = f"the cache {self.path} lacks {what}, first the one of {len(tokens)} tokens that begins {text}"
        written = self.manifest["data"]["max_length"]
        if written and self._max_length and written != self._max_length:
            message += f"; it was written with data.max_length = {written}, this run cuts at {self._max_length}"
        template = (self.manifest["template"] or {}).get("name")
        if template and self._template and template != self._template:
            message += f"; it was made with the prompt template {template!r}, this run's is {self._template!r}"
        return f"{message}: run akl cache on this run's data, which adds what is missing, or use the data it has."

    # ----------------------------------------------------------------------------------------------------------------
    # Checks before any work

    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        written = self.manifest["tokenizer"]
        if tokenizer is None or written is None:
            return
        here = tokenizer_digests(tokenizer)
        if differing := [name for name in written | here if written.get(name) != here.get(name)]:
            raise UsageError(
                f"the cache {self.path} was made with another tokenizer than the data's, its {' and '.join(differing)} "
                "differs: give the data the teacher's tokenizer, as data.teacher_tokenizer where the student has "
                "another, or write a cache with this one."
            )

    def check_run(self, stage: str, trainer: Trainer, criterion: DistillationCriterion) -> None:
        """Refuse damaged files and, of the data module of this package, samples that are missing.

        So is a temperature, where the likeliest tokens alone are known.

        Every file is read and its checksum compared in the first run, and again when it has been touched since; the
        processes of a node share them out.
        """
        if stage == "predict":  # the student alone answers
            return
        if self.top_k is not None and criterion.temperature != 1:
            raise UsageError(
                f"the cache {self.path} holds no more of the teacher than its top {self.top_k} log-probabilities, of "
                f"which nobody knows how a temperature of {criterion.temperature} spreads the rest: set "
                "model.criterion.temperature to 1, or cache hidden states."
            )
        data, facts = data_of(trainer), facts_of_run(trainer)
        self._template = facts.template if facts.pairing is None else facts.pairing.chats[1].template
        if self.top_k is not None and criterion.divergence.has_reverse_part and not self._warned:
            self._warned = True
            rank_zero_warn(_TOP_K_WARNING.format(self.top_k))
        for split in _SPLITS[stage] if hasattr(data, "samples") else ():
            batches = with_progress(trainer, data.samples(split), f"Looking up {split} samples", "batch")
            self._check_samples(split, batches, criterion)
        if not self._checked:
            checksums = {name: entry["sha256"] for name, entry in self._files.items()}
            mine = touched_files(self.path, checksums)[trainer.local_rank :: trainer.num_devices]
            self.check_files(mine, trainer)
            if mine:
                remember_unchanged(self.path, mine, checksums)
            self._checked = True

    def _check_samples(self, split: str, batches: Iterable[Batch], criterion: DistillationCriterion) -> None:
        total, lacking, example = 0, 0, None
        for batch in map(teacher_side, batches):
            positions, _ = criterion.response_positions(batch["labels"])
            _, missing = self._find(batch, positions)
            total, lacking = total + len(batch["input_ids"]), lacking + len(missing)
            if missing and example is None:
                example = batch, missing
        if example:
            raise UsageError(self._lacks(*example, f"{lacking} of {total} {split} samples"))

    def check_files(self, names: Sequence[str] | None = None, trainer: Trainer | None = None) -> None:
        """Read files and compare their checksums.

        Args:
            names: of the files; None for all.
            trainer: whose process may show how far this has come; None for no bar.

        Raises:
            UsageError: one is damaged.
        """
        names = list(self._files) if names is None else names
        with ThreadPoolExecutor() as threads:  # hashing does not hold the interpreter's lock
            checksums = threads.map(lambda name: file_digest(self.path / name), names)
            bar = with_progress(trainer, checksums, "Checksums of the cache", "file", len(names))
            for name, checksum in zip(names, bar, strict=True):
                if checksum != self._files[name]["sha256"]:
                    raise UsageError(f"{self.path / name} is damaged, its checksum differs: {REWRITE}.")


_TOP_K_WARNING = (
    "the divergence has a reverse part and the cache holds no more of the teacher than its top {} log-probabilities: "
    "expect poor gradients. For AKL, their cosine with the exact ones was 0.44, 0.38 and 0.34 with the top 16, 64 and "
    "128, and RKL was 0.22, 0.30 and 0.34 of its value (SmolLM2-135M-Instruct and its half); hidden states in int8 "
    "gave 0.9999 and 1.0002. Cache hidden states, or use ForwardKL."
)


def shows_progress(trainer: Trainer) -> bool:
    """Whether this process is the one that shows how far the work has come."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def with_progress(
    trainer: Trainer | None, items: Iterable[T], what: str, unit: str, total: int | None = None
) -> Iterable[T]:
    """The same items, under a bar that goes when they are through; without one where the process shows none."""
    shown = trainer is not None and shows_progress(trainer)
    return tqdm(items, what, total, leave=False, unit=unit, disable=not shown)


def _head(tensors: dict[str, Tensor]) -> nn.Linear:
    outputs, hidden = tensors["weight"].shape
    with torch.device("meta"):
        head = nn.Linear(hidden, outputs, "bias" in tensors)
    head.load_state_dict(tensors, assign=True)
    return head.requires_grad_(False)
