"""Write a teacher's cache with the Trainer, on whatever devices it has."""

import shutil
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from akl_lightning.batch import Batch, expect_transfer_hook, response_of, teacher_side
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.facts import data_of, facts_of
from akl_lightning.errors import UsageError, check_count
from akl_lightning.models.inputs import known_inputs
from akl_lightning.models.load import Precision
from akl_lightning.parallel import data_parallel_mesh, ending_together, gather_objects
from akl_lightning.projection import Projection
from akl_lightning.teachers.aligned import read_by_teacher
from akl_lightning.teachers.cache import format as folder
from akl_lightning.teachers.cache.codecs import find_codec
from akl_lightning.teachers.cache.reader import shows_progress, with_progress
from akl_lightning.teachers.cache.samples import DIGEST, sample_digests, tokens_per_sample
from akl_lightning.teachers.cache.splits import Data, EverySplit
from akl_lightning.teachers.cache.top_k import encode_top_k
from akl_lightning.teachers.fingerprint import digest, hub_revision, tokenizer_digests, weights_digest, whole
from akl_lightning.teachers.live import LiveTeacher

_INDEX_BYTES = 24
"""What a sample takes in its shard's index."""


class CacheWriter(LightningModule):
    """Its prediction loop writes a teacher's cache; run it with :func:`write_cache`.

    A shard is named after its checksum and appears complete or not at all. A run that was killed is started again, on
    as many devices as one likes: it checks the shards that are there and leaves out the samples they hold. More data
    are added to a finished cache in the same way.

    Args:
        teacher: a hub name, a local folder, a ``transformers`` config mapping, or a module.
        path: folder of the cache, which all devices share.
        codec: how hidden states are stored: ``bfloat16``, ``int8``, ``int4``, or the name of your own.
        top_k: store this many log-probabilities of the likeliest tokens instead of hidden states.
        shard_tokens: response tokens of a shard, which is kept in memory until it is full.
        trust_remote_code: run Python code that comes with the model.
        teacher_precision: of the weights of a teacher that is no module, as for the module.
        ignore_index: label of the positions that are no response positions, as the criterion's.

    Raises:
        UsageError: a teacher, codec or folder that cannot be used.
    """

    def __init__(
        self,
        teacher: nn.Module | dict[str, Any] | str,
        path: str,
        codec: str = "int8",
        top_k: int | None = None,
        shard_tokens: int = 2**16,
        trust_remote_code: bool = False,
        teacher_precision: Precision = "auto",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_count("top_k", top_k)
        check_count("shard_tokens", shard_tokens)
        self.codec = find_codec(codec)
        self.path = Path(path).expanduser()
        self.top_k = top_k
        self.shard_tokens = shard_tokens
        self.teacher = LiveTeacher(teacher, trust_remote_code, precision=teacher_precision)
        self.name = (
            teacher if isinstance(teacher, str) else getattr(teacher, "name_or_path", "") or type(teacher).__name__
        )
        self._criterion = DistillationCriterion(ignore_index=ignore_index)
        self._lock: FileLock | None = None
        self._bar = tqdm(disable=True)

    # ----------------------------------------------------------------------------------------------------------------
    # Before any work

    def setup(self, stage: str) -> None:
        """Look at the teacher, the folder, and the shards that are there."""
        # A second call has nothing of the first one's.
        self._known: set[bytes] = set()  # samples in complete shards, and those that this process has encoded
        self._shards: list[dict[str, Any]] = []  # entries of those that this process has checked or written
        self._parts: list[dict[str, Tensor]] = []  # of the shard to come, a batch each
        self._tokens = 0
        self._mistake: Exception | None = None  # of this rank's work
        with ending_together(self.trainer):
            folder.check_is_cache(self.path)
            if self.trainer.is_global_zero:
                self._lock = folder.reserve(self.path)
        # Where the strategy shards, no rank ever holds the whole of it.
        self.teacher.load(data_parallel_mesh(self.trainer.strategy))
        head = self._describe()
        with ending_together(self.trainer):
            folder.check_same(self.path, self._manifest)
            if self.trainer.is_global_zero:
                folder.begin(self.path, self._manifest, head)
        self._take_complete_shards()
        self.trainer.strategy.barrier("nobody writes before all have looked")
        if self.trainer.progress_bar_callback is not None:  # ours counts tokens
            self.trainer.progress_bar_callback.disable()
        expect_transfer_hook()

    def configure_model(self) -> None:
        """Do nothing: :meth:`setup`, which looks at the teacher, has sharded it already."""

    def _describe(self) -> bytes:
        """Start the manifest, and give the file of the output layer, which is empty with ``top_k``."""
        data = data_of(self.trainer)
        if not isinstance(data, EverySplit):
            raise UsageError("CacheWriter needs all splits of the data: run it with write_cache.")
        facts = facts_of(data.data)
        tokenizer, template, max_length = read_by_teacher(self.teacher, self.name, data.data, self.top_k)
        self.teacher.check_fits("teacher", tokenizer, max_length)
        model: Any = self.teacher.model.model
        logits = self._probe(model)
        head: dict[str, Tensor] = {}
        if self.top_k is None:
            layer = logits.head if isinstance(logits, Projection) else None
            if type(layer) is not nn.Linear:
                found = "" if layer is None else f" (it is a {type(layer).__name__}; merge an adapter into the model)"
                raise UsageError(
                    f"{type(model).__name__} has no linear output layer that turns its hidden states into its logits"
                    f"{found}: cache its top log-probabilities, with top_k."
                )
            head = {name: whole(tensor.detach()).contiguous() for name, tensor in layer.state_dict().items()}
            vocab_size = layer.out_features
            self._bytes_per_token = self.codec.bytes_per_token(layer.in_features)
        else:
            logits = logits if isinstance(logits, Tensor) else logits.logits()
            vocab_size = logits.shape[-1]
            if self.top_k >= vocab_size:
                raise UsageError(f"top_k must be less than the teacher's {vocab_size} outputs, got {self.top_k}.")
            self._bytes_per_token = sum(p.nbytes for p in encode_top_k(logits[:1], self.top_k).values())
        causal_lm = self.teacher.model.causal_lm
        content = save(head) if head else b""
        self.teacher.release()
        self._manifest: dict[str, Any] = {
            "format": folder.FORMAT,
            "complete": False,
            "teacher": {
                "name": self.name,
                "revision": hub_revision(self.name),
                "weights": weights_digest(model),
            },
            "tokenizer": None if tokenizer is None else tokenizer_digests(tokenizer),
            "template": template,
            "codec": self.codec.name if self.top_k is None else None,
            "top_k": self.top_k,
            "vocab_size": vocab_size,
            "inputs": None if causal_lm is None else sorted(known_inputs(causal_lm)),
            "soft_cap": logits.soft_cap if isinstance(logits, Projection) else None,
            "head": {"file": folder.HEAD, "sha256": digest(content), "bytes": len(content)} if head else None,
            "data": {"max_length": facts.max_length, "longest": self.teacher.longest},
            "shards": [],
        }
        return content

    def _probe(self, model: nn.Module) -> Tensor | Projection:
        """The logits of a few tokens; whether the model splits is looked at on the way."""
        parameter = next(model.parameters(), torch.empty(0))
        tokens = torch.arange(8, device=parameter.device)[None]
        return self.teacher({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens[0])

    def _take_complete_shards(self) -> None:
        """Check every shard that is there, the ranks sharing them out; a damaged one is removed and written again."""
        trainer = self.trainer
        files = sorted(self.path.glob("shard-*.safetensors"))[trainer.global_rank :: trainer.world_size]
        good: list[bytes] = []
        for file in with_progress(trainer, files, "Checking shards", "shard"):
            checksum = folder.file_digest(file)
            if file.name == folder.shard_name(checksum):
                shard = folder.open_shard(file)
                samples, tokens = len(shard["digests"]), int(shard["offsets"][-1])
                self._shards.append(folder.shard_entry(file, checksum, samples, tokens))
                good.append(shard["digests"].numpy().tobytes())
            else:
                file.unlink()
        for digests in chain.from_iterable(gather_objects(trainer, good)):
            self._known.update(digests[start : start + 16] for start in range(0, len(digests), 16))

    def on_predict_start(self) -> None:
        """Say how much there is to do and how large it will be, and refuse what does not fit the disk."""
        self.teacher.to(self.device)
        # Sharded, it needs all ranks at every call.
        self._together = any(isinstance(parameter, DTensor) for parameter in self.teacher.model.parameters())
        samples, tokens = self._count()
        size = tokens * self._bytes_per_token + samples * _INDEX_BYTES
        if not samples and not self._known:
            raise UsageError("the data have no response token, there is nothing to cache: look at their labels.")
        head = self._manifest["head"]
        rank_zero_info(
            f"Teacher's cache {self.path}: {samples:,} samples with {tokens:,} response tokens to write, "
            f"{len(self._known):,} samples are there; {_said(size)} at {self._bytes_per_token:,} bytes a token"
            + (f", and {_said(head['bytes'])} for the output layer" if head else "")
        )
        with ending_together(self.trainer):
            if size > (free := shutil.disk_usage(self.path).free):
                raise UsageError(
                    f"{_said(size)} do not fit on the disk of {self.path}, {_said(free)} are free: make room."
                )
        show = shows_progress(self.trainer)
        self._bar = tqdm(total=tokens, desc="Teacher", unit="token", unit_scale=True, disable=not show)
        self._start, self._done = time.perf_counter(), 0

    def _count(self) -> tuple[int, int]:
        """Samples and response tokens that are to be written, over all ranks."""
        ranks = self.trainer.world_size
        totals, seen = torch.zeros(2, dtype=torch.float64), set(self._known)
        with isolate_rng():  # a loader draws a seed
            batches = data_of(self.trainer).batches()
            for batch, is_share in with_progress(self.trainer, batches, "Counting tokens", "batch"):
                positions, digests = self._look_at(batch)
                counts = tokens_per_sample(batch, positions)
                for row in _unknown(digests, counts, seen):
                    totals += torch.tensor([1, counts[row]]) / (1 if is_share else ranks)
        totals = self.trainer.strategy.reduce(totals.to(self.device), reduce_op="sum")
        samples, tokens = totals.round().long().tolist()
        return samples, tokens

    # ----------------------------------------------------------------------------------------------------------------
    # The work

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> dict[str, Any]:
        """Look at a batch before the Trainer's precision has its way with it."""
        batch = teacher_side(batch)
        return {**batch, "cached": self._look_at(batch)}

    def _look_at(self, batch: Batch) -> tuple[Tensor, list[bytes]]:
        """Response positions, and digests of the samples.

        Raises:
            UsageError: an entry is missing, or the teacher cannot be given one.
        """
        positions, _ = response_of(batch, self._criterion)
        self.teacher.prepare(batch, positions)
        return positions, sample_digests(batch, positions, self._manifest["inputs"])

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> int:
        """Encode the samples of a batch that no shard holds yet; the number of their response tokens."""
        if self._mistake is not None and not self._together:
            return 0
        try:
            return self._cache(batch)
        except UsageError as error:
            # The others are told when they are through, with what they have written kept: each has batches of its own.
            self._mistake = error
            if self.trainer.world_size == 1:
                raise
            return 0

    def _cache(self, batch: Batch) -> int:
        positions, digests = batch["cached"]
        counts = tokens_per_sample(batch, positions)
        asked = rows = _unknown(digests, counts, self._known)
        if self._together and self.trainer.strategy.reduce_boolean_decision(bool(rows), all=False):
            asked = rows or [0]
        if not asked:
            return 0
        part: Batch = batch  # with all that it carries
        if len(counts) > 1:
            rows_of = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
            part = {name: value[asked] for name, value in rows_of.items() if len(value) == len(counts)}
        logits = self.teacher(part, response_of(part, self._criterion).positions)
        if not rows:
            return 0
        parts = self._encode(logits)
        self.teacher.release()
        lengths = [counts[row] for row in rows]
        words = np.array([digests[row] for row in rows], DIGEST).view("<i8").reshape(-1, 2)
        self._parts.append({**parts, "digests": torch.from_numpy(words), "offsets": torch.tensor(lengths)})
        tokens = sum(lengths)
        self._tokens += tokens
        self._done += tokens
        self._bar.update(min(tokens * self.trainer.world_size, self._bar.total - self._bar.n))
        if self._tokens >= self.shard_tokens:
            self._flush()
        return tokens

    def _encode(self, logits: Tensor | Projection) -> dict[str, Tensor]:
        if self.top_k is not None:
            parts = encode_top_k(logits, self.top_k)
            finite = not parts["log_probs"].isnan().any()
        else:
            assert isinstance(logits, Projection)
            finite = bool(logits.hidden.isfinite().all())
            parts = self.codec.encode(logits.hidden)
        if not finite:
            raise UsageError(f"the teacher {self.name} gives NaN or infinite values: load it in another precision.")
        return {name: part.cpu() for name, part in parts.items()}

    def _flush(self) -> None:
        if not self._parts:
            return
        tensors = {name: torch.cat([parts[name] for parts in self._parts]) for name in self._parts[0]}
        lengths = tensors["offsets"]
        content = save({**tensors, "offsets": pad(lengths.cumsum(0), (1, 0))})
        checksum = digest(content)
        file = self.path / folder.shard_name(checksum)
        folder.write_file(file, content)
        self._shards.append(folder.shard_entry(file, checksum, len(lengths), self._tokens))
        self._parts, self._tokens = [], 0

    def on_predict_end(self) -> None:
        """Write the last shard, and the manifest that makes the cache a finished one."""
        with ending_together(self.trainer):
            if self._mistake is not None:
                raise self._mistake
            self._flush()
        shards = list(chain.from_iterable(gather_objects(self.trainer, self._shards)))
        done = sum(gather_objects(self.trainer, self._done))
        seconds = time.perf_counter() - self._start
        self._bar.close()
        with ending_together(self.trainer):
            if self.trainer.is_global_zero:
                self._finish(shards)
        rank_zero_info(
            f"Teacher's cache {self.path}: {done:,} tokens written in {seconds:,.0f} s, {done / seconds:,.0f} a "
            f"second; {len(shards)} shards of {_said(sum(entry['bytes'] for entry in shards))}"
        )

    def _finish(self, shards: list[dict[str, Any]]) -> None:
        shards.sort(key=lambda entry: entry["file"])
        words = np.concatenate([folder.open_shard(self.path / entry["file"])["digests"].numpy() for entry in shards])
        unique = np.unique(words, axis=0)
        self._manifest["data"] |= {
            "samples": len(unique),
            "tokens": sum(entry["tokens"] for entry in shards),
            "digest": digest(unique.tobytes()),
        }
        folder.write_manifest(self.path, {**self._manifest, "complete": True, "shards": shards})

    def close(self) -> None:
        """Let another run have the folder, and messages a line of their own."""
        self._bar.close()
        if self._lock is not None:
            folder.give_back(self.path, self._lock)


def write_cache(writer: CacheWriter, data: Data, trainer: Trainer) -> Path:
    """Write a teacher's cache: ``akl cache`` as a function.

    Args:
        writer: says of which teacher, where and how.
        data: gives the samples, those of train, validation and test.
        trainer: runs the teacher on its devices.

    Returns:
        The folder, for ``DistillationModule(teacher=f"cache:{path}")``.
    """
    try:
        trainer.predict(writer, datamodule=EverySplit(data), return_predictions=False)
    finally:
        writer.close()
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.enable()
    return writer.path


def _unknown(digests: list[bytes], counts: list[int], known: set[bytes]) -> list[int]:
    """Rows of the samples with response tokens that are not known yet; they are from now on."""
    rows = []
    for row, (of_row, count) in enumerate(zip(digests, counts, strict=True)):
        if count and of_row not in known:
            known.add(of_row)
            rows.append(row)
    return rows


def _said(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
