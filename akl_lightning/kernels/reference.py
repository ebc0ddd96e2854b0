"""The comparison in plain torch: what runs on a CPU, and on a GPU for whatever the kernel does not take.

A pass over a large vocabulary is what it costs, so it works in memory that is kept from pass to pass, on as many rows
as stay in a CPU's caches. The head's end is searched among the few largest probabilities; nothing is sorted.
"""

import torch
from torch import Tensor

from akl_lightning import functional as F
from akl_lightning.head_tail import head_size, membership
from akl_lightning.kernels import pairs
from akl_lightning.kernels.pairs import MIXES, PAIRS, STATISTICS, Comparison, per_row

_CACHE_BYTES = 2**21
"""On a CPU, logits are compared in blocks of rows of this size, which stay in its caches from pass to pass."""

_DEVICE_BYTES = 2**26
"""The same elsewhere, where it bounds the memory alone."""

_NEAR = 0.002
"""FKL per token below which rounding would take more than 1e-5 of the divergence's gradient in float32."""

# The head of a real language model is a few tokens: a 135M instruction model on real text, 25 at the 99th percentile.
_FIRST_TOP_K = 32
_WIDEN_BY = 16
_GROUP = 64


def rows_at_a_time(logits: Tensor) -> int:
    """How many rows of ``logits`` suit the device."""
    size = _CACHE_BYTES if logits.device.type == "cpu" else _DEVICE_BYTES
    return max(1, size // (logits.element_size() * logits.shape[-1]))


@torch.no_grad()
def compare(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    how: Comparison,
    gradient: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compare student and teacher at every row.

    Args:
        student: logits ``[rows, vocab]`` in float32 or float64; overwritten.
        teacher: likewise; None for the cross entropy of the student alone.
        labels: ``[rows]``, int64.
        how: what is compared.
        gradient: gets the gradient of the summed loss with respect to the student's logits, ``[rows, vocab]`` in any
            float dtype; may be ``student``. None where none is wanted.

    Returns:
        Statistics ``[rows]`` by name: ``loss``, ``divergence``, ``cross_entropy``, ``fkl``, ``rkl``, ``head_gap``,
        ``tail_gap``, ``head_weight``, ``top1_agreement``; without a teacher ``loss`` and ``cross_entropy`` alone.
        ``divergence`` is 0, and has no part in the loss and the gradient, where ``how`` names none.
    """
    count, rows, alpha = len(student), rows_at_a_time(student), per_row(how.alpha, student)
    buffers = 0 if teacher is None else 3 if how.temperature == 1 else 4
    scratch = student.new_empty((buffers, min(rows, count), student.shape[1]))
    parts: list[dict[str, Tensor]] = []
    for start in range(0, max(1, count), rows):
        block = slice(start, min(start + rows, count))
        into = None if gradient is None else gradient[block]
        if teacher is None:
            parts.append({"cross_entropy": _cross_entropy(student[block], labels[block], alpha[block], into)})
        else:
            memory, others = scratch[:, : block.stop - start], teacher[block].to(student.dtype)
            values = _compare(student[block], others, labels[block], how, alpha[block], into, memory)
            parts.append(dict(zip(STATISTICS[1:], values, strict=True)))
    statistics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # No plain products: zero times infinity is zero here, a weight of 0 switches its part off.
    loss = F.weighted((1 - alpha).to(student.dtype), statistics["cross_entropy"])
    if teacher is not None:
        loss += F.weighted(alpha.to(student.dtype), statistics["divergence"])
    return {"loss": loss, **statistics}


def _cross_entropy(student: Tensor, labels: Tensor, alpha: Tensor, gradient: Tensor | None) -> Tensor:
    at_label = _at_label(student, labels)
    largest = student.amax(-1, keepdim=True)
    probs = student.sub_(largest).exp_()
    total = probs.sum(-1, keepdim=True)
    if gradient is not None:
        weight = (1 - alpha).to(student.dtype)[:, None]
        into = torch.div(probs, total / weight, out=_writable(gradient, probs))
        _finish(into, labels, weight, gradient)
    return (largest.squeeze(-1) - at_label) + total.squeeze(-1).log()


def _compare(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    how: Comparison,
    alpha: Tensor,
    gradient: Tensor | None,
    scratch: Tensor,
) -> tuple[Tensor, ...]:
    """The statistics of a few rows but the loss, in the order of :data:`STATISTICS`."""
    t = how.temperature
    p, q, product = scratch[:3]
    at_label = _at_label(student, labels)
    # Only where there are masks, or worse, is their arithmetic paid for.
    regular = not student.numel() or bool((torch.stack([student.amin(), teacher.amin()]) > F.LOWEST).all())
    if not regular:
        student.masked_fill_(student <= F.LOWEST, -torch.inf)
        teacher.masked_fill_(teacher <= F.LOWEST, -torch.inf)
    unsoftened = q if t == 1 else scratch[3]
    largest_s, top_q = _softmax(student, unsoftened)
    cross_entropy = (largest_s.squeeze(-1) - at_label) - top_q.squeeze(-1).log()
    if t != 1:
        student.div_(t)
        teacher.div_(t)
        largest_s, top_q = _softmax(student, q)
    largest_t, top_p = _softmax(teacher, p)

    nowhere = None if regular else (student == -torch.inf) & (teacher == -torch.inf)
    shift = largest_t - largest_s
    # Logits of one side may all be far from those of the other: then, and only then, both are first brought near 0.
    if (apart := shift.abs() > 8).any():
        centers = [(largest / 8).round() * 8 * apart for largest in (largest_t, largest_s)]
        teacher.sub_(centers[0])
        student.sub_(centers[1])
        shift = (largest_t - centers[0]) - (largest_s - centers[1])
    ratio = teacher.sub_(student).add_((top_p / top_q).log_() - shift)
    if nowhere is None:
        fkl = torch.mul(p, ratio, out=product).sum(-1)
        rkl = torch.mul(q, ratio, out=product).sum(-1).neg_()
    else:
        ratio.masked_fill_(nowhere, 0.0)
        fkl, rkl = (pair(ratio, p, q, 1.0, 1.0)[0].sum(-1) for pair in (pairs.forward_kl, pairs.reverse_kl))

    head_gap, tail_gap, top = _gaps(torch.sub(p, q, out=product).abs_(), p, how)
    agreement = (q.gather(-1, top[:, None]) == top_q).squeeze(-1).to(q.dtype)
    a, b = pairs.weights(how, head_gap, tail_gap)
    slope: Tensor | None = None
    # So near its teacher a student gets a gradient whose digits are worth more passes; cross entropy's would hide them.
    near = bool(fkl[alpha == 1].sum() < _NEAR * (alpha == 1).sum())
    if how.pair is None:
        divergence = torch.zeros_like(fkl)
    elif how.pair in MIXES and regular and not near:
        divergence = t**2 * (F.weighted(a, fkl) + F.weighted(b, rkl))
    else:
        g, slope = PAIRS[how.pair](ratio, p, q, _per_row(a), _per_row(b))
        divergence = t**2 * g.sum(-1)

    if gradient is not None:
        into = _writable(gradient, ratio)
        # By the chain rule, t² times the divergence of logits / t has t times the gradient.
        scale, weight = (part.to(student.dtype)[:, None] for part in (alpha * t, 1 - alpha))
        if how.pair is None or not alpha.any():
            torch.mul(unsoftened, weight, out=into)
        elif slope is not None:
            slope.addcmul_(q, slope.sum(-1, keepdim=True), value=-1).mul_(scale)
            torch.addcmul(slope, unsoftened, weight, out=into)
        else:
            # FKL's gradient is q - p, RKL's is q * (-ratio - RKL).
            of_fkl, of_rkl = scale * _per_row(a), scale * _per_row(b)
            ratio.mul_(-of_rkl).add_(of_fkl - of_rkl * rkl[:, None] + (weight if t == 1 else 0)).mul_(q)
            torch.addcmul(ratio, p, of_fkl, value=-1, out=into)  # type: ignore[arg-type]  # weights of mixes are tensors
            if t != 1:
                into.addcmul_(unsoftened, weight)
        if (off := alpha == 0).any():  # zero times anything is 0
            into[off] = unsoftened[off]
        _finish(into, labels, weight, gradient)
    head_weight = F.head_weight(head_gap, tail_gap)
    return divergence, cross_entropy, fkl, rkl, head_gap, tail_gap, head_weight, agreement


def _per_row(weight: Tensor | float) -> Tensor | float:
    return weight[:, None] if isinstance(weight, Tensor) else weight


def _at_label(logits: Tensor, labels: Tensor) -> Tensor:
    at_label = logits.gather(-1, labels[:, None]).squeeze(-1)
    return at_label.masked_fill_(at_label <= F.LOWEST, -torch.inf)


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``out``; the largest logit and the largest probability, each ``[rows, 1]``.

    One exponential serves all: the largest probability is 1 over the sum of ``exp(logit - largest logit)``.
    """
    torch.softmax(logits, dim=-1, out=out)
    return logits.amax(-1, keepdim=True), out.amax(-1, keepdim=True)


def _writable(gradient: Tensor, scratch: Tensor) -> Tensor:
    """Where to compute the gradient: at its place, unless that has another precision."""
    return gradient if gradient.dtype == scratch.dtype else scratch


def _finish(result: Tensor, labels: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Take the weight of cross entropy off at the label, the rest of its gradient, and hand the result over."""
    result.scatter_(-1, labels[:, None], result.gather(-1, labels[:, None]) - weight)
    if result is not gradient:
        gradient.copy_(result)


# --------------------------------------------------------------------------------------------------------------------
# Head and tail


def _gaps(gap: Tensor, p: Tensor, how: Comparison) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps ``[rows, vocab]`` summed over head and tail (what the head leaves of the total), and the top tokens.

    Looks at the k largest probabilities of every row, k small, and again with a larger k at the rows whose head may
    reach beyond them, up to the whole vocabulary.
    """
    total = gap.sum(-1)
    if how.mu == 1:  # every token with mass; adding it up would end early by rounding, or never
        head, top = (gap * (p > 0)).sum(-1), p.argmax(-1)
        return head, (total - head).clamp_(min=0), top
    count, vocab = p.shape
    head, top = torch.empty_like(total), torch.empty(count, dtype=torch.long, device=p.device)
    rows, k = torch.arange(count, device=p.device), min(_FIRST_TOP_K, vocab)
    while rows.numel():
        probs, gaps = (p, gap) if rows.numel() == count else (p[rows], gap[rows])
        values, tokens = _largest(probs, k)
        size = head_size(values, how.mu, how.head_rule)
        head[rows] = (gaps.gather(-1, tokens) * membership(values, values, size)).sum(-1)
        top[rows] = tokens[:, 0]
        if k == vocab:
            break
        beyond = size.squeeze(-1) == k
        tied = ~beyond & (values[:, -1:] == values.gather(-1, size - 1)).squeeze(-1)
        if tied.any():  # there may be more that tie than these k
            members = membership(probs[tied], values[tied], size[tied])
            head[rows[tied]] = (gaps[tied] * members).sum(-1)
        rows = rows[beyond]
        k = min(k * _WIDEN_BY, vocab)
    return head, (total - head).clamp_(min=0), top


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``values.topk(k)``, which looks into those groups of columns alone whose maxima are among the k largest."""
    rows, columns = values.shape
    groups = columns // _GROUP
    if k * 4 > groups:
        return values.topk(k, dim=-1)
    # A group is every groups-th column: their maximum is then one vectorised pass over whole rows.
    maxima = values[:, : groups * _GROUP].view(rows, _GROUP, groups).amax(1)
    members = (
        maxima.topk(k, sorted=False).indices[:, None] + groups * torch.arange(_GROUP, device=values.device)[:, None]
    )
    left_over = torch.arange(groups * _GROUP, columns, device=values.device).expand(rows, -1)
    candidates = torch.cat([members.flatten(1), left_over], dim=-1)
    largest, places = values.gather(-1, candidates).topk(k, dim=-1)
    return largest, candidates.gather(-1, places)
