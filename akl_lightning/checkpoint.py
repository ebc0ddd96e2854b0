"""Files that are either complete or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from akl_lightning.errors import UsageError


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` complete, or not at all.

    The body writes to a temporary folder beside it, which is synced and then renamed. After an error or a crash
    nothing lies at ``path``.

    Raises:
        UsageError: something is at ``path`` already.

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with atomic_folder(Path(parent) / "model") as folder:
    ...         _ = (folder / "weights").write_text("1")
    ...     print([path.name for path in Path(parent).iterdir()])
    ['model']
    """
    if path.exists():
        raise UsageError(f"{path} exists already and is never overwritten: move it away or give another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for member in [*folder.rglob("*"), folder]:
            _sync(member)
        folder.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_path(path: Path) -> Path:
    """``path``, or the first of ``path-v1``, ``path-v2``, … that is not taken, as ModelCheckpoint names its files."""
    candidate, version = path, 0
    while candidate.exists():
        version += 1
        candidate = path.with_name(f"{path.name}-v{version}")
    return candidate
