"""What lies in the folder of a teacher's cache: a manifest, the teacher's output layer, and shards in safetensors.

A sample is found by its content, whatever batch, order or split it comes in.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from akl_lightning.batch import Batch
from akl_lightning.checkpoint import atomic_file
from akl_lightning.errors import UsageError
from akl_lightning.models.inputs import CONTENT, OURS
from akl_lightning.teachers.fingerprint import digest

CACHE_PREFIX = "cache:"
"""Marks the path of a cache where a model is expected."""

MANIFEST, HEAD, VERIFIED = "manifest.json", "head.safetensors", ".verified.json"
FORMAT = 1

UNRECORDED_INPUTS = CONTENT | {"token_type_ids"}
"""What a cache that does not say what its teacher was given has not been given for certain."""

DIGEST = "S16"
"""A sample's digest to numpy, which sorts and finds them; a shard has it as two integers."""

REWRITE = "copy it again from where it was written, or write it again with akl cache"
"""What helps against a damaged file."""


def sample_digests(batch: Batch, positions: Tensor, inputs: Collection[str] | None = ()) -> list[bytes]:
    """16 bytes per row that stand for its tokens and for which of them are response positions; padding has no part.

    What else the teacher is given of a batch has its part where it is there.

    Args:
        batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
        positions: indices into the flattened batch, ``[tokens]``.
        inputs: names of what else the teacher is given; None for all that is there.

    Raises:
        UsageError: something of which nobody can tell to which row it belongs.

    >>> ids, mask = torch.tensor([[5, 6, 0], [0, 5, 6]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    >>> one, two = sample_digests({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 4]))
    >>> one == two
    True
    """
    marked = 2 * batch["input_ids"].long()
    marked.view(-1)[positions] += 1
    marked = marked.cpu().numpy().astype("<i8")
    masks = batch["attention_mask"].bool().cpu().numpy()
    hashes = [hashlib.blake2b(row[mask].tobytes(), digest_size=16) for row, mask in zip(marked, masks, strict=True)]
    for name in sorted(batch.keys() - OURS):
        if isinstance(value := batch[name], Tensor) and (inputs is None or name in inputs):
            for sample, rows in zip(hashes, _rows(name, value, masks), strict=True):
                sample.update(f"{name} {list(rows.shape[1:])}".encode() + rows.tobytes())
    return [sample.digest() for sample in hashes]


def _rows(name: str, value: Tensor, masks: np.ndarray) -> list[np.ndarray]:
    """What of an entry of the batch belongs to each of its samples."""
    samples, length = masks.shape
    content = (value.double() if value.is_floating_point() else value.long()).cpu().numpy()
    if content.shape[:2] == (samples, length):
        return [row[mask] for row, mask in zip(content, masks, strict=True)]
    if content.shape == (samples,):
        return list(content[:, None])
    if samples > 1:
        raise UsageError(
            f"nobody can tell which part of {name!r}, of shape {list(value.shape)}, belongs to which of the {samples} "
            "samples of the batch, by which a teacher's cache is kept: give batches of one sample."
        )
    return [content]


def tokens_per_sample(batch: Batch, positions: Tensor) -> list[int]:
    """How many response tokens each sample of a batch has.

    >>> tokens_per_sample({"input_ids": torch.zeros(2, 3)}, torch.tensor([0, 4, 5]))
    [1, 2]
    """
    samples, length = batch["input_ids"].shape
    return torch.bincount(positions // length, minlength=samples).tolist()


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
        raise UsageError(f"{path} is damaged ({error!r}): {REWRITE}.") from error
    if checksum != manifest_checksum(manifest):
        raise UsageError(f"{path} is damaged, its checksum differs: {REWRITE}.")
    if manifest["format"] != FORMAT:
        raise UsageError(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}: write it again with akl cache."
        )
    return manifest


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
        raise UsageError(f"{path} is damaged ({error}): {REWRITE}.") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged_files(folder: Path) -> dict[str, list[Any]]:
    """What was found of files whose checksums have been compared before: size, time of change, checksum, by name."""
    with suppress(OSError, ValueError):
        return json.loads((folder / VERIFIED).read_text())
    return {}


def remember_unchanged(folder: Path, files: Iterable[str], checksums: Mapping[str, str]) -> None:
    """Note that the checksums of files are right, so that the next run need not read them all."""
    known = unchanged_files(folder) | {name: file_state(folder / name, checksums[name]) for name in files}
    with suppress(OSError), atomic_file(folder / VERIFIED) as file:  # a cache may well lie where nobody may write
        file.write_text(json.dumps(known))


def file_state(file: Path, checksum: str) -> list[Any]:
    """What tells whether a file has been touched since."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, checksum]


def identity(manifest: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """What all shards of a cache have in common, by what messages call it, and how they say it."""
    teacher = manifest["teacher"]
    digests = {f"tokenizer's {name}": value for name, value in (manifest["tokenizer"] or {}).items()}
    return {
        "teacher": (teacher["weights"], f"{teacher['name']!r} with weights {teacher['weights'][:8]}"),
        **{name: (value, value[:8]) for name, value in digests.items()},
        **{name: (manifest[name], str(manifest[name])) for name in ("codec", "top_k")},
    }


def shard_entry(file: Path, checksum: str, samples: int, tokens: int) -> dict[str, Any]:
    """What the manifest says of a shard."""
    size = file.stat().st_size
    return {"file": file.name, "sha256": checksum, "bytes": size, "samples": samples, "tokens": tokens}


def shard_name(checksum: str) -> str:
    """A shard is named after its checksum."""
    return f"shard-{checksum[:32]}.safetensors"
