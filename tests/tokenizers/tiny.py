"""Tokenizers small enough to be split by hand, in the forms that others are published in."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"


def fast(backend: Tokenizer, special: Sequence[str] = (END,)) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0] if special else None)


def byte_level(
    merges: Sequence[str] = (), special: Sequence[str] = (END,), order: int = 1, **settings: object
) -> PreTrainedTokenizerFast:
    """Every byte and what merges make of them (``"a b"``, Ġ for a space), as GPT-2's; perhaps in another order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *("".join(merge.split()) for merge in merges)][::order]
    pairs = [tuple(merge.split()) for merge in merges]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, pairs, **settings))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend, special)


def sentencepiece(pieces: Sequence[str], merges: Sequence[str] = (), fallback: bool = True) -> PreTrainedTokenizerFast:
    """As Llama's first one: ▁ for a space, one before every text, and bytes for what no piece says."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if fallback), *pieces]
    vocabulary += ["".join(merge.split()) for merge in merges]
    pairs = [tuple(merge.split()) for merge in merges]
    model = models.BPE(
        {token: i for i, token in enumerate(vocabulary)},
        pairs,
        unk_token="<unk>",
        byte_fallback=fallback,
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(backend)
