"""Instruction data for the Trainer."""

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import datasets
import tokenizers
import torch
import transformers
from jsonargparse import lazy_instance
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from akl_lightning.checkpoint import check_writable
from akl_lightning.data.chat import CHAT, render, render_chat, template_digest
from akl_lightning.data.collate import Row, Rows, collate, collate_prompts
from akl_lightning.data.sampler import StepSampler, accumulated
from akl_lightning.data.sources import Docstrings, Pair, Source
from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_tokenizer


class InstructionDataModule(LightningDataModule):
    """Instruction pairs as batches of ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``.

    The prompt's labels are -100; the response ends with the end-of-text token, and where there is none nothing is to be
    learnt. Batches are padded to their longest member; ``index`` says which samples of the split they hold. The loaders
    of train, validation and test serve each sample exactly once whatever the number of devices; the predict loader
    gives prompts, left-padded.

    Args:
        tokenizer: a tokenizer, or the hub name or local folder of one; on the command line that of the first model that
            has a name, unless it is given.
        source: where the pairs come from.
        template: prompt template: ``plain``, ``alpaca``, ``chat`` (the tokenizer's own), or a text with
            ``{instruction}`` and ``{input}`` in it.
        batch_size: samples of a micro-batch, per device.
        max_length: tokens of a sample; longer responses are cut.
        max_prompt_length: tokens of a prompt; samples with a longer one are dropped. None for ``max_length`` - 1.
        validation_size: validation samples, as a number or a share, where the source has no such split.
        test_size: test samples, as a number or a share, where the source has no such split.
        group_by_length: let samples of a step be of similar length, which saves padding.
        num_workers: processes that prepare batches, and that tokenize where there is much of it. Tokens are kept in the
            cache of ``datasets`` and found there by later runs.
        predict_split: whose prompts are predicted.
        seed: of the order of the samples.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        UsageError: a tokenizer or source that cannot be read, or no usable sample left.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str,
        source: Source = lazy_instance(Docstrings),  # noqa: B008 (how jsonargparse wants a default)
        template: str = "plain",
        batch_size: int = 32,
        max_length: int = 256,
        max_prompt_length: int | None = None,
        validation_size: int | float = 0.05,
        test_size: int | float = 0.05,
        group_by_length: bool = True,
        num_workers: int = 0,
        predict_split: Literal["train", "validation", "test"] = "test",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer, trust_remote_code) if isinstance(tokenizer, str) else tokenizer
        if self.tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end-of-text token (eos_token): set one, responses end with it.")
        if template != CHAT:
            render(template, "")
        elif not self.tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template: use the template plain or alpaca, or another one.")
        else:
            render_chat(self.tokenizer, "Say one")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise UsageError(f"data.{name} must be 1 or more, got {value}.")
        if num_workers < 0:
            raise UsageError(f"data.num_workers must be 0 or more, got {num_workers}.")
        _check_sizes(validation_size, test_size)
        if max_prompt_length is not None and max_prompt_length >= max_length:
            raise UsageError(
                f"data.max_prompt_length = {max_prompt_length} leaves no token of data.max_length = {max_length} for a "
                "response: lower it, or raise the other."
            )
        self.source = source
        self.template = template
        self.batch_size = batch_size
        self.max_length = max_length
        self.max_prompt_length = max_length - 1 if max_prompt_length is None else max_prompt_length
        self.validation_size = validation_size
        self.test_size = test_size
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self.predict_split = predict_split
        self.seed = seed
        self.splits: dict[str, datasets.Dataset] = {}

    def setup(self, stage: str) -> None:
        """Load, split and tokenize, once."""
        if not self.splits:
            pairs = split_pairs(self.source.load(), self.validation_size, self.test_size)
            self.splits = {split: self._tokenize(split, members) for split, members in pairs.items()}
        if self.trainer is None or stage not in ("fit", "test", "predict"):
            return
        # Whoever caches all splits sets them up in a prediction.
        of_stage = {"fit": "train", "test": "test", "predict": self.predict_split}[stage]
        if self.trainer.state.fn == stage and not len(self.splits[of_stage]):
            raise UsageError(
                f"{type(self.source).__name__} gives no {of_stage} pairs: give another data.source, or one with a "
                f"{of_stage} split."
            )

    def check_answers_fit(self, split: str, setting: str, max_new_tokens: int, positions: int | None) -> None:
        """Check that a model has positions for the longest prompt of a split and an answer to it.

        Args:
            split: whose prompts are answered.
            setting: the name of ``max_new_tokens`` where the user sets it.
            max_new_tokens: tokens of an answer.
            positions: of the model; None where it has no bound.

        Raises:
            UsageError: it has not.
        """
        longest = max(self.splits[split]["prompt_length"], default=0)
        if positions and longest + max_new_tokens > positions:
            room = positions - longest
            way_out = f"lower {setting} to {room}" if room > 0 else "lower data.max_prompt_length"
            raise UsageError(
                f"the longest {split} prompt, {longest} tokens, and an answer of {setting} = {max_new_tokens} are "
                f"beyond the {positions} positions of the model: {way_out}."
            )

    def _tokenize(self, split: str, pairs: list[Pair]) -> datasets.Dataset:
        if not pairs:
            return datasets.Dataset.from_dict({"prompt_ids": [], "response_ids": [], "prompt_length": [], "length": []})
        data = datasets.Dataset.from_list([asdict(pair) for pair in pairs])
        settings = {"tokenizer": self.tokenizer, "template": self.template, "max_length": self.max_length}
        tokens = datasets.List(datasets.Value("int64"))  # which nothing tells where all responses are empty
        columns = {"prompt_ids": tokens, "response_ids": tokens}
        columns |= {"prompt": datasets.Value("string")} | dict.fromkeys(("prompt_length", "length"), tokens.feature)
        features = datasets.Features({**data.features, **columns})
        data = data.map(
            _encode,
            batched=True,
            fn_kwargs=settings,
            # A process wants a batch of its own.
            num_proc=min(self.num_workers, len(data) // 1000) or None,
            cache_file_name=self._cache_file(pairs),
            features=features,
            desc=f"Tokenizing {split}",
        )
        fits = data.select([i for i, length in enumerate(data["prompt_length"]) if length <= self.max_prompt_length])
        if len(fits) < len(data):
            rank_zero_info(
                f"{split}: {len(data) - len(fits)} of {len(data)} samples dropped, their prompts are longer than "
                f"{self.max_prompt_length} tokens"
            )
        if not len(fits):
            bound = "data.max_prompt_length" if self.max_prompt_length < self.max_length - 1 else "data.max_length"
            raise UsageError(
                f"no usable {split} sample left: every prompt is longer than {self.max_prompt_length} tokens; raise "
                f"{bound}, the shortest has {min(data['prompt_length'])}."
            )
        return fits

    def _cache_file(self, pairs: list[Pair]) -> str | None:
        """Where ``datasets`` keeps the tokens of these pairs, which lie in memory, by a name of all they depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not datasets.is_caching_enabled():
            return None
        # Its own fingerprint changes with the padding and truncation that the last call has left in the tokenizer.
        described = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        depends_on = [
            [asdict(pair) for pair in pairs],
            [described, self.tokenizer.eos_token_id, self.template_digest, self.max_length],
            [inspect.getsource(_encode), transformers.__version__, tokenizers.__version__],
        ]
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "akl_lightning"
        check_writable(folder)
        return str(folder / f"{hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()}.arrow")

    # ----------------------------------------------------------------------------------------------------------------
    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Batches of the train split, shuffled."""
        return self._loader("train", self._collate, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split."""
        return self._loader("validation", self._collate)

    def test_dataloader(self) -> DataLoader:
        """Batches of the test split."""
        return self._loader("test", self._collate)

    def samples(self, split: str, batch_size: int = 256) -> Iterator[dict[str, Tensor]]:
        """Every sample of a split once, on every rank alike, as batches; for looking at them before training."""
        rows = Rows(self.splits[split].select_columns(["prompt_ids", "response_ids"]))
        for start in range(0, len(rows), batch_size):
            yield self._collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])

    def predict_dataloader(self) -> DataLoader:
        """Prompts of ``predict_split``, left-padded, with the ``index`` of each in the split, -1 in fillers."""
        return self._loader(self.predict_split, self.collate_prompts)

    def _loader(self, split: str, collate: Any, shuffle: bool = False) -> DataLoader:
        data, batch_size = self.splits[split], self.batch_size
        trainer = self.trainer
        ranks = trainer.world_size if trainer else 1

        def step_size(epoch: int) -> int:
            return batch_size * ranks * (accumulated(trainer, epoch) if trainer and split == "train" else 1)

        sampler = StepSampler(
            list(data["length"]),
            batch_size,
            step_size,
            ranks,
            trainer.global_rank if trainer else 0,
            shuffle=shuffle,
            group_by_length=self.group_by_length,
            seed=self.seed,
        )
        # The Trainer says which epoch it is too late for a resumed loader, which goes through its order at once.
        sampler.set_epoch(trainer.current_epoch if trainer else 0)
        return StatefulDataLoader(
            Rows(data.select_columns(["prompt_ids", "response_ids"])),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            # Each iterator draws a seed for its workers; out of the global generator, a resumed run, which makes other
            # iterators, would go on with other random numbers.
            generator=torch.Generator().manual_seed(self.seed),
        )

    @property
    def template_digest(self) -> str:
        """What tells the prompts of the template from those of others."""
        return template_digest(self.template, self.tokenizer)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _collate(self, rows: list[Row]) -> dict[str, Tensor]:
        return collate(rows, self.pad_id)

    def collate_prompts(self, rows: list[Row]) -> dict[str, Tensor]:
        """Rows of a split, each with its ``index``, as left-padded prompts."""
        return collate_prompts(rows, self.pad_id)


