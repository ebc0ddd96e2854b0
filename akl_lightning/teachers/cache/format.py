"""What lies in the folder of a teacher's cache: a manifest, the teacher's output layer, and shards in safetensors.

One run at a time writes to it, and its files are complete or not there.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from akl_lightning.checkpoint import atomic_file, check_writable
from akl_lightning.errors import UsageError
from akl_lightning.teachers.fingerprint import digest

CACHE_PREFIX = "cache:"
"""Marks the path of a cache where a model is expected."""

MANIFEST, HEAD, VERIFIED = "manifest.json", "head.safetensors", ".verified.json"
FORMAT = 1

REWRITE = "copy it again from where it was written, or write it again with akl cache"
"""What helps against a damaged file."""


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


def touched_files(folder: Path, checksums: Mapping[str, str]) -> list[str]:
    """The files that have been touched since :func:`remember_unchanged`, or were never compared with a checksum."""
    known = _verified(folder)
    return [name for name in sorted(checksums) if known.get(name) != _state(folder / name, checksums[name])]


def remember_unchanged(folder: Path, files: Iterable[str], checksums: Mapping[str, str]) -> None:
    """Note that the checksums of files are right, so that the next run need not read them all."""
    known = _verified(folder) | {name: _state(folder / name, checksums[name]) for name in files}
    with suppress(OSError), atomic_file(folder / VERIFIED) as file:  # a cache may well lie where nobody may write
        file.write_text(json.dumps(known))


def _verified(folder: Path) -> dict[str, list[Any]]:
    with suppress(OSError, ValueError):
        return json.loads((folder / VERIFIED).read_text())
    return {}


def _state(file: Path, checksum: str) -> list[Any]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, checksum]


def identity(manifest: dict[str, Any]) -> defaultdict[str, tuple[Any, str]]:
    """What all shards of a cache have in common, by what messages call it, and how they say it."""
    teacher = manifest["teacher"]
    found: defaultdict[str, tuple[Any, str]] = defaultdict(lambda: ("", "none"))  # of what a tokenizer lacks
    found["teacher"] = teacher["weights"], f"{teacher['name']!r} with weights {teacher['weights'][:8]}"
    found |= {f"tokenizer's {name}": (value, value[:8]) for name, value in (manifest["tokenizer"] or {}).items()}
    found |= {name: (manifest[name], str(manifest[name])) for name in ("codec", "top_k")}
    return found


def shard_entry(file: Path, checksum: str, samples: int, tokens: int) -> dict[str, Any]:
    """What the manifest says of a shard."""
    size = file.stat().st_size
    return {"file": file.name, "sha256": checksum, "bytes": size, "samples": samples, "tokens": tokens}


def shard_name(checksum: str) -> str:
    """A shard is named after its checksum."""
    return f"shard-{checksum[:32]}.safetensors"


# --------------------------------------------------------------------------------------------------------------------
# Writing


def check_is_cache(path: Path) -> None:
    """Raise :class:`UsageError` where a folder has something else in it than a cache."""
    others = [file for file in path.glob("*") if not file.name.startswith(".")]
    if others and not (path / MANIFEST).exists():
        raise UsageError(f"{path} is not empty and no teacher's cache: give another path.")


def check_same(path: Path, manifest: dict[str, Any]) -> None:
    """Raise :class:`UsageError` where the cache that lies there has another teacher, tokenizer or codec."""
    if not (path / MANIFEST).exists():
        return
    theirs, ours = identity(read_manifest(path)), identity(manifest)
    differing = [name for name in theirs | ours if theirs[name][0] != ours[name][0]]
    if differing:
        said = " and ".join(f"{name} ({theirs[name][1]} there, {ours[name][1]} here)" for name in differing)
        raise UsageError(f"the cache in {path} has another {said}: give another path.")


def reserve(path: Path) -> FileLock:
    """Make the folder, and let no other run write to it.

    Raises:
        UsageError: it cannot be made, or another run writes to it.
    """
    check_writable(path)
    lock = FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"another run is writing to {path}: wait for it, or give another path.") from error
    return lock


def give_back(path: Path, lock: FileLock) -> None:
    """Let another run have the folder; where nothing was written to it, none is left."""
    lock.release()
    if {file.name for file in path.glob("*")} <= {".lock"}:
        (path / ".lock").unlink(missing_ok=True)
        path.rmdir()


def begin(path: Path, manifest: dict[str, Any], head: bytes) -> None:
    """Write what a cache has before its first shard: the manifest, unfinished, and the output layer, if there is one.

    Args:
        path: the folder, reserved.
        manifest: as it is at the start.
        head: content of the output layer's file, empty for none.
    """
    for leftover in path.glob(".*.safetensors.*"):  # of a run that was killed in the middle of a shard
        leftover.unlink()
    if not (path / MANIFEST).exists():
        write_manifest(path, manifest)
    if head and not ((path / HEAD).exists() and file_digest(path / HEAD) == digest(head)):
        write_file(path / HEAD, head)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write it to the folder, with its checksum."""
    sealed = {**manifest, "checksum": manifest_checksum(manifest)}
    write_file(path / MANIFEST, json.dumps(sealed, indent=2).encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file of the cache.

    Raises:
        UsageError: the disk is full.
    """
    try:
        with atomic_file(path) as file:
            file.write_bytes(content)
    except OSError as error:
        raise UsageError(
            f"cannot write {path} ({error.strerror}): make room and run the same command again, it goes on behind the "
            "last complete shard."
        ) from error
