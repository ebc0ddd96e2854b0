"""Where records come from."""

import glob
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tqdm.auto import tqdm

from akl_lightning.data.docstrings import Docstrings
from akl_lightning.data.files import READERS, holds_records, known_columns, read_file, records_of, split_of
from akl_lightning.data.forms import Forms
from akl_lightning.data.records import Row, Source
from akl_lightning.data.splits import keys
from akl_lightning.errors import UsageError, first_line
from akl_lightning.hub import out_of_reach
from akl_lightning.rank_zero import rank_zero_info

if TYPE_CHECKING:
    import datasets

__all__ = ["Docstrings", "Files", "HubDataset", "JsonLines", "Mixture", "PaperTestSet", "Source"]


class Files(Source):
    """Files of records, of any of the usual forms, which may be mixed in one file.

    They are told by their fields, see :class:`~akl_lightning.data.forms.Forms`: ``messages``, ``conversations``,
    ``prompt`` and ``completion``, ``instruction`` and ``output``, ``chosen``, ``text``, ``prompt`` alone. A file is
    JSON Lines (``.jsonl``), a JSON array (``.json``), either of them packed (``.gz``), ``.parquet``, ``.csv`` or
    ``.arrow``.

    Args:
        path: a file, a folder with all below it, a pattern such as ``data/*.jsonl``, or several of them: what is split
            into train, validation and test, or is train where the others are given. Files of a folder whose names say
            so (``test.jsonl``) are validation or test records, and what is given as one of these is not train, unless
            it is named here itself.
        validation_path: likewise, of validation records.
        test_path: likewise, of test records; it does without the others.
        instruction: field of the instruction.
        input: field of its input; it may be missing.
        output: field of the response, a text or a list of acceptable ones, of which the first is learnt. Records
            without any are dropped, but kept for a test, where they are prompts to answer. Where a field ``cut`` is
            true, as ``akl generate`` writes it, no end is learnt after the response.
        messages: field of the messages.
        text: field of a document.

    Raises:
        UsageError: no file given, or one field for two things.
    """

    otherwise: str | None = None
    """What a file of another ending is."""

    def __init__(
        self,
        path: list[str] | str | None = None,
        validation_path: list[str] | str | None = None,
        test_path: list[str] | str | None = None,
        instruction: str = "instruction",
        input: str = "input",
        output: str = "output",
        messages: str = "messages",
        text: str = "text",
    ) -> None:
        given = {"train": path, "validation": validation_path, "test": test_path}
        self.paths = {
            split: [paths] if isinstance(paths, str | Path) else list(paths)
            for split, paths in given.items()
            if paths is not None
        }
        if path is None and (test_path is None or validation_path is not None):
            raise UsageError(
                f"{type(self).__name__} needs a path: of records to split and train on, or a test_path alone."
            )
        self.forms = Forms(instruction, input, output, messages, text)

    @property
    def description(self) -> str:
        return ", ".join(Path(path).name for paths in self.paths.values() for path in paths)

    def load(self) -> "dict[str, datasets.Dataset]":
        return {split: self._read(split, files) for split, files in self._files().items()}

    def _files(self) -> dict[str, list[Path]]:
        found = {
            split: [file for path in paths for file, _ in self._below(path)] for split, paths in self.paths.items()
        }
        held_out = {file.resolve() for split in found if split != "train" for file in found[split]}
        if "train" not in found:
            return found
        named: dict[str, list[Path]] = {"train": []}
        for path in self.paths["train"]:
            for file, split in self._below(path):
                given = file == Path(path).expanduser()
                if (given or file.resolve() not in held_out) and file not in named["train"]:
                    named.setdefault(split, []).append(file)
        for split in ("validation", "test"):
            if split in named:
                names = ", ".join(file.name for file in named[split])
                rank_zero_info(f"{self.description}: {names} by name: {split} records")
                found[split] = found.get(split, []) + named[split]
        if not named["train"]:
            raise UsageError(
                f"{self.description}: no file is left to train on, all are validation or test files by their names or "
                "paths; give other ones as data.source.path."
            )
        return found | {"train": named["train"]}

    def _below(self, given: str) -> list[tuple[Path, str]]:
        """The files that a path means, and the split that each one's name says it is of."""
        path = Path(given).expanduser()
        if path.is_file():
            return [(path, "train")]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if holds_records(file))
            if not inside:
                raise UsageError(f"the folder {path} holds no file that ends with {', '.join(READERS)}.")
            return [(file, split_of(file.relative_to(path))) for file in inside]
        matching = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not matching:
            raise UsageError(f"there is no file {path}: give data.source.path the path of a file, folder or pattern.")
        return [(file, "train") for file in matching]

    def _read(self, split: str, paths: list[Path]) -> "datasets.Dataset":
        from akl_lightning.data.store import store

        def rows(notes: Counter) -> Iterator[Row | None]:
            for path in paths:
                for record, line, where in read_file(path, self.forms.columns, self.otherwise):
                    yield self.forms.read(record, str(path), line, where, split, notes)

        contents = [[str(path), _digest_of(path)] for path in paths]
        where = str(paths[0]) if len(paths) == 1 else f"{self.description}, {split}"
        return store(where, [contents, self.otherwise, self.forms.names, split == "test"], rows)


