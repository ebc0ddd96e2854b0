"""Divergences between a teacher's and a student's next-token distributions, as pure functions of their logits.

Every divergence takes logits of shape ``[..., vocab]`` and returns one value in nats per token, shape ``[...]``. It
is differentiable in the student's logits only. Softmax, logarithms and sums run in at least float32; float64 stays
float64. With ``temperature`` t both distributions are softened by t and the value is scaled by t², so that the size of
the gradient does not depend on t (Hinton et al. 2015, arXiv 1503.02531).

A token that is masked (logit ``-inf``) on both sides counts 0. One that is masked on one side and carries mass on the
other makes FKL or RKL ``+inf``, with a finite gradient. A zero weight times anything is 0.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from akl_lightning.errors import UsageError

HeadRule = Literal["cover", "within"]

# The head of a real language model is a few tokens: a 135M instruction model on real text, 25 at the 99th percentile.
_FIRST_TOP_K = 32
_WIDEN_BY = 16
_GROUP = 64


def check_temperature(temperature: float) -> None:
    """Raise :class:`UsageError` unless ``temperature`` is a positive finite number."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"temperature must be a positive number, got {temperature}: use 1.0 for no softening.")


def check_head(mu: float, head_rule: str) -> None:
    """Raise :class:`UsageError` unless ``mu`` lies in (0, 1] and ``head_rule`` is known."""
    if not 0 < mu <= 1:
        raise UsageError(f"mu must lie in (0, 1], got {mu}: it is the teacher mass that the head covers, 0.5 usually.")
    if head_rule not in get_args(HeadRule):
        raise UsageError(f"head_rule must be one of {', '.join(get_args(HeadRule))}, got {head_rule!r}.")


def check_fraction(name: str, value: float, *, open_ends: bool = False) -> None:
    """Raise :class:`UsageError` unless ``value`` lies in [0, 1], or in (0, 1) with ``open_ends``."""
    if not (0 < value < 1 if open_ends else 0 <= value <= 1):
        raise UsageError(f"{name} must lie in {'(0, 1)' if open_ends else '[0, 1]'}, got {value}.")


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of softened logits in at least float32.

    Args:
        logits: ``[..., vocab]``, any floating dtype.
        temperature: positive; the logits are divided by it.

    Returns:
        ``[..., vocab]`` in float32, or float64 where the logits are.
    """
    check_temperature(temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _pair(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student_logits.shape != teacher_logits.shape:
        raise UsageError(
            f"student logits {list(student_logits.shape)} and teacher logits {list(teacher_logits.shape)} differ in "
            "shape: both must be [..., vocab] over the same tokens and the same vocabulary."
        )
    return log_probs(student_logits, temperature), log_probs(teacher_logits.detach(), temperature)


# --------------------------------------------------------------------------------------------------------------------
# Head and tail


def _head_levels(
    teacher_probs: Tensor, mu: float, head_rule: HeadRule
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Find the head of each row without sorting the vocabulary.

    Looks at the k largest probabilities of every row, k small, and again with a larger k at the rows whose head may
    reach beyond them, up to the whole vocabulary. Yields ``(rows [n], top token [n], tokens [n, k], in_head [n, k])``;
    each row comes exactly once.
    """
    check_head(mu, head_rule)
    count, vocab = teacher_probs.shape
    rows = torch.arange(count, device=teacher_probs.device)
    if mu == 1:  # every token with mass; adding it up would end early by rounding, or never
        every = torch.arange(vocab, device=rows.device).expand(teacher_probs.shape)
        yield rows, teacher_probs.argmax(-1), every, teacher_probs > 0
        return
    k = _FIRST_TOP_K
    while rows.numel():
        probs = teacher_probs if rows.numel() == count else teacher_probs[rows]
        values, tokens = _largest(probs, min(k, vocab))
        mass = values.double()
        until = mass.cumsum(-1)
        if head_rule == "cover":
            in_head = until - mass < mu
        else:
            in_head = until <= mu
            in_head[:, 0] = True
        in_head &= values > 0  # a token without mass never belongs to the head
        # The last of them, where it is not in the head, shows whether the head's last token ties with one outside.
        tied = ((in_head[:, :-1] ^ in_head[:, 1:]) & (values[:, :-1] == values[:, 1:])).any(-1)
        beyond = in_head[:, -1] & (k < vocab)
        plain = ~(tied | beyond)
        if plain.all():
            yield rows, tokens[:, 0], tokens, in_head
            return
        yield rows[plain], tokens[plain, 0], tokens[plain], in_head[plain]
        if tied.any():
            # top-k breaks ties as it likes; the head takes the lowest indices among equals.
            last = values[tied].masked_fill(~in_head[tied], torch.inf).amin(-1, keepdim=True)
            members = _break_ties(probs[tied], last, in_head[tied].sum(-1, keepdim=True))
            every = torch.arange(vocab, device=tokens.device).expand(members.shape)
            yield rows[tied], tokens[tied, 0], every, members
        rows = rows[beyond]
        k *= _WIDEN_BY


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


