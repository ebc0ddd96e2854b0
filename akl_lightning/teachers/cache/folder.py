"""The folder of a cache while it is written: of one run at a time, with files that are complete or not there."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from akl_lightning.checkpoint import atomic_file, check_writable
from akl_lightning.errors import UsageError
from akl_lightning.teachers.cache.format import (
    HEAD,
    MANIFEST,
    file_digest,
    identity,
    manifest_checksum,
    read_manifest,
)
from akl_lightning.teachers.fingerprint import digest


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
    differing = [name for name in theirs | ours if theirs.get(name, ("",))[0] != ours.get(name, ("",))[0]]
    if differing:
        said = " and ".join(
            f"{name} ({theirs.get(name, ('', 'none'))[1]} there, {ours.get(name, ('', 'none'))[1]} here)"
            for name in differing
        )
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
