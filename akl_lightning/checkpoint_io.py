"""Checkpoints as the Trainer writes and reads them: complete or not there, and never code."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from akl_lightning.checkpoint import atomic_file
from akl_lightning.errors import UsageError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, and read them without running what is in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the target, sync, then replace it.

        Raises:
            UsageError: it cannot be written; one that was there before stays.
        """
        if storage_options is not None or "://" in str(path):  # no local file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # A failed write makes torch fail once more as it closes its archive; the first error says why.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            kept = "; the one that was there before is untouched" if target.exists() else ""
            raise UsageError(
                f"cannot write {path}: {cause.strerror or cause}{kept}. Make room or choose another place, and go on "
                "from the last checkpoint."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, with ``weights_only=True`` unless it is turned off.

        Raises:
            UsageError: it is damaged, or no checkpoint; an older one that is good is named.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only is not False)
        checkpoint, fault = _read(Path(path), map_location, weights_only is not False)
        if checkpoint is None:
            others = sorted(Path(path).parent.glob("*.ckpt"), key=_written, reverse=True)
            good = next((other for other in others if other != Path(path) and _read(other)[0] is not None), None)
            way_out = "give another ckpt_path" if good is None else f"go on from {good}, which is complete"
            raise UsageError(f"the checkpoint {path} {fault}: {way_out}.")
        return checkpoint


def _read(path: Path, map_location: Any = "cpu", weights_only: bool = True) -> tuple[dict[str, Any] | None, str]:
    """The checkpoint, or None and what is wrong with it."""
    if not path.is_file():
        return None, "is no file"
    try:
        checkpoint = torch.load(path, map_location, weights_only=weights_only, mmap=True)
    except pickle.UnpicklingError:
        return None, "holds more than tensors and plain data, and code in a checkpoint is never run"
    except OSError:
        raise
    except Exception:  # whatever a flipped bit makes of a pickle
        return None, "is damaged, cut off or no checkpoint"
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        return None, "is no checkpoint of Lightning"
    return checkpoint, ""


def newest_checkpoint(root: Path, folders: Iterable[Path]) -> Path:
    """The checkpoint to go on from in the run that wrote one last: its ``last.ckpt``, or else its newest.

    Args:
        root: where the folders lie, for the error.
        folders: one of each run, with ``*.ckpt``.

    Raises:
        UsageError: there is none.
    """
    runs = [found for folder in folders if (found := list(folder.glob("*.ckpt")))]
    if not runs:
        raise UsageError(
            f"there is no checkpoint to go on from in {root}: give the path of one, or leave --ckpt_path out to begin "
            "anew."
        )
    run = max(runs, key=lambda found: max(map(_written, found)))
    # Any other may have been written in the middle of an optimizer step, or before the loggers were flushed.
    return max(run, key=lambda path: (path.stem.startswith("last"), _written(path)))


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns
