import pytest
import torch
from torch import Tensor, nn

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    TotalVariation,
    WeightedKL,
)
from akl_lightning.projection import Projection
from akl_lightning.teachers.cache.top_k import decode_top_k, encode_top_k

VOCAB, TOKENS, K = 40, 7, 5


def logits() -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, TOKENS, VOCAB)
    return student.requires_grad_(), teacher


def merged(log_probs: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities ``[tokens, k + 1]``: those of the top tokens, and of all others as one."""
    rest = log_probs.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, top), rest], -1)


@pytest.mark.parametrize(
    "divergence",
    [ForwardKL(), ReverseKL(), WeightedKL(0.3), JensenShannon(0.4), SkewKL(0.2), SkewKL(0.2, True), TotalVariation()],
    ids=lambda divergence: type(divergence).__name__,
)
def test_all_other_tokens_count_as_one(divergence: Divergence) -> None:
    student, teacher = logits()
    top = teacher.topk(K).indices
    expected = divergence.compare(merged(student.log_softmax(-1), top), merged(teacher.log_softmax(-1), top))
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    stored = decode_top_k(encode_top_k(teacher, K), VOCAB)
    output = DistillationCriterion(divergence, alpha=1.0, chunk_size=3)(student, stored, top[:, 0])
    output.loss.backward()
    # Stored in float16.
    assert torch.allclose(output.statistics["divergence"], expected, rtol=5e-3, atol=1e-3)
    assert (student.grad - gradient).norm() <= 5e-3 * gradient.norm()


def test_what_is_stored_sums_to_one_however_small_the_rest() -> None:
    teacher = torch.zeros(1, VOCAB)
    teacher[0, 3] = 30.0
    parts = encode_top_k(teacher, 1)
    assert parts["tokens"].item() == 3
    assert parts["rest"].item() == pytest.approx(torch.log(torch.tensor(VOCAB - 1.0)).item() - 30, rel=1e-3)
    assert sum(part.nbytes for part in encode_top_k(teacher, 16).values()) == 98


def test_a_projection_is_stored_as_its_logits_are() -> None:
    head, hidden = nn.Linear(8, VOCAB), torch.randn(130, 8)
    dense = 3 * torch.tanh(head(hidden) / 3)
    for name, part in encode_top_k(Projection(hidden, head, soft_cap=3.0), K).items():
        assert torch.equal(part, encode_top_k(dense, K)[name])
    assert encode_top_k(Projection(hidden[:0], head), K)["tokens"].shape == (0, K)


def test_a_narrower_student_leaves_out_what_it_has_no_output_for() -> None:
    student, teacher = logits()
    narrow = student[:, : VOCAB - 4].detach().requires_grad_()
    teacher[:, -2] = 20.0  # a token that the student lacks
    teacher[:, :3] += 10
    whole = DistillationCriterion(ForwardKL(), 1.0)(narrow, teacher, torch.zeros(TOKENS, dtype=torch.long))
    stored = decode_top_k(encode_top_k(teacher, 6), VOCAB)
    output = DistillationCriterion(ForwardKL(), 1.0)(narrow, stored, torch.zeros(TOKENS, dtype=torch.long))
    assert output.statistics["fkl"].isfinite().all()
    assert torch.allclose(output.statistics["fkl"], whole.statistics["fkl"], rtol=0.05)
