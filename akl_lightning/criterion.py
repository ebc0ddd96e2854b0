"""What one batch costs: a divergence to the teacher mixed with the cross entropy of the data."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, final

import torch
from jsonargparse import lazy_instance
from torch import Tensor, nn

from akl_lightning import functional as F
from akl_lightning import kernels
from akl_lightning.divergences import AdaptiveKL, Divergence, known_divergences
from akl_lightning.errors import UsageError
from akl_lightning.kernels.classes import Classes, merge
from akl_lightning.kernels.classes import compare as compare_in_classes
from akl_lightning.kernels.pairs import STATISTICS as STATISTICS
from akl_lightning.kernels.pairs import Comparison, per_row
from akl_lightning.kernels.reference import rows_at_a_time
from akl_lightning.projection import Logits, Merged, Projection, TopLogProbs, project_and_compare


class CriterionOutput(NamedTuple):
    """What :class:`DistillationCriterion` returns."""

    loss: Tensor
    """Scalar: the *sum* over tokens, to be divided once by the tokens of the whole optimizer step."""

    statistics: dict[str, Tensor]
    """One float tensor ``[tokens]`` per name in :data:`STATISTICS`, detached."""


# Final, so that the command line reads its arguments in place: --model.criterion.alpha, not init_args.
@final
class DistillationCriterion(nn.Module):
    """``alpha * divergence + (1 - alpha) * cross_entropy``, summed over response positions.

    Products run in the model's precision, but logits are never rounded below float32, and all that follows has that at
    least. In float32, values are within ``1e-5 |value| + 1e-6`` of a dense float64 computation and gradients within
    1e-5 of their norm; in bfloat16 gradients are within 0.5 % of it. An output layer that is no plain ``nn.Linear``
    (LoRA on it, a hook) is the exception: its logits have the precision that it gives them.

    Args:
        divergence: compares student and teacher at each response position.
        alpha: weight of the divergence, in [0, 1]; with 0 no teacher is needed (supervised fine-tuning).
        temperature: softens both distributions before they are compared; the divergence is scaled by its square.
            Cross entropy is not softened.
        ignore_index: label of the positions that are no response positions.
        chunk_size: tokens whose logits exist at a time; None for as many as suit the device: on a CPU those with logits
            of 64 MiB, elsewhere 2,048, or fewer if their logits and gradients would take more than 3 GiB. It changes
            speed and memory, not the result.

    Raises:
        UsageError: a value out of its range, or a divergence that is none.

    >>> criterion = DistillationCriterion(alpha=1.0)
    >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> output = criterion(student, teacher, labels=torch.tensor([1]))
    >>> output.loss
    tensor(0.4621)
    >>> output.statistics["head_weight"]
    tensor([0.5000])
    """

    def __init__(
        self,
        divergence: Divergence = lazy_instance(AdaptiveKL),  # noqa: B008 (how jsonargparse wants a default)
        alpha: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(divergence, Divergence):
            raise UsageError(f"unknown divergence {divergence!r}: use one of {', '.join(known_divergences())}.")
        if any(parameter.requires_grad for parameter in divergence.parameters()):
            raise UsageError(
                f"{type(divergence).__name__} has trainable parameters, which get no gradient: freeze them, or add "
                "their loss in the training step."
            )
        F.check_fraction("alpha", alpha)
        F.check_temperature(temperature)
        if chunk_size is not None and chunk_size < 1:
            raise UsageError(
                f"chunk_size must be 1 or more, got {chunk_size}: leave it out for one that fits the memory."
            )
        self.divergence = divergence
        self.alpha = alpha
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.chunk_size = chunk_size

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss depends on a teacher."""
        return self.alpha > 0

    def response_positions(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Find the response positions, whose hidden states predict a labelled next token.

        To be asked before the batch goes to a GPU, which would have to be waited for.

        Args:
            labels: ``[batch, length]``, not shifted; ``ignore_index`` where nothing is to be learnt.

        Returns:
            Indices ``[tokens]`` into the batch's ``batch * length`` positions, and the labels that they predict,
            ``[tokens]``.

        >>> DistillationCriterion().response_positions(torch.tensor([[-100, -100, 5, 6], [7, -100, -100, 8]]))
        (tensor([1, 2, 6]), tensor([5, 6, 8]))
        """
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=self.ignore_index).flatten()
        positions = (following != self.ignore_index).nonzero().squeeze(-1)
        return positions, following[positions]

    def forward(
        self, student: Logits, teacher: Logits | None, labels: Tensor, alpha: Tensor | None = None
    ) -> CriterionOutput:
        """Compare at response positions.

        Args:
            student: logits ``[tokens, vocab]``, or hidden states and the head that projects them.
            teacher: likewise, or None with ``alpha = 0``; a :class:`~akl_lightning.projection.Merged` over another
                vocabulary, with which the divergence and all statistics but cross entropy's are those of the classes.
            labels: ``[tokens]``, the tokens of the data.
            alpha: ``[tokens]``, the weight of the divergence at each token, in [0, 1], in place of the criterion's own;
                the rest is that of cross entropy, which has it without a teacher, too. Where it is 0, whatever the
                teacher says there counts 0.

        Raises:
            UsageError: no teacher where one is needed, logits of whole sequences, or an ``alpha`` of another shape. On
                a CPU also an ``alpha`` out of its range, or of 1 without a teacher; elsewhere, where looking would wait
                for the device, the loss of such a token is NaN.
        """
        if alpha is not None:
            alpha = _checked(alpha, labels, teacher is None)
        elif teacher is None and self.needs_teacher:
            raise UsageError(f"alpha = {self.alpha} needs a teacher: give one, or set alpha to 0.")
        inner = teacher.logits if isinstance(teacher, Merged) else teacher
        if inner is not teacher and not isinstance(inner, Tensor | Projection):
            raise UsageError(
                "of a teacher over another vocabulary all logits are needed, lest its classes lack some of their mass: "
                "give its logits, or its hidden states and head."
            )
        if isinstance(teacher, TopLogProbs) and self.temperature != 1:
            raise UsageError(
                f"temperature = {self.temperature} softens a whole distribution, and of this teacher the likeliest "
                "tokens alone are known: set the temperature to 1, or give all of its logits."
            )
        for name, logits in (("student", student), ("teacher", inner)):
            if isinstance(logits, Tensor) and (logits.dim() != 2 or labels.dim() != 1):
                raise UsageError(
                    f"{name} logits {list(logits.shape)} with labels {list(labels.shape)}: pass logits [tokens, vocab] "
                    "and labels [tokens] of the response positions alone, which response_positions finds."
                )
        compare, per_token = self._compare, {} if alpha is None else {"alpha": alpha}
        if isinstance(teacher, Merged):
            teacher = replace(teacher, classes=teacher.classes.to(labels.device))
            compare = partial(self._compare, classes=teacher.classes)
        return CriterionOutput(*project_and_compare(student, teacher, labels, compare, self.chunk_size, **per_token))

    def _compare(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        gradient: Tensor | None,
        alpha: Tensor | None = None,
        classes: Classes | None = None,
    ) -> dict[str, Tensor]:
        """Compare a chunk; what only the student has among its outputs is padding, which it learns to avoid.

        Divergence and gaps are those of both distributions over the common outputs. Cross entropy is over all of the
        student's; where it has no weight, minus the log of the student's mass on the common ones takes its place.
        """
        d, of_divergence = self.divergence, self.alpha if alpha is None else alpha
        how = Comparison(d.pair, d.constant, of_divergence, self.temperature, d.mu, d.head_rule)
        if teacher is None:
            return kernels.compare(student, teacher, labels, how, gradient)
        compare = kernels.compare if how.pair is not None else self._compare_by_autograd
        if classes is not None:
            return compare_in_classes(student, teacher, labels, how, classes, gradient, compare)
        if student.shape == teacher.shape:
            return compare(student, teacher, labels, how, gradient)
        common = teacher.shape[1]
        log_common = student[:, :common].logsumexp(-1)
        apart = student[:, common:].logsumexp(-1) - log_common
        minus_log_mass = torch.nn.functional.softplus(apart, threshold=80)
        weight = (1 - per_row(how.alpha, student)).to(apart.dtype)
        weight.masked_fill_(weight == 0, 1.0)
        if gradient is not None:  # before the logits are overwritten
            of_common = student[:, :common].softmax(-1) * (-weight * apart.sigmoid())[:, None]
            of_others = (student[:, common:] - (log_common + minus_log_mass)[:, None]).exp()
            of_others *= weight[:, None]
        into = None if gradient is None else gradient[:, :common]
        part = compare(student[:, :common], teacher, labels, how, into)
        if gradient is not None:
            gradient[:, :common] += of_common
            gradient[:, common:] = of_others
        loss, cross_entropy = part["loss"] + weight * minus_log_mass, part["cross_entropy"] + minus_log_mass
        return {**part, "loss": loss, "cross_entropy": cross_entropy}

    @torch.no_grad()
    def distributions(self, student: Logits, teacher: Logits, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both distributions, softened: probabilities ``[tokens, vocab]`` of student and teacher, to look at.

        With a :class:`~akl_lightning.projection.Merged` teacher they are those of the classes, ``[tokens, classes]``.
        """
        pairs: list[tuple[Tensor, ...]] = []
        t, classes = self.temperature, teacher.classes.to(labels.device) if isinstance(teacher, Merged) else None

        def keep(student: Tensor, teacher: Tensor | None, labels: Tensor, **_: Any) -> dict[str, Tensor]:
            assert teacher is not None
            if classes is not None:
                merge(student, classes.student, classes, t, False)
                merge(teacher, classes.teacher, classes, t, False)
                sides = (logits[:, : classes.width] for logits in (student, teacher))
                pairs.append(tuple(classes.by_number(F.log_probs(logits, t).exp()) for logits in sides))
                return {"loss": labels}
            student = student[:, : teacher.shape[1]]
            pairs.append((F.log_probs(student, t).exp(), F.log_probs(teacher, t).exp()))
            return {"loss": labels}

        project_and_compare(student, teacher, labels, keep, self.chunk_size)
        of_student, of_teacher = (torch.cat(side) for side in zip(*pairs, strict=True))
        return of_student, of_teacher

    def _compare_by_autograd(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        how: Comparison,
        gradient: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As the kernels do, with a divergence that gives its value alone; ``student`` is overwritten.

        Some rows at a time: what autograd keeps of them is several times their logits.
        """
        rows, t, parts, alphas = rows_at_a_time(student), self.temperature, [], per_row(how.alpha, student)
        for start in range(0, max(1, len(student)), rows):
            block = slice(start, start + rows)
            logits, alpha = student[block], alphas[block]
            log_q, log_p = F.log_probs(logits, t), F.log_probs(teacher[block], t).to(logits.dtype)
            with torch.set_grad_enabled(gradient is not None):
                value = self.divergence.compare(log_q.requires_grad_(gradient is not None), log_p)
            own, into = t**2 * value.detach(), None if gradient is None else logits
            part = kernels.compare(logits, teacher[block], labels[block], how._replace(alpha=alpha), into)
            loss = F.weighted(alpha.to(logits.dtype), own) + part["loss"]
            parts.append({**part, "loss": loss, "divergence": own})
            if gradient is not None:
                (of_log_q,) = torch.autograd.grad(value, log_q, torch.ones_like(value))
                slope = of_log_q - log_q.detach().exp() * of_log_q.sum(-1, keepdim=True)
                # By the chain rule, t² times the divergence of logits / t has t times the gradient.
                scale = (alpha * t).to(logits.dtype)[:, None]
                logits.addcmul_(slope.masked_fill_(scale == 0, 0.0), scale)
                gradient[block].copy_(logits)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _checked(alpha: Tensor, labels: Tensor, alone: bool) -> Tensor:
    """Weights that are none are refused, on a CPU; elsewhere they are NaN, whom nobody needs to wait for."""
    if alpha.shape != labels.shape or not alpha.is_floating_point():
        raise UsageError(
            f"alpha {list(alpha.shape)} of {alpha.dtype} with labels {list(labels.shape)}: give one float a token."
        )
    wrong = ~((alpha >= 0) & (alpha < 1 if alone else alpha <= 1))
    if alpha.device.type != "cpu":
        return alpha.masked_fill(wrong, torch.nan)
    if wrong.any():
        value, without = alpha[wrong][0].item(), ", and below 1 without a teacher" if alone else ""
        raise UsageError(f"alpha must lie in [0, 1]{without}, got {value} at one of the tokens.")
    return alpha