def _break_ties(probs: Tensor, last: Tensor, size: Tensor) -> Tensor:
    above, equal = probs > last, probs == last
    missing = size - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))


def head_mask(teacher_probs: Tensor, mu: float = 0.5, head_rule: HeadRule = "cover") -> Tensor:
    """Which tokens form the head of the teacher's distribution.

    ``cover`` (the paper): the smallest set of tokens, in descending probability, whose mass is at least ``mu``; the
    token that crosses ``mu`` belongs to it. ``within`` (the authors' published code): the largest such set whose mass
    is at most ``mu``, and always the top token. Equals go by the lowest index. Mass is added up in float64.

    Args:
        teacher_probs: ``[..., vocab]``, each row a distribution.
        mu: mass of the head, in (0, 1].
        head_rule: ``cover`` or ``within``.

    Returns:
        Boolean ``[..., vocab]``, True in the head. Every other token is the tail.

    Raises:
        UsageError: ``mu`` outside (0, 1] or an unknown ``head_rule``.

    Source: arXiv 2404.02657.

    >>> p = torch.tensor([0.1, 0.4, 0.3, 0.2])
    >>> head_mask(p).tolist()
    [False, True, True, False]
    >>> head_mask(p, head_rule="within").tolist()
    [False, True, False, False]
    """
    flat = teacher_probs.reshape(-1, teacher_probs.shape[-1])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    for rows, _, tokens, in_head in _head_levels(flat, mu, head_rule):
        mask[rows] = mask.new_zeros(rows.numel(), flat.shape[-1]).scatter_(-1, tokens, in_head)
    return mask.reshape(teacher_probs.shape)


def head_tail_gap(
    student_probs: Tensor, teacher_probs: Tensor, mu: float = 0.5, head_rule: HeadRule = "cover"
) -> tuple[Tensor, Tensor]:
    """Where student and teacher still differ: ``abs(p - q)`` summed over head and tail.

    Args:
        student_probs: ``[..., vocab]``.
        teacher_probs: ``[..., vocab]``; its head and tail count, see :func:`head_mask`.
        mu: mass of the head, in (0, 1].
        head_rule: ``cover`` or ``within``.

    Returns:
        ``(head_gap, tail_gap)``, each ``[...]``, between 0 and 2 together; detached.

    Source: arXiv 2404.02657.

    >>> p, q = torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.25, 0.25])
    >>> [round(gap.item(), 4) for gap in head_tail_gap(q, p)]
    [0.2, 0.2]
    """
    shape = teacher_probs.shape[:-1]
    p = teacher_probs.detach().reshape(-1, teacher_probs.shape[-1])
    gap = (p - student_probs.detach().reshape(p.shape)).abs_()
    head, tail, _ = _head_tail(gap, p, mu, head_rule)
    return head.reshape(shape), tail.reshape(shape)


