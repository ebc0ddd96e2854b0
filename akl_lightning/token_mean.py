"""Sums over tokens become means over all response tokens of an optimizer step; a NaN or huge loss is noticed here.

What a step needs to know of itself, loss, tokens, and whether somebody wants to stop, is summed over micro-batches and
ranks on the device. The host reads it one step later on a GPU, so that the device has work while it is waited for.
"""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from akl_lightning.compat import multiply_all
from akl_lightning.criterion import CriterionOutput
from akl_lightning.errors import UsageError

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule

LARGEST_LOSS = 1e30
"""No sum of sensible losses comes near it."""


class MicroBatch(NamedTuple):
    """What is kept of a micro-batch until the optimizer steps."""

    batch_idx: int
    loss: Tensor
    cross_entropy: Tensor
    tokens: int


class Step(NamedTuple):
    """What is kept of an optimizer step until the host has read it."""

    number: int
    epoch: int
    micro_batches: list[MicroBatch]
    totals: Tensor
    """Loss, cross entropy, response tokens and requests to stop, summed over micro-batches and ranks; on the host."""
    arrived: torch.cuda.Event | None
    """When the totals have come from the device; None where they lie on the host anyway."""


class StepMean:
    """Counts the response tokens of an optimizer step and divides its gradients by them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, without what a run that was broken off has left."""
        self._micro_batches: list[MicroBatch] = []
        self._unread: list[Step] = []
        self._infinite: Step | None = None
        """The last step whose loss was infinite, though not of the student alone."""
        self._warned = False

    def __len__(self) -> int:
        """Micro-batches that no optimizer step has used yet."""
        return len(self._micro_batches)

    def add(self, batch_idx: int, loss: Tensor, cross_entropy: Tensor) -> None:
        """Count a micro-batch.

        Args:
            batch_idx: its number in the epoch.
            loss: a scalar, summed over its response tokens.
            cross_entropy: ``[tokens]``.
        """
        self._micro_batches.append(MicroBatch(batch_idx, loss.detach(), cross_entropy.sum(), cross_entropy.numel()))

    def close(self, module: "DistillationModule", batch_idx: int, closure: Callable[[], Any] | None) -> Any:
        """Run the last micro-batch of an optimizer step, then let the gradients be means; log the step's loss."""
        loss = closure() if closure is not None else None
        if loss is None:  # Lightning leaves a batch out for which training_step returns None
            self.leave_out(batch_idx)
        module.log("train/loss_step", self.average(module), prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def leave_out(self, batch_idx: int) -> None:
        """Count nothing of a micro-batch that gets no backward pass.

        Args:
            batch_idx: its number in the epoch.
        """
        self._micro_batches = [kept for kept in self._micro_batches if kept.batch_idx != batch_idx]

    def average(self, module: "DistillationModule") -> Tensor:
        """Turn the module's gradients, sums over each micro-batch, into means over the tokens of the step.

        Returns:
            The mean loss per response token, a scalar.
        """
        trainer, device = module.trainer, module.device
        micro_batches, self._micro_batches = self._micro_batches, []
        totals = torch.zeros(4, dtype=torch.float64, device=device)
        for micro_batch in micro_batches:
            totals[0].add_(micro_batch.loss)
            totals[1].add_(micro_batch.cross_entropy)
        # Filled on the device: a number that is copied there is waited for.
        totals[2].fill_(sum(micro_batch.tokens for micro_batch in micro_batches))
        totals[3].fill_(module.stop_requested)
        if trainer.world_size > 1:  # not the strategy's reduce, which waits at a barrier first
            torch.distributed.all_reduce(totals)
        step = Step(trainer.global_step, module.current_epoch, micro_batches, *_on_its_way_to_the_host(totals))
        self._unread.append(step)
        self.check(module, but_last=0 if step.arrived is None else 1)
        tokens = totals[2].clamp(min=1)
        # Lightning has divided each loss by the micro-batches of a step, and DDP and FSDP the sum by the ranks.
        factor = trainer.accumulate_grad_batches * trainer.world_size / tokens
        scale_([parameter.grad for parameter in module.parameters() if parameter.grad is not None], factor)
        return (totals[0] / tokens).float()

    def check(self, module: "DistillationModule", but_last: int = 0) -> None:
        """Read the steps done, note a wish to stop, and refuse to go on where a loss was NaN or beyond 1e30.

        A divergence may well be infinite, of a token that is masked on one side alone; it is said, once.

        The totals are the same on all ranks, so none waits for one that has stopped.

        Args:
            module: whose ``stop_agreed`` is set.
            but_last: how many steps to leave for later.

        Raises:
            UsageError: a loss was NaN or beyond 1e30.
        """
        while len(self._unread) > but_last:
            step = self._unread.pop(0)
            if step.arrived is not None:
                step.arrived.synchronize()
            loss, cross_entropy, _, stop = step.totals.tolist()
            module.stop_agreed |= stop > 0
            if math.isinf(loss):
                of_student = math.isinf(cross_entropy)
                self._infinite = None if of_student else step
                if not self._warned:
                    rank_zero_warn(_infinite(step, of_student))
                self._warned = True
            elif math.isnan(loss) or abs(loss) > LARGEST_LOSS:
                raise UsageError(_sentence(step, module, loss, cross_entropy, self._infinite))


def with_router_loss(output: CriterionOutput, router_loss: Tensor | None) -> CriterionOutput:
    """Add the loss of a mixture of experts' router to what a micro-batch costs.

    ``transformers`` adds it to a mean over tokens, so each response token of the micro-batch gets it here. It depends
    on which samples form a micro-batch, as it balances the experts over all of their tokens.

    Args:
        output: of the criterion.
        router_loss: a scalar, weighted; None of a model without one.
    """
    if router_loss is None:
        return output
    statistics, router_loss = output.statistics, router_loss.to(output.loss.dtype)
    of_token = router_loss.detach().expand_as(statistics["loss"])
    statistics = {**statistics, "loss": statistics["loss"] + of_token, "router_loss": of_token}
    return output._replace(loss=output.loss + len(of_token) * router_loss, statistics=statistics)


def scale_(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar that is not rounded to their precision.

    Args:
        gradients: of any floating dtype, sharded or not.
        factor: a scalar in float64.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        by_dtype.setdefault(local.dtype, []).append(local)
    for dtype, tensors in by_dtype.items():
        if dtype in (torch.float32, torch.float64):
            multiply_all(tensors, factor.to(dtype))
        else:
            # With a dimension it takes part in type promotion: the product is one of float32, rounded once.
            wide = factor.float().reshape(1)
            for tensor in tensors:
                (tensor if tensor.dim() else tensor.view(1)).mul_(wide)


def _on_its_way_to_the_host(totals: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not totals.is_cuda:
        return totals, None
    host = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=True).copy_(totals, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def _sentence(step: Step, module: "DistillationModule", loss: float, cross_entropy: float, before: Step | None) -> str:
    """Who gave a loss that is no number, and what to do."""
    what = "NaN" if math.isnan(loss) else f"{loss:.0e}"
    odd = [str(batch.batch_idx) for batch in step.micro_batches if not batch.loss.abs() <= LARGEST_LOSS]
    if abs(cross_entropy) <= LARGEST_LOSS:  # which knows no teacher
        culprit = f"the teacher gives {what}: look at that batch, or load the teacher in a wider precision"
    elif step.number > 0 and (optimizer := _dividing_by_zero(module.trainer.optimizers)) is not None:
        culprit = f"the optimizer made the student's weights NaN: {optimizer}"
    elif before is not None and before.number == step.number - 1:
        culprit = "the teacher made the loss infinite a step before: look for what it masks, or take ForwardKL"
    else:
        culprit = "the student diverged: look at that batch, lower the learning rate, or clip"
    return (
        f"the loss is {what} at optimizer step {step.number}, epoch {step.epoch}, batch "
        f"{', '.join(odd) or 'of another rank'}; {culprit}."
    )


def _infinite(step: Step, of_student: bool) -> str:
    return (
        f"the loss is infinite at optimizer step {step.number}, epoch {step.epoch}: "
        + (
            "the student gives no probability to a token of the data"
            if of_student
            else "teacher or student gives no probability to tokens that the other gives some; of a teacher that does, "
            "ForwardKL, JensenShannon and SkewKL are finite"
        )
        + ". Gradients leave such tokens out; this is said once."
    )


def _dividing_by_zero(optimizers: Iterable[Optimizer]) -> str | None:
    """Which optimizer's ``eps`` is 0 in the precision of its weights, and what to do; None where none is."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            eps = group.get("eps")
            if not isinstance(eps, float):
                continue
            for dtype in {parameter.dtype for parameter in group["params"]}:
                if not torch.tensor(eps, dtype=dtype):
                    return (
                        f"the eps of {type(optimizer).__name__}, {eps:g}, is 0 in {str(dtype).removeprefix('torch.')}, "
                        "and what has no gradient becomes 0 / 0; set trainer.precision to 16-mixed or bf16-true, or "
                        "model.optimizer.eps to 1e-4"
                    )
    return None
