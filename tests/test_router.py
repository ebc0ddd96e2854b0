"""The loss of a mixture of experts' router is part of the loss where its config says so."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.models.split import SplitModel
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET
from tests.test_inputs import SAMPLES, padded

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "doge": {"num_experts": 4, "num_experts_per_tok": 2, "is_moe": True},  # whose function takes other arguments
}
WEIGHT = 0.25


def build(family: str, on: bool = True) -> PreTrainedModel:
    torch.manual_seed(2)
    weights = {"router_aux_loss_coef": WEIGHT, "aux_loss_coef": WEIGHT}
    config = AutoConfig.for_model(family, **SIZES, **EXPERTS[family], **weights, output_router_logits=on)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the only one that knows float64
    return model.double().eval()


def module(model: PreTrainedModel, **settings: Any) -> DistillationModule:
    sft = DistillationCriterion(alpha=0.0)
    sgd = {"optimizer": lambda weights: torch.optim.SGD(weights, 0.1)}
    return DistillationModule(model, None, sft, **{**sgd, **settings}).eval()


def switch_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Experts, times the sum over them of the share of choices and the mean probability, over all layers' tokens."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = torch.stack(model.base_model(**given, output_router_logits=True, use_cache=False).router_logits)
    probabilities = logits[:, batch["attention_mask"].flatten().bool()].softmax(-1).flatten(0, 1)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2).indices, 1.0)
    return 4 * (chosen.mean(0) * probabilities.mean(0)).sum()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_it_is_added_as_transformers_weighs_it(family: str, packing: bool) -> None:
    model, batch = build(family), padded(SAMPLES, "right")
    own = model(**batch)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    router = WEIGHT * switch_loss(model, batch)
    assert router.item() == pytest.approx(WEIGHT * own.aux_loss.item(), rel=1e-6)
    parameters = list(model.parameters())
    plain = cross_entropy(own.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    expected = plain + tokens * router
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)

    output = module(model, packing=packing).distill(batch)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-7)
    assert output.loss.item() == pytest.approx(tokens * own.loss.item(), rel=1e-6)  # which sums in float32
    assert output.statistics["router_loss"].tolist() == pytest.approx([router.item()] * tokens, rel=1e-6)
    assert output.statistics["loss"].sum().item() == pytest.approx(output.loss.item(), rel=1e-9)
    for one, other in zip(torch.autograd.grad(output.loss, parameters, allow_unused=True), gradients, strict=True):
        assert (one is None and other is None) or (one - other).norm() <= 1e-6 * other.norm() + 1e-7


@pytest.mark.parametrize("family", ["jetmoe", "doge"])
def test_families_that_do_it_otherwise(family: str, recwarn: Any) -> None:
    model, batch = build(family), padded(SAMPLES, "right")
    own = model(**batch)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    assert own.aux_loss.item() > 0
    loss = module(model).distill(batch).loss.item()
    assert loss == pytest.approx(tokens * own.loss.item(), rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_it_is_off_where_the_config_has_it_off(family: str) -> None:
    model, batch = build(family, on=False), padded(SAMPLES, "right")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    output = module(model).distill(batch)
    plain = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert output.loss.item() == pytest.approx(plain.item(), rel=1e-9)
    assert "router_loss" not in output.statistics


def test_a_teachers_router_is_nobodys_loss() -> None:
    batch = padded(SAMPLES, "right")
    criterion = DistillationCriterion(alpha=1.0)
    plain, routed = (
        DistillationModule(build("mixtral", False), build("qwen3_moe", on), criterion).eval().distill(batch)
        for on in (False, True)
    )
    assert torch.equal(plain.loss, routed.loss) and "router_loss" not in routed.statistics


def test_it_is_logged_by_its_name() -> None:
    batches = [padded(SAMPLES[:1], "right"), padded(SAMPLES[1:], "left")]
    module_ = module(build("mixtral"), optimizer=lambda weights: torch.optim.SGD(weights, 0.0))
    loader = DataLoader(batches, batch_size=None)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module_, loader, loader)
    trainer_logs = dict(trainer.callback_metrics)
    trainer.test(module_, loader, verbose=False)
    trainer_logs |= trainer.callback_metrics
    values = [WEIGHT * switch_loss(module_.student.model, batch).item() for batch in batches]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    expected = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    for stage in ("train", "val", "test"):
        assert trainer_logs[f"{stage}/router_loss"].item() == pytest.approx(expected, rel=1e-5)
        difference = trainer_logs[f"{stage}/loss"] - trainer_logs[f"{stage}/cross_entropy"]
        assert difference.item() == pytest.approx(expected, rel=1e-4)
    module_ = module(build("mixtral", on=False))
    trainer.validate(module_, loader, verbose=False)
    assert "val/router_loss" not in trainer.callback_metrics


def test_micro_batches_are_weighed_by_their_tokens() -> None:
    """The named exception: the loss of two micro-batches is not that of both in one."""
    batches = [padded(SAMPLES[:1], "right"), padded(SAMPLES[1:], "right")]
    module_ = module(build("mixtral"))
    twin = build("mixtral")
    Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2).fit(module_, DataLoader(batches, batch_size=None))
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    mean = sum(count * twin(**batch).loss for count, batch in zip(counts, batches, strict=True)) / sum(counts)
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(mean, parameters, allow_unused=True)
    for trained, parameter, gradient in zip(module_.student.model.parameters(), parameters, gradients, strict=True):
        expected = parameter if gradient is None else parameter - 0.1 * gradient
        assert torch.allclose(trained, expected, rtol=1e-5, atol=1e-7)


def test_nothing_holds_on_to_a_forward() -> None:
    module_, batch = module(build("mixtral")), padded(SAMPLES, "right")
    module_(batch)
    assert isinstance(module_.student, SplitModel) and module_.student.take_router_loss() is None
    module_.distill(batch)
    assert module_.student.take_router_loss() is None
