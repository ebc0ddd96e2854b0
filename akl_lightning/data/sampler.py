"""Which samples make up an optimizer step, and which rank gets which of them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

FILLER = -1
"""Index of a row without any response token, which fills up a rank that would otherwise have none."""

_STEPS_PER_POOL = 32


def accumulated(trainer: "Trainer", epoch: int) -> int:
    """Micro-batches of an optimizer step in an epoch, which a ``GradientAccumulationScheduler`` may change."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


# A DistributedSampler, so that Lightning leaves it alone on several devices and calls set_epoch.
class StepSampler(DistributedSampler):
    """Draw each optimizer step's samples first, then deal them to micro-batches and ranks.

    Which samples form a step depends on the seed, the epoch and ``step_size`` alone, not on how they are dealt.
    Lengths are grouped by sorting pools of some steps. No sample is ever repeated: where the last samples do not go
    round, ranks get :data:`FILLER`.

    Args:
        lengths: of the samples, in tokens.
        batch_size: samples of one micro-batch on one rank.
        step_size: samples of one optimizer step over all micro-batches and ranks; a multiple of ``batch_size`` times
            ``num_replicas``. Or what gives that number for an epoch.
        num_replicas: ranks.
        rank: this one.
        shuffle: draw the samples at random.
        group_by_length: let samples of a step be of similar length.
        seed: of the draw, together with the epoch.

    >>> [list(StepSampler([1, 2, 3, 4, 5], 1, 2, 2, rank, shuffle=False)) for rank in (0, 1)]
    [[0, 2, 4], [1, 3, -1]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        step_size: int | Callable[[int], int],
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        group_by_length: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.step_size = step_size
        self.group_by_length = group_by_length

    def __len__(self) -> int:
        """Indices per rank, fillers included."""
        return -(-len(self.lengths) // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        for step in self._steps():
            # Micro-batches take the samples in turn; within one, ranks do: shorter and longer rows for everybody.
            for start in range(0, len(step), self.batch_size * self.num_replicas):
                micro_batch = step[start : start + self.batch_size * self.num_replicas]
                share = micro_batch[self.rank :: self.num_replicas].tolist()
                fill = -(-len(micro_batch) // self.num_replicas) - len(share)
                yield from share + [FILLER] * fill

    def _steps(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(_seed_of(self.seed, self.epoch))
        count = len(self.lengths)
        step_size = self.step_size if isinstance(self.step_size, int) else self.step_size(self.epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        if not self.group_by_length:
            return list(order.split(step_size))
        pools = order.split(step_size * _STEPS_PER_POOL) if self.shuffle else (order,)
        steps = [step for pool in pools for step in pool[self.lengths[pool].argsort(stable=True)].split(step_size)]
        if self.shuffle:
            # Only the last step may be short: a short one in between would end an accumulation window too early.
            full = len(steps) - (len(steps[-1]) < step_size)
            steps = [steps[index] for index in torch.randperm(full, generator=generator)] + steps[full:]
        return steps


def _seed_of(seed: int, epoch: int) -> int:
    """Their sum would give the second epoch of one seed the order of the first epoch of the next."""
    return int.from_bytes(hashlib.sha256(f"{seed}, {epoch}".encode()).digest()[:8], "big")
