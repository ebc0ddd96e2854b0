"""A model's answers in a JSON Lines file, which a run that was broken off goes on from."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from torch import Tensor

from akl_lightning.checkpoint import atomic_file, check_writable
from akl_lightning.data.messages import content_text
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sampler import FILLER
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.parallel import ending_together, gather_objects

Record = dict[str, Any]
"""``instruction`` and ``input``, of a longer conversation ``messages`` and ``tools`` beside the whole of it as
``instruction``; ``prompt``, ``references``, ``answer``, ``cut`` (whether it was cut off at ``max_new_tokens``),
``seed`` (None for greedy), and the settings: ``model`` (digest of its weights), ``max_new_tokens``, ``temperature`` (0
for greedy), ``top_p``."""

_SETTINGS = ("model", "max_new_tokens", "temperature", "top_p")


class AnswerFile:
    """The answers of one model to the prompts of a split.

    While a run is on, each process appends to a file of its own beside ``path`` (``.part0`` and so on); in the end
    they become one.

    Args:
        path: the file.
        model: what tells the model from others, a digest of its weights.
        decoding: how its answers are decoded.
    """

    def __init__(self, path: str | Path, model: str, decoding: Decoding) -> None:
        self.path = Path(path)
        self.decoding = decoding
        sampled = bool(decoding.seeds)
        self.settings = dict(
            zip(
                _SETTINGS,
                (
                    model[:16],
                    decoding.max_new_tokens,
                    decoding.temperature if sampled else 0.0,
                    decoding.top_p if sampled else 1.0,
                ),
                strict=True,
            )
        )
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0)
        self._records: dict[tuple[str, int | None], Record] = {}
        self._new: list[Record] = []
        self._seen: dict[int, None] = {}

    def open(self, trainer: Trainer) -> None:
        """Read what is there already. Called on every rank.

        Raises:
            UsageError: the file cannot be read or written, is being written, or holds answers of other settings.
        """
        try:
            with ending_together(trainer), self._explained():
                found = self._look(trainer)
            # Nobody writes before all have read.
            with ending_together(trainer), self._explained():
                part = self.path.with_name(f"{self.path.name}.part{trainer.global_rank}")
                self._part = part.open("a", encoding="utf-8")
                self._part.write("\n")  # after a line that a kill has cut off
        except BaseException:
            self._lock.release()
            raise
        # The ranks of a node have read the same files.
        nodes = gather_objects(trainer, found if trainer.local_rank == 0 else [])
        self._keep(record for records in nodes for record in records)

    def _look(self, trainer: Trainer) -> list[Record]:
        check_writable(self.path.parent)
        if trainer.local_rank == 0:
            try:
                self._lock.acquire()
            except Timeout as error:
                raise UsageError(
                    f"another run is writing answers to {self.path}: wait for it, or give another path."
                ) from error
        found = [record for file in (self.path, *self._parts()) if file.exists() for record in _read(file)]
        for record in found:
            differing = [name for name in _SETTINGS if record.get(name) != self.settings[name]]
            if differing:
                said = " and ".join(f"{name} {record.get(name)} (now {self.settings[name]})" for name in differing)
                raise UsageError(f"{self.path} holds answers with {said}: give another path.")
        return found

    def answer(
        self,
        trainer: Trainer,
        data: InstructionDataModule,
        indices: list[int],
        split: str,
        generate: Callable[..., Tensor],
        ends: Sequence[int],
        together: bool = False,
    ) -> None:
        """Answer the prompts of a batch that have no answer yet, and write the answers down.

        Args:
            trainer: of the run.
            data: has the prompts.
            indices: of the samples in the split.
            split: which one.
            generate: takes left-padded prompts and settings of ``generate``, gives token ids ``[batch, new_tokens]``.
            ends: the tokens with which an answer ends.
            together: ranks have to generate at the same time, because the model is sharded over them.
        """
        rows = {index: data.splits[split][index] for index in indices if index != FILLER}
        rows = {index: row for index, row in rows.items() if row["prompt_ids"]}  # a document asks nothing
        self._seen |= dict.fromkeys(rows)
        mistake: UsageError | None = None
        for seed in self.decoding.seeds or (None,):
            missing = {i: row for i, row in rows.items() if (row["prompt"], seed) not in self._records}
            if together and trainer.strategy.reduce_boolean_decision(bool(missing), all=False):
                asked = list(missing.values()) or [data.splits[split][0]]
            elif missing:
                asked = list(missing.values())
            else:
                continue
            batch = data.collate_prompts([{"index": FILLER, **row} for row in asked])
            batch = {name: tensor.to(trainer.strategy.root_device) for name, tensor in batch.items()}
            tokens = generate(batch, **self.decoding.arguments([row["prompt"] for row in asked], seed))
            texts = data.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).any(-1).tolist()
            # Asked may be a row that only keeps the others company.
            records = [
                {
                    **question(row),
                    "prompt": row["prompt"],
                    "references": references(row),
                    "answer": text.strip(),
                    "cut": not end,
                    "seed": seed,
                    **self.settings,
                }
                for row, text, end in zip(missing.values(), texts, ended, strict=False)
            ]
            self._keep(records)
            self._new += records
            try:
                with self._explained():
                    self._part.writelines(_line(record) for record in records)
                    self._part.flush()
                    os.fsync(self._part.fileno())
            except UsageError as error:
                mistake = error
        # Every rank comes here, however many of its prompts had an answer.
        with ending_together(trainer):
            if mistake is not None:
                raise mistake

    def close(self, trainer: Trainer, data: InstructionDataModule, split: str) -> list[list[Record]]:
        """Make one file of the processes' own. Called on every rank.

        Returns:
            For each sample that was seen its answers, one for each seed; the same on every rank.
        """
        self._part.close()
        parts = gather_objects(trainer, (list(self._seen), self._new))
        for _, records in parts:
            self._keep(records)
        seen = sorted({index for indices, _ in parts for index in indices})
        # Samples may share a prompt, and differ in what is expected of it.
        groups = [
            [
                {**self._records[row["prompt"], seed], "references": references(row)}
                for seed in self.decoding.seeds or (None,)
            ]
            for row in (data.splits[split][index] for index in seen)
        ]
        written = {(record["prompt"], record["seed"]) for group in groups for record in group}
        others = [record for key, record in self._records.items() if key not in written]  # of an earlier run
        with ending_together(trainer), self._explained():
            if trainer.is_global_zero:
                unique = {(record["prompt"], record["seed"]): record for group in [*groups, others] for record in group}
                with atomic_file(self.path) as file, file.open("w", encoding="utf-8") as lines:
                    lines.writelines(_line(record) for record in unique.values())
        if trainer.local_rank == 0:
            for part in self._parts():
                part.unlink(missing_ok=True)
            self._lock.release()
        return groups

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"cannot write answers to {self.path} ({error.strerror}): make room or give another path; what is "
                "answered so far is kept."
            ) from error

    def _keep(self, records: Iterable[Record]) -> None:
        self._records |= {(record["prompt"], record["seed"]): record for record in records}

    def _parts(self) -> list[Path]:
        return sorted(file for file in self.path.parent.iterdir() if file.name.startswith(f"{self.path.name}.part"))


def question(row: Mapping[str, Any]) -> Record:
    """What a sample asks, in the fields that :class:`~akl_lightning.data.sources.Files` reads it from again."""
    messages, _ = _question_and_reply(row)
    if [message["role"] for message in messages] == ["user"] and not row["tools"]:
        (message,) = messages
        return {"instruction": content_text(message), "input": message.get("input", "")}
    said = [f"{message['role']}: {content_text(message)}" for message in messages]
    tools = {"tools": json.loads(row["tools"])} if row["tools"] else {}
    return {"instruction": "\n\n".join(said), "input": "", "messages": messages, **tools}


def references(row: Mapping[str, Any]) -> list[str]:
    """The acceptable answers of a sample; none of a prompt alone."""
    _, reply = _question_and_reply(row)
    text = "" if reply is None else content_text(reply)
    return list(row["references"]) or [text] * bool(text.strip())


def _question_and_reply(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The messages before the last turn of the assistant, and that turn, if there is one."""
    messages = json.loads(row["messages"])
    return (messages[:-1], messages[-1]) if messages[-1]["role"] == "assistant" else (messages, None)


def read_answers(path: str | Path) -> list[Record]:
    """The records of a file of answers.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no file of answers {path}: give the one that akl generate or akl test has written.")
    return _read(Path(path))


def _read(file: Path) -> list[Record]:
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record["prompt"], record["answer"], record["seed"]
        except (ValueError, KeyError, TypeError) as error:
            if ".part" in file.suffix:  # cut off when a process was killed
                continue
            raise UsageError(f"{file}, line {number} is no answer ({error!r}): mend or remove the line.") from error
        records.append(record)
    return records


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
