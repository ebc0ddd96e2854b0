"""A teacher that is not there: its hidden states (or top log-probabilities) at response positions, from disk.

A cache is a folder with a manifest, the teacher's output layer, and shards in safetensors, which are memory-mapped. A
sample is found by its content, whatever batch, order or split it comes in.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from akl_lightning.criterion import DistillationCriterion, as_mask
from akl_lightning.errors import UsageError
from akl_lightning.models import Batch
from akl_lightning.projection import Logits, Projection
from akl_lightning.teachers.base import Result, Teacher
from akl_lightning.teachers.codecs import find_codec
from akl_lightning.teachers.fingerprint import digest, template_digest, tokenizer_digests
from akl_lightning.teachers.top_k import decode_top_k

CACHE_PREFIX = "cache:"
"""Marks the path of a cache where a model is expected."""

MANIFEST, HEAD = "manifest.json", "head.safetensors"
FORMAT = 1

_SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


def sample_digests(batch: Batch, positions: Tensor) -> list[bytes]:
    """16 bytes per row that stand for its tokens and for which of them are response positions; padding has no part.

    Args:
        batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
        positions: boolean ``[batch, length]``.

    >>> ids, mask = torch.tensor([[5, 6, 0], [0, 5, 6]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    >>> positions = torch.tensor([[True, False, False], [False, True, False]])
    >>> one, two = sample_digests({"input_ids": ids, "attention_mask": mask}, positions)
    >>> one == two
    True
    """
    marked = (2 * batch["input_ids"].long() + positions).cpu().numpy().astype("<i8")
    masks = batch["attention_mask"].bool().cpu().numpy()
    return [
        hashlib.blake2b(row[mask].tobytes(), digest_size=16).digest() for row, mask in zip(marked, masks, strict=True)
    ]


def as_words(digests: Sequence[bytes]) -> np.ndarray:
    """Digests as integers, ``[samples, 2]``."""
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, finished or not.

    Raises:
        UsageError: there is none, or none that can be trusted.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"there is no teacher's cache in {folder}: give the folder that akl cache has written.")
    try:
        manifest = json.loads(path.read_text())
        checksum = manifest.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error!r}): {_REWRITE}.") from error
    if checksum != manifest_checksum(manifest):
        raise UsageError(f"{path} is damaged, its checksum differs: {_REWRITE}.")
    if manifest["format"] != FORMAT:
        raise UsageError(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}: write it again with akl cache."
        )
    return manifest


_REWRITE = "copy it again from where it was written, or write it again with akl cache"


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Checksum over all other entries."""
    return digest(json.dumps(manifest, sort_keys=True).encode())


def open_shard(path: Path) -> dict[str, Tensor]:
    """Tensors of a shard, memory-mapped.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged ({error}): {_REWRITE}.") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CachedTeacher(Teacher):
    """What ``akl cache`` has written, in the teacher's place.

    Args:
        path: folder of the cache.

    Raises:
        UsageError: no finished cache of this version, or one with a file missing or cut.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.manifest = read_manifest(self.path)
        if not self.manifest["complete"]:
            raise UsageError(f"{self.path} is unfinished: run the same akl cache again, it goes on where it stopped.")
        self._files = {entry["file"]: entry for entry in [*self.manifest["shards"], self.manifest["head"]] if entry}
        for name, entry in self._files.items():
            file = self.path / name
            if not file.is_file():
                raise UsageError(f"{file} is missing, which the manifest names: {_REWRITE}.")
            if (size := file.stat().st_size) != entry["bytes"]:
                raise UsageError(f"{file} is damaged, it has {size} bytes instead of {entry['bytes']}: {_REWRITE}.")
        self._shards = [open_shard(self.path / shard["file"]) for shard in self.manifest["shards"]]
        self._names = [name for name in self._shards[0] if name not in ("digests", "offsets")]
        # Sorted by the first half of the digest, which all but decides.
        words = np.concatenate([shard["digests"].numpy().view("<u8") for shard in self._shards])
        order = np.argsort(words[:, 0], kind="stable")
        counts = [len(shard["digests"]) for shard in self._shards]
        self._words = words[order]
        self._shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._row_of = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[order]

        self.top_k, self.soft_cap = self.manifest["top_k"], self.manifest["soft_cap"]
        self.head: nn.Module | None = None
        if self.top_k is None:
            self.codec = find_codec(self.manifest["codec"])
            self.head = _head(open_shard(self.path / HEAD))
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._max_length: int | None = None
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

    @property
    def fingerprint(self) -> str:
        return self.manifest["teacher"]["weights"]

    def to(self, device: torch.device) -> Self:
        if device.type != "meta" and self.head is not None:
            self.head.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: Tensor, consume: Callable[[Logits], Result]) -> Result:
        return consume(self.logits(batch, positions))

    def logits(self, batch: Batch, positions: Tensor) -> Logits:
        """Read the samples of a batch.

        Raises:
            UsageError: one of them is not in the cache.
        """
        places, missing = self._find(batch, positions)
        if missing:
            raise UsageError(self._lacks(batch, missing, f"{len(missing)} of {len(places)} samples of this batch"))
        slices = []
        for place in places:
            if place >= 0:
                shard, row = self._shards[self._shard_of[place]], self._row_of[place]
                start, stop = shard["offsets"][row : row + 2].tolist()
                slices.append((shard, slice(start, stop)))
        slices = slices or [(self._shards[0], slice(0, 0))]
        parts = {
            name: torch.cat([shard[name][rows] for shard, rows in slices]).to(positions.device) for name in self._names
        }
        if self.head is None:
            return decode_top_k(parts, self.vocab_size)
        return Projection(self.codec.decode(parts), self.head, self.soft_cap)

    def _find(self, batch: Batch, positions: Tensor) -> tuple[list[int], list[int]]:
        """Place of each row in the index, -1 where it has no response token; rows that are not in the cache."""
        places, missing = [-1] * len(positions), []
        rows = positions.any(-1).nonzero().flatten().tolist()
        if rows:
            digests = sample_digests(
                {key: batch[key][rows] for key in ("input_ids", "attention_mask")}, positions[rows]
            )
            wanted = as_words(digests)
            first = np.searchsorted(self._words[:, 0], wanted[:, 0])
            for row, place, words in zip(rows, first.tolist(), wanted, strict=True):
                while place < len(self._words) and self._words[place, 0] == words[0]:
                    if self._words[place, 1] == words[1]:
                        places[row] = place
                        break
                    place += 1
                else:
                    missing.append(row)
        return places, missing

    def _lacks(self, batch: Batch, missing: list[int], what: str) -> str:
        row = missing[0]
        tokens = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        text = str(tokens[:20]) if self._tokenizer is None else repr(self._tokenizer.decode(tokens)[:80])
        message = f"the cache {self.path} lacks {what}, first the one of {len(tokens)} tokens that begins {text}"
        written = self.manifest["data"]["max_length"]
        if written and self._max_length and written != self._max_length:
            message += f"; it was written with data.max_length = {written}, this run cuts at {self._max_length}"
        return f"{message}: run akl cache on this run's data, which adds what is missing, or use the data it has."

    # ----------------------------------------------------------------------------------------------------------------
    # Checks before any work

    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        written = self.manifest["tokenizer"]
        if tokenizer is None or written is None:
            return
        if differing := _differences(written, tokenizer_digests(tokenizer)):
            raise UsageError(
                f"the cache {self.path} was made with another tokenizer than the data's, its {differing} differs: "
                "give the data the teacher's tokenizer, or write a cache with this one."
            )

    def check_run(self, stage: str, trainer: Trainer, criterion: DistillationCriterion) -> None:
        """Refuse another template, damaged files and, of the data module of this package, samples that are missing.

        Every file is read once and its checksum compared; the processes of a node share them out.
        """
        if stage == "predict":  # the student alone answers
            return
        data: Any = getattr(trainer, "datamodule", None)
        template: Any = getattr(data, "template", None)
        written = self.manifest["template"]
        if None not in (template, written) and written["digest"] != template_digest(template, data.tokenizer):
            raise UsageError(
                f"the cache {self.path} was made with another prompt template, {written['name']!r} there and "
                f"{template!r} here: set data.template to it, or write a cache with this one."
            )
        if self.top_k is not None and criterion.divergence.has_reverse_part and not self._warned:
            self._warned = True
            rank_zero_warn(_TOP_K_WARNING.format(self.top_k))
        for split in _SPLITS[stage] if hasattr(data, "samples") else ():
            what = f"Looking up {split} samples"
            batches = tqdm(data.samples(split), what, unit="batch", leave=False, disable=not shows_progress(trainer))
            self._check_samples(split, batches, criterion)
        if not self._checked:
            files = sorted(self._files)[trainer.local_rank :: trainer.num_devices]
            self.check_files(files, show=shows_progress(trainer))
            self._checked = True

    def _check_samples(self, split: str, batches: Iterable[Batch], criterion: DistillationCriterion) -> None:
        total, lacking, example = 0, 0, None
        for batch in batches:
            positions = as_mask(criterion.response_positions(batch["labels"])[0], batch["labels"])
            _, missing = self._find(batch, positions)
            total, lacking = total + len(positions), lacking + len(missing)
            if missing and example is None:
                example = batch, missing
        if example:
            raise UsageError(self._lacks(*example, f"{lacking} of {total} {split} samples"))

    def check_files(self, names: Sequence[str] | None = None, show: bool = False) -> None:
        """Read files and compare their checksums.

        Args:
            names: of the files; None for all.
            show: a progress bar.

        Raises:
            UsageError: one is damaged.
        """
        names = list(self._files) if names is None else names
        with ThreadPoolExecutor() as threads:  # hashing does not hold the interpreter's lock
            checksums = threads.map(lambda name: file_digest(self.path / name), names)
            bar = tqdm(checksums, "Checksums of the cache", len(names), leave=False, disable=not show)
            for name, checksum in zip(names, bar, strict=True):
                if checksum != self._files[name]["sha256"]:
                    raise UsageError(f"{self.path / name} is damaged, its checksum differs: {_REWRITE}.")


_TOP_K_WARNING = (
    "the divergence has a reverse part and the cache holds no more of the teacher than its top {} log-probabilities: "
    "expect poor gradients. For AKL, their cosine with the exact ones was 0.44, 0.38 and 0.34 with the top 16, 64 and "
    "128, and RKL was 0.22, 0.30 and 0.34 of its value (SmolLM2-135M-Instruct and its half); hidden states in int8 "
    "gave 0.9999 and 1.0002. Cache hidden states, or use ForwardKL."
)


def shows_progress(trainer: Trainer) -> bool:
    """Whether this process is the one that shows how far the work has come."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def _head(tensors: dict[str, Tensor]) -> nn.Linear:
    weight, bias = tensors["weight"], tensors.get("bias")
    with torch.device("meta"):
        head = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    return head


def _differences(written: dict[str, str], here: dict[str, str]) -> str:
    return " and ".join(name for name in written | here if written.get(name) != here.get(name))