def _head_tail(gap: Tensor, teacher_probs: Tensor, mu: float, head_rule: HeadRule) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps ``[tokens, vocab]`` summed over head and tail (what the head leaves of the total), and the top tokens."""
    total = gap.sum(-1)
    head, top = torch.empty_like(total), torch.empty(len(gap), dtype=torch.long, device=gap.device)
    for rows, first, tokens, in_head in _head_levels(teacher_probs, mu, head_rule):
        picked = gap.gather(-1, tokens) if rows.numel() == len(gap) else gap[rows[:, None], tokens]
        head[rows] = (picked * in_head).sum(-1)
        top[rows] = first
    return head, (total - head).clamp_(min=0), top


def head_weight(head_gap: Tensor, tail_gap: Tensor) -> Tensor:
    """The weight AKL gives to FKL: ``head_gap / (head_gap + tail_gap)``; RKL gets 1 minus it.

    Where both gaps are 0 nothing is left to learn; the weight is then given as 0.5.

    Args:
        head_gap: ``[...]``.
        tail_gap: ``[...]``.

    Source: arXiv 2404.02657.

    >>> head_weight(torch.tensor([0.3, 0.0]), torch.tensor([0.1, 0.0]))
    tensor([0.7500, 0.5000])
    """
    total = head_gap + tail_gap
    # Unequal to 0, not above it: NaN has to stay NaN, so that it is noticed.
    return torch.where(total != 0, head_gap / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)


def adaptive_weights(head_gap: Tensor, tail_gap: Tensor) -> tuple[Tensor, Tensor]:
    """The weights AKL gives to FKL and to RKL, each ``[...]``: both 0 where the distributions are equal.

    Args:
        head_gap: ``[...]``.
        tail_gap: ``[...]``.

    >>> adaptive_weights(torch.tensor([0.3, 0.0]), torch.tensor([0.1, 0.0]))
    (tensor([0.7500, 0.0000]), tensor([0.2500, 0.0000]))
    """
    weight = head_weight(head_gap, tail_gap)
    differs = head_gap + tail_gap != 0
    return weight * differs, (1 - weight) * differs


# --------------------------------------------------------------------------------------------------------------------
# Student and teacher side by side, without gradients


class Comparison(NamedTuple):
    """What student and teacher look like beside each other at some tokens; see :func:`compare`."""

    student: Tensor
    """Log-probabilities ``[tokens, vocab]``."""

    teacher: Tensor
    """Log-probabilities ``[tokens, vocab]``."""

    student_probs: Tensor
    """``[tokens, vocab]``."""

    teacher_probs: Tensor
    """``[tokens, vocab]``."""

    log_ratio: Tensor
    """``teacher - student``, ``[tokens, vocab]``."""

    fkl: Tensor
    """Forward KL, ``[tokens]``."""

    rkl: Tensor
    """Reverse KL, ``[tokens]``."""

    head_gap: Tensor
    """``[tokens]``."""

    tail_gap: Tensor
    """``[tokens]``."""

    top1_agreement: Tensor
    """1 where the teacher's most likely token is the student's, too (of equals, one of them), else 0; ``[tokens]``."""

    irregular: Tensor
    """Indices of the tokens that have a masked logit, where the closed-form gradients do not hold."""

    def rows(self, index: Tensor) -> "Comparison":
        """The comparison at some of its tokens."""
        everywhere = torch.arange(len(index), device=index.device)
        return Comparison._make([*(part[index] for part in self[:-1]), everywhere])


def compare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mu: float,
    head_rule: HeadRule,
    scratch: Tensor,
) -> Comparison:
    """Compare distributions in as few passes over the vocabulary as can be; no gradient is recorded.

    Args:
        student_logits: ``[tokens, vocab]``, at least float32, softened where wanted; overwritten.
        teacher_logits: ``[tokens, vocab]``, likewise, of the same dtype; overwritten.
        mu: teacher mass of the head, in (0, 1].
        head_rule: ``cover`` or ``within``, see :func:`head_mask`.
        scratch: memory for the result, ``[4, tokens, vocab]``: fresh memory for every few tokens costs more than the
            comparison itself.
    """
    with torch.no_grad():
        p, q, log_ratio, product = (
            torch.empty((4, *student_logits.shape)).to(student_logits) if scratch is None else scratch
        )
        student, largest_q = _to_log_probs_(student_logits, q)
        teacher, _ = _to_log_probs_(teacher_logits, p)
        torch.sub(teacher, student, out=log_ratio)
        fkl = torch.mul(p, log_ratio, out=product).sum(-1)
        rkl = torch.mul(q, log_ratio, out=product).sum(-1).neg_()
        irregular = fkl.new_empty(0, dtype=torch.long)
        if not math.isfinite((fkl + rkl).sum()):
            irregular = (~(fkl + rkl).isfinite()).nonzero().squeeze(-1)
            fkl[irregular] = forward_kl_from_log_probs(student[irregular], teacher[irregular])
            rkl[irregular] = reverse_kl_from_log_probs(student[irregular], teacher[irregular])
        head_gap, tail_gap, top = _head_tail(torch.sub(p, q, out=product).abs_(), p, mu, head_rule)
        agreement = (q.gather(-1, top[:, None]) == largest_q).squeeze(-1).to(q.dtype)
    return Comparison(student, teacher, q, p, log_ratio, fkl, rkl, head_gap, tail_gap, agreement, irregular)


def _to_log_probs_(logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``probs``, turn logits into log-probabilities, return these and the largest probabilities ``[tokens, 1]``.

    One exponential serves both: the largest probability is ``exp(largest logit) / sum``, so it tells the sum.
    """
    torch.softmax(logits, dim=-1, out=probs)
    largest = probs.amax(-1, keepdim=True)
    # One after the other: together they would be rounded at the size of the logits, which may all be far from 0.
    return logits.sub_(logits.amax(-1, keepdim=True)).add_(largest.log()), largest


