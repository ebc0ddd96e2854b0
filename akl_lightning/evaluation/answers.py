"""A model's answers in a JSON Lines file, which a run that was broken off goes on from."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from akl_lightning.checkpoint import atomic_file, check_writable
from akl_lightning.data.facts import data_of, facts_of
from akl_lightning.data.files import json_lines
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.records import content_text
from akl_lightning.data.sampler import FILLER
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.models.generation import up_to_end
from akl_lightning.models.split import SplitModel
from akl_lightning.parallel import ending_together, gather_objects
from akl_lightning.teachers import fingerprint

Record = dict[str, Any]
"""``instruction`` and ``input``, of a longer conversation ``messages`` and ``tools`` beside the whole of it as
``instruction``; ``prompt``, ``references``, ``answer``, ``cut`` (whether it was cut off at ``max_new_tokens``),
``seed`` (None for greedy), and the settings: ``model`` (digest of its weights), ``max_new_tokens``, ``temperature`` (0
for greedy), ``top_p``."""


class AnswerFile:
    """The answers of one model to the prompts of a split, with what is there already. Made on every rank.

    While a run is on, rank 0 appends those of every rank to a file beside ``path`` (``.part0``), which is put in order
    in the end.

    Args:
        trainer: of the run.
        split: of its :class:`~akl_lightning.data.module.InstructionDataModule`.
        path: the file.
        model: what tells the model from others, a digest of its weights.
        decoding: how its answers are decoded.

    Raises:
        UsageError: the file cannot be read or written, is being written, or holds answers of other settings.
    """

    def __init__(self, trainer: Trainer, split: str, path: str | Path, model: str, decoding: Decoding) -> None:
        self.trainer = trainer
        self.split = split
        self.path = Path(path)
        self.decoding = decoding
        self.settings = {
            "model": model[:16],
            "max_new_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature if decoding.seeds else 0.0,
            "top_p": decoding.top_p if decoding.seeds else 1.0,
        }
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0)
        self._records: dict[tuple[str, int | None], Record] = {}
        self._seen: set[int] = set()
        found: list[Record] = []
        try:
            with ending_together(trainer), self._explained():
                if trainer.is_global_zero:
                    found = self._look()
                    self._part = self.path.with_name(f"{self.path.name}.part0").open("a", encoding="utf-8")
                    self._part.write("\n")  # after a line that a kill has cut off
        except BaseException:
            self._lock.release()
            raise
        self._keep(gather_objects(trainer, found)[0])

    def _look(self) -> list[Record]:
        """What is there already."""
        check_writable(self.path.parent)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"another run is writing answers to {self.path}: wait for it, or give another path."
            ) from error
        found = [record for file in (self.path, *self._parts()) if file.exists() for record in _read(file)]
        for record in found:
            differing = [name for name in self.settings if record.get(name) != self.settings[name]]
            if differing:
                said = " and ".join(f"{name} {record.get(name)} (now {self.settings[name]})" for name in differing)
                raise UsageError(f"{self.path} holds answers with {said}: give another path.")
        return found

    def answer(self, indices: list[int], model: SplitModel, generate: Callable[..., Tensor]) -> None:
        """Answer the prompts of a batch that have no answer yet, and write the answers down. Called on every rank.

        Args:
            indices: of the samples in the split.
            model: which answers.
            generate: takes left-padded prompts and settings of ``generate``, gives token ids ``[batch, new_tokens]``.
        """
        data, trainer = prompts_of(self.trainer), self.trainer
        ends = model.stop_tokens(data.tokenizer, facts_of(data).end_tokens)
        samples = data.splits[self.split]
        rows = {index: samples[index] for index in indices if index != FILLER}
        rows = {index: row for index, row in rows.items() if row["prompt_ids"]}  # a document asks nothing
        self._seen.update(rows)
        for seed in self.decoding.seeds or (None,):
            missing = [row for row in rows.values() if (row["prompt"], seed) not in self._records]
            if not trainer.strategy.reduce_boolean_decision(bool(missing), all=False):
                continue
            # Where others have something to answer, they may need the company: the model may be sharded.
            asked = missing or [next(row for row in samples if row["prompt_ids"])]
            batch = data.collate_prompts([{"index": FILLER, **row} for row in asked])
            batch = {name: tensor.to(trainer.strategy.root_device) for name, tensor in batch.items()}
            tokens = generate(batch, **self.decoding.arguments([row["prompt"] for row in asked], seed)).tolist()
            said = [up_to_end(row, ends) for row in tokens]
            texts = data.tokenizer.batch_decode(said, skip_special_tokens=True)
            answered = [
                {
                    **question(row),
                    "prompt": row["prompt"],
                    "references": references(row),
                    "answer": text.strip(),
                    "cut": own == whole,
                    "seed": seed,
                    **self.settings,
                }
                for row, text, own, whole in zip(missing, texts, said, tokens, strict=False)
            ]
            records = [record for part in gather_objects(trainer, answered) for record in part]
            self._keep(records)
            with ending_together(trainer), self._explained():
                if trainer.is_global_zero:
                    self._part.writelines(_line(record) for record in records)
                    self._part.flush()
                    os.fsync(self._part.fileno())

    def close(self) -> list[list[Record]]:
        """Write the file itself. Called on every rank.

        Returns:
            For each sample that was seen its answers, one for each seed; the same on every rank.
        """
        samples = prompts_of(self.trainer).splits[self.split]
        seen = sorted(set().union(*gather_objects(self.trainer, self._seen)))
        # Samples may share a prompt, and differ in what is expected of it.
        groups = [
            [
                {**self._records[row["prompt"], seed], "references": references(row)}
                for seed in self.decoding.seeds or (None,)
            ]
            for row in (samples[index] for index in seen)
        ]
        written = {(record["prompt"], record["seed"]): record for group in groups for record in group}
        others = {key: record for key, record in self._records.items() if key not in written}  # of an earlier run
        with ending_together(self.trainer), self._explained():
            if self.trainer.is_global_zero:
                with atomic_file(self.path) as file, file.open("w", encoding="utf-8") as lines:
                    lines.writelines(_line(record) for record in (written | others).values())
                self._part.close()
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


def prompts_of(trainer: Trainer) -> InstructionDataModule:
    """The data module of a run, which has prompts.

    Raises:
        UsageError: it is none that has.
    """
    data = data_of(trainer)
    if not isinstance(data, InstructionDataModule):
        raise UsageError("answers need prompts and references: give the Trainer an InstructionDataModule.")
    return data


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


# --------------------------------------------------------------------------------------------------------------------
# Two models' answers to the same prompts

Prompt = tuple[str, str, int | None, int]
"""Instruction, input, seed, and a number that tells lines apart that are equal in all three."""


class AnswerPair(NamedTuple):
    """The answers of two models to one prompt."""

    prompt: Prompt
    a: str
    b: str


def answers_by_prompt(path: Path) -> dict[Prompt, str]:
    """The answers in a JSON Lines file with ``instruction``, ``input``, ``seed`` and ``answer`` on each line.

    ``input`` and ``seed`` may be missing, and ``seed`` may be null.

    Raises:
        UsageError: there is no such file, no answer in it, or a line that is no answer.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}: give the JSON Lines file of a model's answers.")
    answers: dict[Prompt, str] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for record, where in json_lines(path):
        record = {"input": "", "seed": None, **record}
        for name in ("instruction", "input", "answer"):
            if not isinstance(record.get(name), str):
                raise UsageError(f"{where} has no text under {name!r}: mend or remove the line.")
        if type(record["seed"]) not in (int, type(None)):
            raise UsageError(f"{where} has {record['seed']!r} as its seed: write a whole number or null.")
        same = (record["instruction"], record["input"], record["seed"])
        answers[(*same, seen[same])] = record["answer"]
        seen[same] += 1
    if not answers:
        raise UsageError(f"{path} holds no answer: give the JSON Lines file of a model's answers.")
    return answers


