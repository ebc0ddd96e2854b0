"""Who samples, from which weights."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from akl_lightning.errors import UsageError
from akl_lightning.models.split import SplitModel
from akl_lightning.rollouts import ContinuousBatching, GenerateEngine, Sampling, Weights
from akl_lightning.rollouts.weights import WholeModel
from tests.conftest import gpt2
from tests.test_peft import ADAPTERS, PROMPTS

PROMPTS_OF_TOKENS = [[5, 6, 7], [8], [1, 2, 3, 4], [9, 9]]


@pytest.fixture
def weights() -> Weights:
    torch.manual_seed(1)
    return Weights(SplitModel(gpt2(16)).eval(), (0, 3), 0)


@torch.no_grad()
def sampled(engine: Any, weights: Weights, prompts: Any = PROMPTS_OF_TOKENS, **settings: Any) -> list[list[int]]:
    engine.refresh(weights)
    return engine.generate(prompts, Sampling(**{"max_new_tokens": 8, **settings}), range(10, 10 + len(prompts)))


def test_an_answer_depends_on_its_own_prompt_and_seed_alone(weights: Weights) -> None:
    together = sampled(GenerateEngine(), weights)
    assert sampled(GenerateEngine(batch_size=1), weights) == together == sampled(GenerateEngine(batch_size=3), weights)
    engine = GenerateEngine()
    engine.refresh(weights)
    with torch.no_grad():
        assert engine.generate(PROMPTS_OF_TOKENS[2:3], Sampling(8), [12]) == together[2:3]
        assert engine.generate(PROMPTS_OF_TOKENS[2:3], Sampling(8), [13]) != together[2:3]


def test_tokens_are_drawn_by_their_probabilities(weights: Weights) -> None:
    engine, count = GenerateEngine(), 4000
    engine.refresh(weights)
    with torch.no_grad():
        expected = (weights.model.model(torch.tensor([[5, 6]])).logits[0, -1] / 0.7).softmax(-1)
        drawn = engine.generate([[5, 6]] * count, Sampling(1, temperature=0.7), range(count))
    found = torch.bincount(torch.tensor(drawn)[:, 0], minlength=300) / count
    assert (found - expected).abs().max() < 5 * (expected * (1 - expected) / count).sqrt().max()


def test_top_p_leaves_the_likeliest(weights: Weights) -> None:
    with torch.no_grad():
        best = weights.model.model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax().item()
    assert sampled(GenerateEngine(), weights, [[5, 6, 7]], top_p=1e-6)[0][0] == best


def test_continuous_batching_answers_and_leaves_everything_as_it_was(weights: Weights) -> None:
    model = weights.model.model
    states, attention = torch.get_rng_state(), model.config._attn_implementation
    first = sampled(ContinuousBatching(memory=0.01), weights)
    assert torch.equal(torch.get_rng_state(), states)
    assert model.config._attn_implementation == attention
    assert len(first) == 4 and all(0 < len(answer) <= 8 for answer in first)
    assert first == sampled(ContinuousBatching(memory=0.01), weights)  # the same refresh
    # The likeliest token is the same, whoever computes it.
    greedy = {"top_p": 1e-6}
    assert sampled(ContinuousBatching(0.01), weights, **greedy) == ends_of(sampled(GenerateEngine(), weights, **greedy))


def ends_of(answers: list[list[int]]) -> list[list[int]]:
    """Up to the first end token."""
    return [
        answer[: next((place + 1 for place, token in enumerate(answer) if token in (0, 3)), 8)] for answer in answers
    ]


def test_continuous_batching_keeps_what_it_has_made_and_follows_the_weights(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("akl_lightning.rollouts.continuous.PAGE", 4)  # a prompt of two, which could be shared
    prompts, greedy, engine = (
        [[5, 6, 7, 8, 9, 10, 11, 12, 13], [8, 9], [1, 2, 3]],
        {"top_p": 1e-6},
        ContinuousBatching(0.01),
    )
    made = []
    make = type(weights.model.model).init_continuous_batching
    managers = lambda model, *args, **more: made.append(make(model, *args, **more)) or made[-1]  # noqa: E731
    monkeypatch.setattr(type(weights.model.model), "init_continuous_batching", managers)
    for step in range(3):
        with torch.inference_mode(step == 0):  # as in a validation before the training
            found = sampled.__wrapped__(engine, weights, prompts, **greedy)
        assert found == ends_of(sampled(GenerateEngine(), weights, prompts, **greedy))
        with torch.no_grad():
            for parameter in weights.model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert made[0] is made[1] is made[2]
    copy.deepcopy(weights.model)  # nothing hangs on it
    # The draws are those of an engine that has kept nothing.
    assert sampled(engine, weights, prompts) == sampled(ContinuousBatching(0.01), weights, prompts)
    sampled(engine, weights, prompts, **greedy)
    assert sampled(engine, weights, prompts[::-1] * 2) == sampled(ContinuousBatching(0.01), weights, prompts[::-1] * 2)
    engine.release()
    engine.release()


def test_too_little_memory_is_said(weights: Weights) -> None:
    with pytest.raises(UsageError, match=r"engine\.memory = 1e-06 GiB holds no response to the longest prompt"):
        sampled(ContinuousBatching(memory=1e-6), weights)
    with pytest.raises(UsageError, match="above 0"):
        ContinuousBatching(memory=0)
    with pytest.raises(UsageError, match="1 or more"):
        GenerateEngine(batch_size=0)


@pytest.mark.parametrize("engine", [GenerateEngine(), ContinuousBatching(0.01)])
def test_nan_is_said(engine: Any, weights: Weights) -> None:
    with torch.no_grad():
        weights.model.model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(UsageError, match="gives NaN"):
        sampled(engine, weights)


def test_nan_is_said_of_any_prompt_and_an_engine_goes_on_from_better_weights(weights: Weights) -> None:
    engine = ContinuousBatching(0.01)
    embedding = weights.model.model.transformer.wte.weight
    before = embedding[2].detach().clone()
    with torch.no_grad():
        embedding[2] = torch.nan  # of the third prompt, and as an output: of all logits
        weights.model.model.lm_head.weight = torch.nn.Parameter(embedding.nan_to_num().clone())
    with pytest.raises(UsageError, match="gives NaN"):
        sampled(engine, weights)
    assert all(len(answer) for answer in sampled(engine, weights, [[5, 6]], top_p=1e-6))
    with torch.no_grad():
        embedding[2] = before
    assert sampled(engine, weights) == sampled(ContinuousBatching(0.01), weights)


# --------------------------------------------------------------------------------------------------------------------
# Weights


def test_a_plain_student_is_sampled_from_itself() -> None:
    student = SplitModel(gpt2(16))
    assert WholeModel(student).now(None) is student
    assert WholeModel(student).now(torch.float32) is student


def test_mixed_precision_samples_from_a_copy_in_that_of_the_products() -> None:
    student = SplitModel(gpt2(16))
    whole = WholeModel(student)
    own = whole.now(torch.bfloat16)
    head, embedding = own.model.lm_head.weight, own.model.transformer.wte.weight
    assert own is not student and head is embedding and head.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in own.parameters())
    with torch.no_grad():
        student.model.transformer.wte.weight.add_(1.0)
    place = head.data_ptr()
    again = whole.now(torch.bfloat16)
    assert again is own and again.model.lm_head.weight.data_ptr() == place  # for whoever has captured a graph
    assert torch.equal(head, student.model.transformer.wte.weight.bfloat16())
    assert student.model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_adapters_are_merged(name: str) -> None:
    torch.manual_seed(2)
    base = gpt2(16, layers=2)
    student = SplitModel(peft.get_peft_model(base, copy.deepcopy(ADAPTERS[name]))).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    whole, ids = WholeModel(student), torch.tensor([[5, 6, 7]])
    for _ in range(2):
        with torch.no_grad():
            own = whole.now(None)
            assert not any("lora" in name or "ia3" in name for name, _ in own.named_parameters())
            torch.testing.assert_close(own.model(ids).logits, student.model(ids).logits, rtol=1e-4, atol=1e-5)
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
    assert all(name in before for name in student.state_dict())  # still an adapter
    assert torch.equal(before["model.base_model.model.transformer.wpe.weight"], base.transformer.wpe.weight)


def test_a_learnt_prompt_cannot_be_merged_and_is_sampled_with() -> None:
    student = SplitModel(peft.get_peft_model(gpt2(16), copy.deepcopy(PROMPTS["prompt tuning"]))).eval()
    assert WholeModel(student).now(None) is student
    assert len(sampled(GenerateEngine(), Weights(student, (0,), 0))) == 4


def test_a_module_of_ones_own_brings_its_generate() -> None:
    class Counting(nn.Module):
        def generate(self, input_ids: torch.Tensor, logits_processor: Any, **settings: Any) -> torch.Tensor:
            for _ in range(settings["max_new_tokens"]):
                scores = logits_processor(input_ids, torch.zeros(len(input_ids), 10))
                input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
            return input_ids

    answers = sampled(GenerateEngine(), Weights(SplitModel(Counting()), (0,), 0))
    assert [len(answer) for answer in answers] == [8] * 4
