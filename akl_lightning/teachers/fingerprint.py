"""What makes two teachers or tokenizers the same: digests that a cache is compared by."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Digest of all parameters and buffers, names and precision included; called on all ranks, where it is sharded."""
    total = hashlib.sha256()
    quiet = getattr(rank_zero_only, "rank", 0) != 0
    tensors = sorted(model.state_dict().items())
    for name, tensor in tqdm(tensors, desc="Digest of the weights", leave=False, disable=quiet, delay=1):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(_content(tensor))
    return total.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Digest of a tensor, its shape and precision; called on all ranks, where it is sharded."""
    return digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + hashlib.sha256(_content(tensor)).digest())[:32]


def _content(tensor: Tensor) -> memoryview:
    return whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data


def hub_revision(name: str) -> str | None:
    """The commit of the hub that lies in its cache under a name, or None for what is not of the hub."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path, which cannot be a name there
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered on every rank, where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of what decides the tokens of a text, by what it is."""
    parts: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        model = described["model"]
        parts["merges"] = [model["type"], model.get("merges")]
        parts |= {name: described[name] for name in ("normalizer", "pre_tokenizer", "post_processor")}
    return {name: digest(json.dumps(part, sort_keys=True).encode()) for name, part in parts.items()}
