"""What the package computes, written down from the formulas: dense, in float64, with autograd for the gradient.

Nothing of the package is used here, so that whatever is compared with it is compared with the formulas.
"""

import math

import torch
from torch import Tensor


def logits(x: Tensor) -> Tensor:
    """In float64, with -inf for what counts as masked."""
    lowest = -65504 if x.dtype == torch.float16 else -3.38e38
    return x.detach().double().masked_fill(x.float() <= lowest, -torch.inf)


def xlog(x: Tensor, m: Tensor) -> Tensor:
    """``x log(x / m)``, 0 where x is."""
    return torch.where(x > 0, x * (torch.where(x > 0, x, 1.0).log() - torch.where(x > 0, m, 1.0).log()), 0.0)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * (log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0))).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """A token that the teacher masks is left out of the gradient and makes the value infinite."""
    q, masked = log_q.exp(), log_p == -torch.inf
    left_out = masked | (q == 0)
    value = (q * torch.where(left_out, 0.0, log_q - log_p)).sum(-1)
    return value + torch.zeros_like(value).masked_fill((masked & (q > 0)).any(-1), torch.inf)


def mixed(weight: float, a: Tensor, b: Tensor) -> Tensor:
    return weight * a + (1 - weight) * b


def pair(name: str, log_p: Tensor, log_q: Tensor, constant: float, weight: Tensor, differs: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    match name:
        case "forward_kl":
            return forward_kl(log_p, log_q)
        case "reverse_kl":
            return reverse_kl(log_p, log_q)
        case "weighted_kl":
            return constant * forward_kl(log_p, log_q) + (1 - constant) * reverse_kl(log_p, log_q)
        case "adaptive_kl":
            a, b = weight * differs, (1 - weight) * differs
            fkl, rkl = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
            return torch.where(a == 0, 0.0, a * fkl) + torch.where(b == 0, 0.0, b * rkl)
        case "jensen_shannon":
            m = mixed(constant, p, q)
            return (constant * xlog(p, m) + (1 - constant) * xlog(q, m)).sum(-1)
        case "skew_forward_kl":
            return xlog(p, mixed(constant, p, q)).sum(-1)
        case "skew_reverse_kl":
            return xlog(q, mixed(constant, q, p)).sum(-1)
        case "total_variation":
            return (p - q).abs().sum(-1) / 2
    raise ValueError(name)


def membership(logits: Tensor, p: Tensor, mu: float, head_rule: str) -> tuple[Tensor, bool]:
    """How much each token of one row belongs to the head, and whether rounding may decide about one of them."""
    if mu == 1:
        return (p > 0).double(), False
    values, of_token, ties = logits.unique(return_inverse=True, return_counts=True)
    # From the largest value down.
    of_token, ties = len(values) - 1 - of_token, ties.flip(0)
    mass = torch.zeros_like(ties, dtype=torch.double).index_add(0, of_token, p)
    until = mass.cumsum(0)
    reached = mu * (1 - 1e-6) if head_rule == "cover" else mu * (1 + 1e-6)
    crossing = min(int((until < reached).sum()), len(values) - 1)
    above = (until[crossing] - mass[crossing]).item()
    n, each = int(ties[crossing]), (mass[crossing] / ties[crossing]).item()
    missing = (reached - above) / each if each else 0.0
    k = min(math.ceil(missing) if head_rule == "cover" else max(math.floor(missing), int(crossing == 0)), n)
    members = torch.where(of_token < crossing, 1.0, torch.where(of_token == crossing, k / n, 0.0)).double()
    # Some number of these tokens whose mass is mu to 1e-5, but for rounding: then both see the same.
    off = [abs(above + j * each - mu) for j in range(k - 1, k + 2)]
    return members * (p > 0), any(1e-9 < x < 1e-5 for x in off)


def compare(
    student: Tensor, teacher: Tensor, labels: Tensor, name: str, constant: float = 0.0, alpha: float = 0.5,
    temperature: float = 1.0, mu: float = 0.5, head_rule: str = "cover",
) -> tuple[dict[str, Tensor], Tensor, Tensor]:  # fmt: skip
    """Statistics ``[rows]``, the gradient of the summed loss, and which rows' heads rounding may decide."""
    s, t = logits(student).requires_grad_(), logits(teacher)
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.detach().exp()
    heads = [membership(*row, mu, head_rule) for row in zip(t, p, strict=True)]
    members = torch.stack([head for head, _ in heads])
    gap = (p - q).abs()
    head_gap, tail_gap = (gap * members).sum(-1), (gap * (1 - members)).sum(-1)
    total = head_gap + tail_gap
    weight = torch.where(total > 0, head_gap / total.clamp(min=1e-300), 0.5)
    value = temperature**2 * pair(name, log_p, log_q, constant, weight, (total > 0).double())
    cross_entropy = -s.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    loss = sum(w * x for w, x in ((alpha, value), (1 - alpha, cross_entropy)) if w)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    top = torch.where(t == t.amax(-1, keepdim=True), s, -torch.inf).amax(-1) == s.amax(-1)
    statistics = {
        "loss": loss, "divergence": value, "cross_entropy": cross_entropy,
        "fkl": forward_kl(log_p, log_q), "rkl": reverse_kl(log_p, log_q),
        "head_gap": head_gap, "tail_gap": tail_gap, "head_weight": weight, "top1_agreement": top.double(),
    }  # fmt: skip
    return (
        {k: v.detach() for k, v in statistics.items()},
        gradient,
        torch.tensor([close for _, close in heads], device=s.device),
    )