# --------------------------------------------------------------------------------------------------------------------
# Divergences, first from log-probabilities (the chunked criterion and the modules already hold them), then from logits


def forward_kl_from_log_probs(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`forward_kl` of log-probabilities."""
    p = teacher.exp()
    # Masked before the product: 0 times -inf would be NaN, in the value and in the gradient.
    entropy = (p * teacher.masked_fill(p == 0, 0)).sum(-1)
    return entropy - (p * student.masked_fill(p == 0, 0)).sum(-1)


def reverse_kl_from_log_probs(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`reverse_kl` of log-probabilities."""
    return _kl_of_varying(student, teacher)


def _kl_of_varying(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) with a gradient in both; +inf where b is 0 under mass of a, and the gradient leaves that out."""
    a = log_a.exp()
    ratio = log_a - log_b
    left_out = (a == 0) | (log_b == -torch.inf)
    impossible = ((log_b == -torch.inf) & (a > 0)).any(-1)
    # Masked on both sides of the product so that neither the value nor the gradient meets inf.
    value = (a * torch.where(left_out, 0.0, ratio)).sum(-1)
    return value + torch.zeros_like(value).masked_fill(impossible, torch.inf)


def weighted(weight: Tensor | float, value: Tensor) -> Tensor:
    """``weight * value``, where a zero weight times anything, infinity too, is 0, in the gradient as well."""
    if not isinstance(weight, Tensor):
        return weight * value if weight else torch.zeros_like(value)
    return torch.where(weight == 0, 0.0, weight * value.masked_fill(weight == 0, 0.0))


def adaptive_kl_from_log_probs(
    student: Tensor, teacher: Tensor, mu: float = 0.5, head_rule: HeadRule = "cover"
) -> Tensor:
    """:func:`adaptive_kl` of log-probabilities."""
    forward, reverse = adaptive_weights(*head_tail_gap(student.exp(), teacher.exp(), mu, head_rule))
    fkl, rkl = forward_kl_from_log_probs(student, teacher), reverse_kl_from_log_probs(student, teacher)
    return weighted(forward, fkl) + weighted(reverse, rkl)


def _log_mix(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(weight_a * a + (1 - weight_a) * b); -inf, without a NaN in the gradient, where both are 0."""
    nowhere = (log_a == -torch.inf) & (log_b == -torch.inf)
    log_a, log_b = log_a.masked_fill(nowhere, 0.0), log_b.masked_fill(nowhere, 0.0)
    if weight_a == 0:
        return log_b.masked_fill(nowhere, -torch.inf)
    if weight_a == 1:
        return log_a.masked_fill(nowhere, -torch.inf)
    mix = torch.logaddexp(log_a + math.log(weight_a), log_b + math.log1p(-weight_a))
    return mix.masked_fill(nowhere, -torch.inf)


def jensen_shannon_from_log_probs(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """:func:`jensen_shannon` of log-probabilities."""
    check_fraction("beta", beta, open_ends=True)
    mix = _log_mix(teacher, student, beta)
    return beta * forward_kl_from_log_probs(mix, teacher) + (1 - beta) * _kl_of_varying(student, mix)


def skew_forward_kl_from_log_probs(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """:func:`skew_forward_kl` of log-probabilities."""
    check_fraction("skew", skew)
    return forward_kl_from_log_probs(_log_mix(teacher, student, skew), teacher)


def skew_reverse_kl_from_log_probs(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """:func:`skew_reverse_kl` of log-probabilities."""
    check_fraction("skew", skew)
    return _kl_of_varying(student, _log_mix(student, teacher, skew))


def total_variation_from_log_probs(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`total_variation` of log-probabilities."""
    return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Forward KL, :math:`\sum_i p_i (\log p_i - \log q_i)`: the classic knowledge-distillation loss.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_logits: ``[..., vocab]``.
        temperature: softens both; the value is scaled by its square.

    Returns:
        ``[...]``, nats.

    Source: Hinton et al. 2015, arXiv 1503.02531; arXiv 2404.02657.

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> forward_kl(student, teacher)
    tensor([0.1733])
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return temperature**2 * forward_kl_from_log_probs(student, teacher)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Reverse KL, :math:`\sum_i q_i (\log q_i - \log p_i)`.

    Arguments and result as in :func:`forward_kl`. Source: MiniLLM, arXiv 2306.08543; arXiv 2404.02657.

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.8, 0.1, 0.1]]).log()
    >>> reverse_kl(student, teacher)
    tensor([0.1927])
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return temperature**2 * reverse_kl_from_log_probs(student, teacher)


def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mu: float = 0.5,
    head_rule: HeadRule = "cover",
    temperature: float = 1.0,
) -> Tensor:
    """Adaptive KL (AKL): ``head_weight * FKL + (1 - head_weight) * RKL``, weighted per token.

    The weights say where student and teacher still differ, see :func:`head_weight`, and are detached. Where the two
    distributions are equal the value and its gradient are 0.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_logits: ``[..., vocab]``.
        mu: teacher mass of the head, in (0, 1].
        head_rule: ``cover`` (the paper) or ``within`` (the authors' code), see :func:`head_mask`.
        temperature: softens both; the value is scaled by its square.

    Returns:
        ``[...]``, nats.

    Source: arXiv 2404.02657.

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> adaptive_kl(student, teacher)  # half of each KL: the gap is 0.25 in the head, 0.25 in the tail
    tensor([0.1733])
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return temperature**2 * adaptive_kl_from_log_probs(student, teacher, mu, head_rule)


def weighted_kl(
    student_logits: Tensor, teacher_logits: Tensor, forward_weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """A fixed mix, ``forward_weight * FKL + (1 - forward_weight) * RKL`` (FKL + RKL in arXiv 2404.02657).

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> weighted_kl(student, teacher, forward_weight=1.0)
    tensor([0.1733])
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return temperature**2 * weighted_kl_from_log_probs(student, teacher, forward_weight)


def weighted_kl_from_log_probs(student: Tensor, teacher: Tensor, forward_weight: float = 0.5) -> Tensor:
    """:func:`weighted_kl` of log-probabilities."""
    check_fraction("forward_weight", forward_weight)
    forward = weighted(forward_weight, forward_kl_from_log_probs(student, teacher))
    return forward + weighted(1 - forward_weight, reverse_kl_from_log_probs(student, teacher))


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Generalised Jensen-Shannon divergence, ``beta * KL(p‖m) + (1 - beta) * KL(q‖m)``, ``m = beta p + (1 - beta) q``.

    Arguments and result as in :func:`forward_kl`; ``beta`` in (0, 1). Source: GKD, arXiv 2306.13649.

    >>> teacher = torch.tensor([[1.0, 0.0]]).log()
    >>> student = torch.tensor([[0.0, 1.0]]).log()
    >>> jensen_shannon(student, teacher)  # log 2, its largest value
    tensor([0.6931])
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return temperature**2 * jensen_shannon_from_log_probs(student, teacher, beta)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """Skewed forward KL, ``KL(p ‖ skew * p + (1 - skew) * q)``: never infinite for ``skew > 0``.

    Arguments and result as in :func:`forward_kl`. Source: DistiLLM, arXiv 2402.03898.

    >>> teacher = torch.tensor([[1.0, 0.0]]).log()
    >>> student = torch.tensor([[0.0, 1.0]]).log()
    >>> skew_forward_kl(student, teacher)  # -log 0.1
    tensor([2.3026])
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return temperature**2 * skew_forward_kl_from_log_probs(student, teacher, skew)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """Skewed reverse KL, ``KL(q ‖ skew * q + (1 - skew) * p)``: never infinite for ``skew > 0``.

    Arguments and result as in :func:`forward_kl`. Source: DistiLLM, arXiv 2402.03898.

    >>> teacher = torch.tensor([[1.0, 0.0]]).log()
    >>> student = torch.tensor([[0.0, 1.0]]).log()
    >>> skew_reverse_kl(student, teacher)
    tensor([2.3026])
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return temperature**2 * skew_reverse_kl_from_log_probs(student, teacher, skew)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Total variation distance, :math:`\frac{1}{2} \sum_i |p_i - q_i|`, between 0 and 1 (times t²).

    Arguments and result as in :func:`forward_kl`. Source: f-DISTILL, arXiv 2307.15190.

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> total_variation(student, teacher)
    tensor([0.2500])
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return temperature**2 * total_variation_from_log_probs(student, teacher)
