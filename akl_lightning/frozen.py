"""Frozen weights of a named model are in that model's files, and need not be in checkpoints too."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.tensor import DTensor

from akl_lightning.errors import UsageError
from akl_lightning.teachers.fingerprint import tensor_digest

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule

LEFT_OUT = "left_out"
"""Under what a checkpoint has the digests of the weights that it does not have, by their names."""


class FrozenWeights:
    """Leaves frozen weights that were read from a name or folder out of checkpoints, and finds them again.

    What a run has trained, or has taken from a checkpoint that differs from the name's files, is not left out.

    Args:
        module: whose checkpoints they are.
        read: the ``id`` of each parameter that was read from there.
    """

    def __init__(self, module: "DistillationModule", read: set[int]) -> None:
        self.module = module
        parameters = module.named_parameters(remove_duplicate=False)  # as a state dict has tied ones
        self._names = {name for name, parameter in parameters if id(parameter) in read}
        self._digests: dict[str, str] | None = None
        """Of those that are frozen and as they were read, by their names; None before the first look."""

    def look(self) -> None:
        """Note what the weights are, while they are whole and in the precision in which they were read."""
        known = dict.fromkeys(self._names) if self._digests is None else self._digests
        self._digests = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if name in known and not parameter.requires_grad:
                digest = tensor_digest(parameter)
                if known[name] in (None, digest):
                    self._digests[name] = digest

    def leave_out(self, checkpoint: dict[str, Any]) -> None:
        """Take them out of a checkpoint that is to be written; called on all ranks."""
        trainer = self.module.trainer
        if not self._digests or isinstance(trainer.strategy, FSDPStrategy):  # which reads weights in its own way
            return
        trained = {
            id(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        left_out = {
            name: self._digests[name]
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
            if name in self._digests and not parameter.requires_grad and id(parameter) not in trained
        }
        for name in left_out:
            checkpoint["state_dict"].pop(name, None)
        if left_out:
            checkpoint[LEFT_OUT] = left_out

    def put_back(self, checkpoint: dict[str, Any]) -> None:
        """Fill in a checkpoint that was read what it leaves out, where that is whole here.

        Raises:
            UsageError: the weights here are others.
        """
        weights, left_out = checkpoint["state_dict"], checkpoint.get(LEFT_OUT, {})
        if self._digests is None and (left_out or not self._names.isdisjoint(weights)):
            self.look()
        digests, own = self._digests or {}, dict(self.module.named_parameters(remove_duplicate=False))
        if not left_out.keys() <= own.keys():  # another student altogether
            return
        for name, digest in left_out.items():
            if (digests.get(name) or tensor_digest(own[name])) != digest:
                raise UsageError(
                    "the checkpoint leaves out weights that were frozen, and the student's are others, they differ in "
                    f"{name.removeprefix('student.')}: give model.student as it was in that run; model.save_frozen "
                    "true keeps such weights in checkpoints."
                )
            if not isinstance(own[name], DTensor):
                weights[name] = own[name].detach()
        self._digests = {
            name: digest
            for name, digest in digests.items()
            if name in left_out or name not in weights or tensor_digest(weights[name]) == digest
        }