class JsonLines(Files):
    """:class:`Files`, of which those whose names end otherwise are JSON Lines."""

    otherwise = ".jsonl"


def _mixed(of_records: np.ndarray) -> np.ndarray:
    """Other numbers of the records than those by which they are split, so that a choice is no choice of a split."""
    return of_records * np.uint64(0x9E3779B97F4A7C15)


def _digest_of(path: Path) -> str:
    # Not when it was written, which a copy or a checkout changes, and an edit within a tick of the clock does not.
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {first_line(error)}.") from error


class HubDataset(Source):
    """A data set of the Hugging Face hub, or a local folder that ``datasets`` reads.

    Its records are of any of the usual forms, as those of :class:`Files`.

    Args:
        path: hub name, local folder with data files, or folder that ``save_to_disk`` wrote.
        name: the configuration of the data set, where it has several.
        data_files: which of its files to take as training data, where it has several.
        instruction: column of the instruction.
        input: column of its input; it may be missing.
        output: column of the response.
        messages: column of the messages.
        text: column of documents.
        splits: which of its splits are ``train``, ``validation`` and ``test``, where it calls them otherwise, such as
            ``{train: train_sft, test: test_sft}``.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: str | None = None,
        instruction: str = "instruction",
        input: str = "input",
        output: str = "output",
        messages: str = "messages",
        text: str = "text",
        splits: dict[Literal["train", "validation", "test"], str] | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.data_files = data_files
        self.splits = splits
        self.forms = Forms(instruction, input, output, messages, text)

    @property
    def description(self) -> str:
        return self.path if self.name is None else f"{self.path}, {self.name}"

    def load(self) -> "dict[str, datasets.Dataset]":
        loaded = self._load()
        if not isinstance(loaded, dict):
            loaded = {"train": loaded}
        splits = self.splits or {split: split for split in ("train", "validation", "test") if split in loaded}
        if unknown := [name for name in splits.values() if name not in loaded]:
            raise UsageError(f"the data set {self.path!r} has no split {unknown[0]!r}, only {', '.join(loaded)}.")
        if not {"train", "test"} & set(splits):
            raise UsageError(
                f"the data set {self.path!r} has neither a split 'train' nor 'test', only {', '.join(loaded)}: name "
                f"them in data.source.splits, such as {{train: {next(iter(loaded))}}}."
            )
        left = [name for name in loaded if name not in splits.values()]
        if left:
            read = ", ".join(splits.values())
            rank_zero_info(f"{self.path}: the splits {', '.join(left)} are left, only {read} are read")
        return {split: self._read(split, loaded[name]) for split, name in splits.items()}

    def _read(self, split: str, data: "datasets.Dataset") -> "datasets.Dataset":
        from akl_lightning.data.store import store

        where = f"{self.path}, {split}"
        known = known_columns(where, data.column_names, self.forms.columns) if len(data) else []

        def rows(notes: Counter) -> Iterator[Row | None]:
            batches = data.select_columns(known).with_format(None).iter(1000)
            rows = (
                dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True)
            )
            bar = tqdm(rows, desc=f"Reading {where}", total=len(data), leave=False)
            for record, row, at in records_of(where, bar):
                yield self.forms.read(record, where, row, at, split, notes)

        files = [[file["filename"], _digest_of(Path(file["filename"]))] for file in data.cache_files]
        return store(where, [where, files, self.forms.names] if files else None, rows)

    def _load(self) -> "datasets.Dataset | dict[str, datasets.Dataset]":
        import datasets

        path = Path(self.path)
        try:
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return datasets.load_from_disk(self.path)
            with _without_hub(out_of_reach(self.path)):
                return datasets.load_dataset(self.path, self.name, data_files=self.data_files)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            if path.is_dir():
                said = first_line(error.__cause__ or error)
                reason = (
                    f"{said}; give a folder of files of the same columns, or one of them as data_files, or all of them "
                    "through Files"
                )
            elif path.is_file():
                reason = (
                    "it is a file; give the folder that it lies in, and its name as data_files, or the file through "
                    "Files"
                )
            else:
                reason = (
                    "it is no local folder, and the hub has none of that name or cannot be reached; give the path of a "
                    "local folder, or a file through Files"
                )
            raise UsageError(f"cannot load the data set {self.path!r}: {reason}.") from error


@contextmanager
def _without_hub(out_of_reach: bool) -> Iterator[None]:
    """Let ``datasets`` look into its cache alone, where the hub gives no answer."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or out_of_reach
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