# A function of its arguments alone, which name the file that its result is cached in.
def _encode(
    pairs: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, template: str, max_length: int
) -> dict[str, list[Any]]:
    tasks = list(zip(pairs["instruction"], pairs["input"], strict=True))
    if template == CHAT:
        prompts = [render_chat(tokenizer, f"{task}\n{given}" if given else task) for task, given in tasks]
    else:
        prompts = [render(template, task, given) for task, given in tasks]
    # A chat template writes its own special tokens.
    prompt_ids = tokenizer(prompts, add_special_tokens=template != CHAT)["input_ids"]
    responses = tokenizer(list(pairs["output"]), add_special_tokens=False)["input_ids"]
    response_ids = [
        [*response, *([] if cut else [tokenizer.eos_token_id])][: max(0, max_length - len(prompt))]
        if output.strip()
        else []
        for prompt, response, output, cut in zip(prompt_ids, responses, pairs["output"], pairs["cut"], strict=True)
    ]
    return {
        "prompt": prompts,
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
        "prompt_length": [len(prompt) for prompt in prompt_ids],
        "length": [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)],
    }


def split_pairs(
    pairs: Mapping[str, list[Pair]], validation_size: int | float, test_size: int | float
) -> dict[str, list[Pair]]:
    """Fill the missing splits from the training pairs, by a hash of each pair's name.

    Args:
        pairs: under ``train``, and perhaps under ``validation`` and ``test``; or under ``test`` alone.
        validation_size: a number (int) or a share (float) of the training pairs.
        test_size: likewise.

    Returns:
        All three splits; which pair goes where depends on nothing but its name and, for numbers, on its peers.

    Raises:
        UsageError: a size below 0, or nothing would be left to train on.
    """
    _check_sizes(validation_size, test_size)
    splits = {split: list(members) for split, members in pairs.items()}
    if "train" not in splits:  # a test set
        return {"train": [], "validation": [], **splits}
    train = sorted(splits["train"], key=_digest)
    count, used = len(train), 0
    for split, size in (("validation", validation_size), ("test", test_size)):
        if split not in splits:
            number = size if isinstance(size, int) else round(size * count)
            splits[split] = train[used : used + number]
            used += number
    if used >= count:
        raise UsageError(
            f"{used} validation and test samples leave none of {count} to train on: lower data.validation_size and "
            f"data.test_size, here {validation_size} and {test_size}."
        )
    held_out = set(train[:used])
    splits["train"] = [pair for pair in splits["train"] if pair not in held_out]
    return splits


def _check_sizes(validation_size: int | float, test_size: int | float) -> None:
    for name, size in (("validation_size", validation_size), ("test_size", test_size)):
        if not 0 <= size < math.inf:  # which nan is not, either
            raise UsageError(f"data.{name} must be a number of samples or a share of them, 0 or more, got {size}.")


def _digest(pair: Pair) -> bytes:
    return hashlib.sha256((pair.name or f"{pair.instruction}\0{pair.input}").encode()).digest()
