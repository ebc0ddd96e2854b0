"""What a batch carries beside tokens reaches both models, or is refused; positions are right wherever padding lies."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.divergences import ForwardKL
from akl_lightning.errors import UsageError
from akl_lightning.models.inputs import lay_out
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.cache.format import manifest_checksum
from akl_lightning.teachers.cache.samples import sample_digests
from tests.conftest import QUIET, Bigram, gpt2, write
from tests.test_models import build

Batch = dict[str, Tensor]
GENERATOR = torch.Generator().manual_seed(5)
SAMPLES = [torch.randint(3, 60, (length,), generator=GENERATOR) for length in (7, 5, 9, 4)]


def double(model: nn.Module) -> nn.Module:
    return model.double().eval()


def module(student: nn.Module, teacher: nn.Module | str, **settings: Any) -> DistillationModule:
    criterion = DistillationCriterion(ForwardKL(), alpha=0.5)
    return DistillationModule(double(student), teacher, criterion, **settings).eval()


def by_hand(student: nn.Module, teacher: nn.Module, samples: list[tuple[Tensor, dict[str, Tensor]]]) -> float:
    """Half forward KL, half cross entropy of the data, summed over every token but the first, each sample alone."""
    total = 0.0
    for ids, more in samples:
        q, p = (model(input_ids=ids[None], **more).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
        fkl = (p.exp() * (p - q)).sum()
        total += (0.5 * fkl - 0.5 * q.gather(-1, ids[1:, None]).sum()).item()
    return total


def padded(samples: list[Tensor], side: str) -> Batch:
    """One sample to a row."""
    width = max(map(len, samples)) + 2
    batch = {name: torch.full((len(samples), width), fill) for name, fill in (("input_ids", 1), ("labels", -100))}
    batch["attention_mask"] = torch.zeros(len(samples), width, dtype=torch.int64)
    for row, ids in enumerate(samples):
        place = slice(len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids, 1
        batch["labels"][row, place] = ids
        batch["labels"][row, place.start or 0] = -100  # nothing predicts the first
    return batch


def sharing_rows(side: str = "right") -> Batch:
    """Two samples to a row, whose positions begin anew."""
    joined = padded([torch.cat(SAMPLES[:2]), torch.cat(SAMPLES[2:])], side)
    batch = {**joined, "position_ids": torch.zeros_like(joined["input_ids"])}
    for row, pair in enumerate((SAMPLES[:2], SAMPLES[2:])):
        start = int(batch["attention_mask"][row].argmax())
        for ids in pair:
            batch["position_ids"][row, start : start + len(ids)] = torch.arange(len(ids))
            batch["labels"][row, start] = -100
            start += len(ids)
    return batch


# --------------------------------------------------------------------------------------------------------------------
# Several samples in a row


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_samples_that_share_a_row_by_their_positions_see_nothing_of_each_other(family: str, side: str) -> None:
    student, teacher = build(family), double(build("gpt2"))
    module_ = module(student, teacher)
    batch = sharing_rows(side)
    loss = module_.distill(batch).loss.item()
    assert loss == pytest.approx(by_hand(student, teacher, [(ids, {}) for ids in SAMPLES]), rel=1e-9)
    without = {name: value for name, value in sharing_rows().items() if name != "position_ids"}
    assert abs(module_.distill(without).loss.item() - loss) > 1e-3


def test_positions_that_begin_elsewhere_are_one_sample() -> None:
    student, teacher = build("gpt2"), double(build("opt"))
    batch = padded(SAMPLES[:2], "right")
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + 3
    loss = module(student, teacher).distill(batch).loss.item()
    moved = [(ids, {"position_ids": 3 + torch.arange(len(ids))[None]}) for ids in SAMPLES[:2]]
    assert loss == pytest.approx(by_hand(student, teacher, moved), rel=1e-9)


def test_a_training_step_on_rows_that_are_shared_is_that_on_rows_of_their_own() -> None:
    def trained(batch: Batch) -> Tensor:
        torch.manual_seed(1)
        module_ = DistillationModule(
            build("llama").double(), double(build("gpt2")), optimizer=lambda weights: torch.optim.SGD(weights, 0.1)
        )
        Trainer(**QUIET, max_steps=1).fit(module_, DataLoader([batch], batch_size=None))
        return nn.utils.parameters_to_vector(module_.parameters()).detach()

    assert torch.allclose(trained(sharing_rows()), trained(padded(SAMPLES, "right")), rtol=1e-9, atol=1e-12)


def test_a_model_that_does_not_tell_them_apart_is_named() -> None:
    blind = build("gpt2")
    blind.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None, "position_ids": None}), with_kwargs=True
    )
    module_ = DistillationModule(blind, build("gpt2"))
    with pytest.raises(UsageError, match="GPT2LMHeadModel does not tell samples in one row apart: give each sample"):
        module_.distill(sharing_rows())


# --------------------------------------------------------------------------------------------------------------------
# Padding on the left


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "phi"])
@pytest.mark.parametrize("packing", [False, True])
def test_positions_come_from_the_mask(family: str, packing: bool) -> None:
    student, teacher = build(family), double(build("gpt2"))
    module_ = module(student, teacher, packing=packing)
    batch = padded(SAMPLES, "left")
    expected = by_hand(student, teacher, [(ids, {}) for ids in SAMPLES])
    assert module_.distill(batch).loss.item() == pytest.approx(expected, rel=1e-9)
    assert module_.distill(padded(SAMPLES, "right")).loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_whole_logits_too() -> None:
    model = build("gpt2").eval()
    logits = DistillationModule(model, copy.deepcopy(model))(padded(SAMPLES, "left"))
    for row, ids in zip(logits, SAMPLES, strict=True):
        assert torch.allclose(row[-len(ids) :], model(input_ids=ids[None]).logits[0], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_behind_the_tokens_changes_no_bit(family: str) -> None:
    batch = padded(SAMPLES, "right")
    assert lay_out(batch) == (None, None)
    model = build(family).eval()
    given: list[Tensor | None] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    logits = DistillationModule(model, build("gpt2"))(batch)
    assert given == [None]
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(logits, own)


# --------------------------------------------------------------------------------------------------------------------
# Whatever else a forward knows


def test_token_types_reach_the_model_that_knows_them() -> None:
    student, teacher = build("gpt2"), double(build("llama"))  # which does not
    batch = padded(SAMPLES[:1], "right")
    types = torch.randint(0, 60, batch["input_ids"].shape)
    batch["token_type_ids"] = types
    loss = module(student, teacher).distill(batch).loss.item()

    class Typed(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return student(input_ids=input_ids, token_type_ids=types[:, : input_ids.shape[1]])

    expected = by_hand(Typed(), teacher, [(SAMPLES[0], {})])
    assert loss == pytest.approx(expected, rel=1e-9)
    assert abs(expected - by_hand(student, teacher, [(SAMPLES[0], {})])) > 1e-3


def llava(width: int = 16) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=60, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=59, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


def with_image() -> Batch:
    ids = torch.cat([torch.full((4,), 59), SAMPLES[0].clamp(max=58)])
    batch = padded([ids], "right")
    batch["labels"][:, :4] = -100
    return {**batch, "pixel_values": torch.randn(1, 3, 4, 4, dtype=torch.float64)}


def test_images_reach_student_and_teacher() -> None:
    student, teacher = llava(), double(llava(24))
    with torch.no_grad():
        for parameter in (*student.parameters(), *teacher.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    module_ = module(student, teacher)
    losses = []
    for _ in range(2):
        batch = with_image()
        whole = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        q, p = (model(**whole).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
        labels, counts = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
        cross_entropy = -q.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        expected = 0.5 * ((p.exp() * (p - q)).sum(-1) + cross_entropy)[counts].sum().item()
        losses.append(module_.distill(batch).loss.item())
        assert losses[-1] == pytest.approx(expected, rel=1e-9)
    assert abs(losses[0] - losses[1]) > 1e-4


def small() -> nn.Module:
    return gpt2(vocab_size=60)


def mamba() -> nn.Module:
    config = {"vocab_size": 60, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **config))


@pytest.mark.parametrize(
    ("student", "teacher", "more", "message"),
    [
        (
            mamba,
            small,
            {"position_ids": torch.zeros(4, 11)},
            "'position_ids', which the student, MambaForCausalLM, can",
        ),
        (
            small,
            mamba,
            {"position_ids": torch.zeros(4, 11)},
            "'position_ids', which the teacher, MambaForCausalLM, can",
        ),
        (
            small,
            small,
            {"pixel_values": torch.zeros(4, 3)},
            "'pixel_values', which the student, GPT2LMHeadModel, cannot",
        ),
        (llava, small, {"pixel_values": torch.zeros(4, 3)}, "'pixel_values', which the teacher, GPT2LMHeadModel, can"),
        (small, small, {"inputs_embeds": torch.zeros(4, 11, 16)}, "'inputs_embeds', which the student"),
        (small, small, {"cu_seq_lens_q": torch.zeros(2)}, "'cu_seq_lens_q', which the student"),
        (small, small, {"logits_to_keep": torch.zeros(2)}, "'logits_to_keep', which the student"),
        (small, small, {"attention_mask": torch.ones(4, 1, 11, 11)}, r"attention_mask of shape \[4, 1, 11, 11\]"),
    ],
)
def test_what_a_model_cannot_be_given_is_named_before_the_first_step(
    student: Any, teacher: Any, more: Batch, message: str
) -> None:
    module_ = DistillationModule(student(), teacher())
    before = nn.utils.parameters_to_vector(module_.parameters()).detach().clone()
    batch = {**padded(SAMPLES, "right"), **more}
    with pytest.raises(UsageError, match=message):
        Trainer(**QUIET, max_steps=1).fit(module_, DataLoader([batch], batch_size=None))
    assert torch.equal(nn.utils.parameters_to_vector(module_.parameters()), before)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_packing_moves_nothing_else(name: str) -> None:
    module_ = DistillationModule(build("gpt2"), build("gpt2"), packing=True)
    batch = {**padded(SAMPLES, "right"), name: torch.zeros(4, 11, dtype=torch.int64)}
    with pytest.raises(UsageError, match=rf"cannot move '{name}' of the batch along: set model\.packing to false"):
        module_.distill(batch)


def test_what_no_model_knows_is_left_alone() -> None:
    module_ = DistillationModule(build("llama"), build("gpt2"))
    batch = padded(SAMPLES, "right")
    more = {"index": torch.arange(4), "text": ["a"] * 4, "weight": torch.ones(4), "mm_token_type_ids": torch.ones(4)}
    assert torch.equal(module_.distill({**batch, **more}).loss, module_.distill(batch).loss)


def test_a_module_of_ones_own_gets_the_whole_batch() -> None:
    seen: list[set[str]] = []

    class Looks(Bigram):
        def forward(self, batch: Batch) -> Tensor:
            seen.append(set(batch))
            return super().forward(batch)

    DistillationModule(Looks(), gpt2()).distill({**padded(SAMPLES, "right"), "speaker": torch.ones(4)})
    assert "speaker" in seen[0]


# --------------------------------------------------------------------------------------------------------------------
# A teacher's cache


def loader(*batches: Batch) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)


def test_digests_of_plain_samples_are_those_of_caches_that_exist() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    (digest,) = sample_digests({**batch, "index": torch.tensor([3])}, torch.tensor([1]))
    assert digest.hex() == "ed1e84622bea4b7d33e414696827295f"
    (same,) = sample_digests({**batch, "index": torch.tensor([4])}, torch.tensor([1]), None)
    assert same == digest
    positions = {"position_ids": torch.tensor([[0, 1, 0, 0]])}
    one, two, three = (
        sample_digests({**batch, **more}, torch.tensor([1]), ["position_ids"])[0]
        for more in (positions, {"position_ids": torch.tensor([[0, 1, 0, 9]])}, {"position_ids": torch.arange(4)[None]})
    )
    assert one == two and len({digest, one, three}) == 3, "padding has no part, all else has"


def test_a_cache_knows_samples_by_all_that_the_teacher_was_given(tmp_path: Path) -> None:
    student, teacher = build("llama"), build("gpt2")
    cached = write(teacher, tmp_path / "cache", loader(sharing_rows()), codec="bfloat16")
    live, ours = (module(student, source) for source in (teacher, cached))
    batch = sharing_rows()
    assert ours.distill(batch).loss.item() == pytest.approx(live.distill(batch).loss.item(), rel=1e-2)
    for other in ({"position_ids": 2 + batch["position_ids"]}, {"token_type_ids": batch["position_ids"]}):
        with pytest.raises(UsageError, match="lacks 2 of 2 samples"):
            ours.distill({**batch, **other})
    with pytest.raises(UsageError, match="lacks 2 of 2 samples"):
        ours.distill({name: value for name, value in batch.items() if name != "position_ids"})
    with pytest.raises(UsageError, match="the batch has 'pixel_values', which the teacher of the cache"):
        module(llava(), cached).distill({**batch, "pixel_values": torch.ones(2, 3, 4, 4)})


def test_images_are_cached_sample_by_sample(tmp_path: Path) -> None:
    batches = [with_image() for _ in range(2)]
    teacher = llava(24).double()
    cached = write(teacher, tmp_path / "cache", loader(*batches))
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["data"]["samples"] == 2
    module_ = module(llava(), cached)
    for batch in batches:
        module_.distill(batch)
    with pytest.raises(UsageError, match="lacks 1 of 1 samples"):
        module_.distill(with_image())
    both = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    with pytest.raises(UsageError, match=r"which part of 'pixel_values', of shape \[2, 3, 4, 4\], belongs to which"):
        module_.distill(both)
    with pytest.raises(UsageError, match="give batches of one sample"):
        write(teacher, tmp_path / "other", loader(both))


def test_a_cache_of_before_has_not_seen_positions(tmp_path: Path) -> None:
    plain = padded(SAMPLES, "right")
    cached = write(build("gpt2"), tmp_path / "cache", loader(plain))
    path = tmp_path / "cache/manifest.json"
    manifest = {
        name: value for name, value in json.loads(path.read_text()).items() if name not in ("checksum", "inputs")
    }
    path.write_text(json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
    module_ = module(build("llama"), cached)
    module_.distill(plain)
    with pytest.raises(UsageError, match="lacks 4 of 4 samples"):
        module_.distill({**plain, "position_ids": torch.zeros(4, 11, dtype=torch.int64)})