class PaperTestSet(Source):
    """One of the five test sets of arXiv 2404.02657, from the hub; prompts and references alone.

    Args:
        name: DollyEval, Self-Instruct, Vicuna, and the responses of 11 and more words of Super-Natural and of Unnatural
            Instructions.
    """

    files = {  # noqa: RUF012
        "dolly": ("MiniLLM/dolly", "valid.jsonl"),
        "self-inst": ("MiniLLM/self-inst", "valid.jsonl"),
        "Vicuna": ("MiniLLM/Vicuna", "valid.jsonl"),
        "sinst": ("MiniLLM/sinst", "11_/valid.jsonl"),
        "uinst": ("MiniLLM/uinst", "11_/valid.jsonl"),
    }

    def __init__(self, name: Literal["dolly", "self-inst", "Vicuna", "sinst", "uinst"]) -> None:
        self.name = name

    @property
    def description(self) -> str:
        return "/".join(self.files[self.name])

    def load(self) -> "dict[str, datasets.Dataset]":
        repository, file = self.files[self.name]
        try:
            path = hf_hub_download(repository, file, repo_type="dataset", local_files_only=out_of_reach(repository))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise UsageError(
                f"cannot fetch {file} of the data set {repository!r}: the hub cannot be reached or has no such file; "
                "download it and give it as the test_path of JsonLines."
            ) from error
        return JsonLines(test_path=path).load()


class Mixture(Source):
    """Several sources as one.

    Records that two of them share are there once. Validation and test records are those that the sources have; where
    none has any, they are split off from the mixture.

    Args:
        sources: of the records.
        weights: of each source's training records in the mixture, in relation to each other. As many are taken as there
            are without taking one twice, by a hash of each, and what is left is counted. None takes all of all.

    Raises:
        UsageError: not a weight above 0 for each source.
    """

    def __init__(self, sources: list[Source], weights: list[float] | None = None) -> None:
        if not sources:
            raise UsageError("Mixture needs sources: give it two or more.")
        if weights is not None and (len(weights) != len(sources) or not all(0 < one < float("inf") for one in weights)):
            raise UsageError(f"Mixture needs a weight above 0 for each of its {len(sources)} sources, got {weights}.")
        self.sources = sources
        self.weights = weights

    @property
    def description(self) -> str:
        shares = [f"{weight:g} × " for weight in self.weights] if self.weights else [""] * len(self.sources)
        return " + ".join(share + source.description for share, source in zip(shares, self.sources, strict=True))

    def load(self) -> "dict[str, datasets.Dataset]":
        import datasets

        from akl_lightning.data.store import firsts

        loaded = [source.load() for source in self.sources]
        mixed = {}
        for split in ("train", "validation", "test"):
            parts = [splits[split] for splits in loaded if split in splits]
            if split == "train" and self.weights is not None and parts:
                parts = self._weighted(loaded, self.weights)
            if parts:
                whole = datasets.concatenate_datasets(parts)
                first = firsts(whole)
                if not first.all():
                    rank_zero_info(
                        f"{self.description}, {split}: {int((~first).sum()):,} of {len(whole):,} records dropped, "
                        "there twice"
                    )
                    whole = whole.select(np.flatnonzero(first))
                mixed[split] = whole
        return mixed

    def _weighted(
        self, loaded: "Sequence[dict[str, datasets.Dataset]]", weights: Sequence[float]
    ) -> "list[datasets.Dataset]":
        trained = []
        for source, splits in zip(self.sources, loaded, strict=True):
            if "train" not in splits:
                raise UsageError(f"{source.description} has no training records that a weight of Mixture could count.")
            trained.append(splits["train"])
        unit = min(len(data) / weight for data, weight in zip(trained, weights, strict=True))
        parts = []
        for source, data, weight in zip(self.sources, trained, weights, strict=True):
            count = min(len(data), max(1, round(unit * weight)))
            if count < len(data):
                rank_zero_info(
                    f"{source.description}: {len(data) - count:,} of {len(data):,} records left out by the weights of "
                    "the mixture"
                )
                data = data.select(np.sort(np.argsort(_mixed(keys(data)), kind="stable")[:count]))
            parts.append(data)
        return parts