def pair_answers(path_a: str, path_b: str) -> tuple[list[AnswerPair], dict[str, Any]]:
    """The pairs of answers to the same instruction and input with the same seed, in the order of the first file.

    What has no counterpart is left out with a warning.

    Returns:
        The pairs, and what the result says of the files.

    Raises:
        UsageError: there is no pair, or no answer in a file.
    """
    a, b = answers_by_prompt(Path(path_a)), answers_by_prompt(Path(path_b))
    pairs = [AnswerPair(prompt, a[prompt], b[prompt]) for prompt in a if prompt in b]
    for mine, theirs, here, there in ((a, b, path_a, path_b), (b, a, path_b, path_a)):
        alone = [f"{prompt[0][:60]!r} with seed {prompt[2]}" for prompt in mine if prompt not in theirs]
        if alone and not pairs:
            raise UsageError(
                f"{path_a} and {path_b} have no instruction, input and seed in common ({alone[0]} is only in {here}): "
                "give answers to the same prompts."
            )
        if alone:
            rank_zero_warn(
                f"{len(alone)} of {len(mine)} answers in {here} have no counterpart in {there} and are left out; the "
                f"first is to {alone[0]}."
            )
    return pairs, {
        **{"a": path_a, "b": path_b, "unpaired_a": len(a) - len(pairs), "unpaired_b": len(b) - len(pairs)},
        "digest": digest([[*pair.prompt, pair.a, pair.b] for pair in pairs]),
        **{f"empty_{model}": sum(not getattr(pair, model).strip() for pair in pairs) for model in "ab"},
    }


def digest(content: Any) -> str:
    """What tells a content that JSON can hold from others."""
    return fingerprint.digest(json.dumps(content).encode())
