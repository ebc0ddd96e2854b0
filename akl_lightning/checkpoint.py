"""Files that are either complete or not there, and what has to be in a checkpoint for an exact resume."""

import os
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from akl_lightning.errors import UsageError

_A_DAY = 24 * 60 * 60
"""Seconds after which nobody writes any more to a file of another machine."""


@contextmanager
def atomic_folder(path: Path, claimed: bool = False) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` complete, or not at all.

    The body writes to a temporary folder beside it, which is synced and then renamed. After an error nothing lies at
    ``path``, nor, unless it was claimed, after a crash.

    Args:
        path: the folder.
        claimed: an empty folder lies there, which :func:`claim_folder` has made.

    Raises:
        UsageError: something is at ``path`` already.

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with atomic_folder(Path(parent) / "model") as folder:
    ...         _ = (folder / "weights").write_text("1")
    ...     print([path.name for path in Path(parent).iterdir()])
    ['model']
    """
    if path.exists() and not claimed:
        raise UsageError(f"{path} exists already and is never overwritten: move it away or give another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for member in [*folder.rglob("*"), folder]:
            _sync(member)
        folder.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if claimed:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file that appears at ``path`` complete, in place of what was there, or not at all.

    The body writes to a temporary file beside it, which is synced and then renamed.

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with atomic_file(Path(parent) / "notes") as file:
    ...         _ = file.write_text("1")
    ...     print([path.name for path in Path(parent).iterdir()])
    ['notes']
    """
    _remove_leftovers(path)
    handle, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    os.close(handle)
    file = Path(name)
    try:
        yield file
        file.chmod(0o644)
        _sync(file)
        file.replace(path)
        _sync(path.parent)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _prefix(path: Path) -> str:
    """What a temporary name begins with: it says of whom it is."""
    return f".{path.name}.{socket.gethostname()}-{os.getpid()}."


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed have left of their work on a path; what may be at work stays."""
    owned = re.compile(re.escape(f".{path.name}.") + r"(?:(?P<host>.+)-(?P<process>\d+)\.)?[a-z0-9_]{8}")
    for leftover in path.parent.glob(f".{path.name}.*"):
        owner = owned.fullmatch(leftover.name)
        with suppress(OSError):  # another process removes it, too
            if owner is None:
                continue
            if owner["host"] == socket.gethostname():
                # In a container a new process often has the number of the old one.
                dead = int(owner["process"]) == os.getpid() or not _is_alive(int(owner["process"]))
            else:
                dead = leftover.is_file() and time.time() - leftover.stat().st_mtime > _A_DAY
            if dead and leftover.is_dir():
                shutil.rmtree(leftover)
            elif dead:
                leftover.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Raise :class:`UsageError` unless files can be written to a folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder.") from error


def free_path(path: Path) -> Path:
    """``path``, or the first of ``path-v1``, ``path-v2``, … that is not taken, as ModelCheckpoint names its files.

    A file keeps its suffix: ``figure-v1.png``.
    """
    candidate, version = path, 0
    stem, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")
    while candidate.exists():
        version += 1
        candidate = path.with_name(f"{stem}-v{version}{suffix}")
    return candidate


def claim_folder(path: Path) -> Path:
    """Make a folder at :func:`free_path`, one that no other process makes at the same time.

    Raises:
        UsageError: it cannot be made.
    """
    check_writable(path.parent)
    return _claim(path, Path.mkdir)


def claim_file(path: Path) -> Path:
    """Make an empty file at :func:`free_path`, one that no other process makes at the same time."""
    return _claim(path, partial(Path.touch, exist_ok=False))


def _claim(path: Path, make: Callable[[Path], None]) -> Path:
    while True:
        candidate = free_path(path)
        with suppress(FileExistsError):
            make(candidate)
            return candidate


# --------------------------------------------------------------------------------------------------------------------
# Lightning's checkpoints


def random_states() -> dict[str, Any]:
    """The states of all random number generators, as tensors and plain data."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on where :func:`random_states` was called.

    >>> states = random_states()
    >>> drawn = torch.rand(()), np.random.rand(), random.random()
    >>> set_random_states(states)
    >>> drawn == (torch.rand(()), np.random.rand(), random.random())
    True
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def key_by_name(optimizer: Optimizer, module: nn.Module) -> None:
    """Let the states that an optimizer gives and takes go by the names of parameters, not by their positions.

    So a state fits an optimizer whose groups are put together or ordered differently. Positions are taken, too.

    Args:
        optimizer: gets two hooks.
        module: whose parameters it updates.
    """

    if getattr(optimizer, "keyed_by_name", False):
        return

    def names(optimizer: Optimizer) -> list[str]:
        by_parameter = {parameter: name for name, parameter in module.named_parameters()}
        return [by_parameter[parameter] for group in optimizer.param_groups for parameter in group["params"]]

    def to_names(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        order = names(optimizer)
        groups = [{**group, "params": [order[index] for index in group["params"]]} for group in state["param_groups"]]
        return {"state": {order[index]: value for index, value in state["state"].items()}, "param_groups": groups}

    def to_positions(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        order = names(optimizer)
        if not all(isinstance(name, str) for group in state["param_groups"] for name in group["params"]):
            return state
        settings = {name: group for group in state["param_groups"] for name in group["params"]}
        if settings.keys() != set(order):
            odd = sorted(settings.keys() ^ set(order))[0]
            raise UsageError(
                f"checkpoint and optimizer disagree on {odd!r}: only one of them trains it; train the same parameters."
            )
        groups, start = [], 0
        for group in optimizer.param_groups:
            positions = list(range(start, start + len(group["params"])))
            start += len(positions)
            groups.append({**(settings[order[positions[0]]] if positions else group), "params": positions})
        return {
            "state": {index: state["state"][name] for index, name in enumerate(order) if name in state["state"]},
            "param_groups": groups,
        }

    optimizer.keyed_by_name = True  # type: ignore[attr-defined]
    optimizer.register_state_dict_post_hook(to_names)
    optimizer.register_load_state_dict_pre_hook(to_positions)
