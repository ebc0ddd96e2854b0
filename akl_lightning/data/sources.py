"""Where instruction pairs come from."""

import ast
import importlib.util
import inspect
import json
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import datasets
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

from akl_lightning.errors import UsageError, first_line
from akl_lightning.hub import out_of_reach


@dataclass(frozen=True)
class Pair:
    """One instruction and the response to learn."""

    instruction: str
    output: str
    input: str = ""
    name: str = ""
    """Decides the split; instruction and input decide where it is empty."""
    references: tuple[str, ...] = ()
    """Every acceptable response, where there are several."""
    cut: bool = False
    """Whether the response was cut off, so that no end-of-text is to be learnt after it."""


class Source(ABC):
    """Gives instruction pairs."""

    @abstractmethod
    def load(self) -> dict[str, list[Pair]]:
        """Pairs under ``train``, and under ``validation`` and ``test`` where the source knows these splits.

        A test set has its pairs under ``test`` alone.
        """

    @property
    def description(self) -> str:
        """What they are, in a few words, for model cards."""
        return type(self).__name__


class Docstrings(Source):
    """The documentation of Python's standard library and of installed packages, read from their source files.

    The files are parsed, never imported or run. The instruction is a function's, method's or class's qualified name
    and signature; the response is its docstring's first paragraph. Tests, duplicates, and docstrings that are no text
    are dropped.

    Args:
        packages: installed packages, by the names they are imported by, in addition to the standard library.

    Raises:
        UsageError: a package that is not installed, or nothing to read.
    """

    def __init__(self, packages: Sequence[str] = ()) -> None:
        self.packages = tuple(packages)

    @property
    def description(self) -> str:
        also = "".join(f", of {package}" for package in self.packages)
        return f"the documentation of Python {platform.python_version()}'s standard library{also}"

    def load(self) -> dict[str, list[Pair]]:
        return {"train": list(_read_docstrings(self.packages))}


@cache
def _read_docstrings(packages: tuple[str, ...]) -> tuple[Pair, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    files = [(path, path.relative_to(library)) for path in sorted(library.rglob("*.py"))]
    for package in packages:
        root = _folder_of(package)
        files += [(path, path.relative_to(root.parent)) for path in sorted(root.rglob("*.py"))]
    files = [(path, relative) for path, relative in files if _is_library(relative)]
    pairs: list[Pair] = []
    names, outputs = set(), set()
    for path, relative in tqdm(files, desc="Reading docstrings", unit="file", leave=False):
        for pair in _documented(path, relative):
            if pair.name not in names and pair.output not in outputs:
                names.add(pair.name)
                outputs.add(pair.output)
                pairs.append(pair)
    if not pairs:
        raise UsageError(f"no docstrings in {library}: use a Python whose standard library is source files.")
    return tuple(pairs)


def _folder_of(package: str) -> Path:
    # The parent of a dotted name would be imported to find it.
    spec = None if "." in package else importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"there is no installed package {package!r} to read docstrings of: install it or leave it out."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _is_library(path: Path) -> bool:
    dropped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    return not dropped & set(path.parts) and not any(part.startswith(("test_", "config-")) for part in path.parts)


def _documented(path: Path, relative: Path) -> Iterator[Pair]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other versions
        return
    parts = relative.with_suffix("").parts
    yield from _definitions(tree, ".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def _definitions(parent: ast.AST, qualified: str) -> Iterator[Pair]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{qualified}.{node.name}"
            text = _first_paragraph(ast.get_docstring(node, clean=False) or "")
            if text:
                yield Pair(instruction=_signature(node, name), output=text, name=name)
            yield from _definitions(node, name)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _definitions(node, qualified)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}({', '.join(ast.unparse(base) for base in node.bases)})"
    return f"def {name}({ast.unparse(node.args)})"


def _first_paragraph(docstring: str) -> str:
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    is_text = len(paragraph.split()) >= 3 and letters > 0.7 * len(paragraph) and paragraph.isprintable()
    return paragraph if is_text else ""


class JsonLines(Source):
    """JSON Lines files, an object with texts on each line.

    Args:
        path: the file that is split into train, validation and test, or is train where the others are given.
        validation_path: a file of validation pairs.
        test_path: a file of test pairs; it does without the others.
        instruction: field of the instruction.
        input: field of its input; it may be missing.
        output: field of the response, a text or a list of acceptable ones, of which the first is learnt. Pairs without
            any are dropped, but kept for a test, where they are prompts to answer. Where a field ``cut`` is true, as
            ``akl generate`` writes it, no end-of-text is learnt after the response.

    Raises:
        UsageError: no file given.
    """

    def __init__(
        self,
        path: str | None = None,
        validation_path: str | None = None,
        test_path: str | None = None,
        instruction: str = "instruction",
        input: str = "input",
        output: str = "output",
    ) -> None:
        self.paths = {"train": path, "validation": validation_path, "test": test_path}
        if path is None and (test_path is None or validation_path is not None):
            raise UsageError("JsonLines needs a path: of pairs to split and train on, or a test_path alone.")
        self.fields = (instruction, input, output)

    @property
    def description(self) -> str:
        return ", ".join(Path(path).name for path in self.paths.values() if path is not None)

    def load(self) -> dict[str, list[Pair]]:
        return {split: self._read(Path(path), split) for split, path in self.paths.items() if path is not None}

    def _read(self, path: Path, split: str) -> list[Pair]:
        if not path.is_file():
            raise UsageError(f"there is no file {path}: give data.source.path the path of a JSON Lines file.")
        pairs = [self._pair(record, where) for record, where in json_lines(path)]
        return _usable(pairs, str(path), split)

    def _pair(self, record: dict[str, Any], where: str) -> Pair:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # "\ud800" is JSON, but no text that could be tokenized
            raise UsageError(f"{where} is no JSON in UTF-8 ({error}): mend or remove the line.") from error
        return _pair(record, self.fields, where)


def json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSON Lines file, each with its place in words.

    Raises:
        UsageError: a line is no JSON object.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(tqdm(lines, desc=f"Reading {path.name}", unit="line", leave=False), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"{where} is no JSON in UTF-8 ({error}): mend or remove the line; each is an object of its own."
                ) from error
            if not isinstance(record, dict):
                raise UsageError(f"{where} is no JSON object but {str(record)[:40]!r}: mend or remove the line.")
            yield record, where


class HubDataset(Source):
    """A data set of the Hugging Face hub, or a local folder that ``datasets`` reads.

    Args:
        path: hub name, local folder with data files, or folder that ``save_to_disk`` wrote.
        name: the configuration of the data set, where it has several.
        data_files: which of its files to take as training data, where it has several.
        instruction: column of the instruction.
        input: column of its input; it may be missing.
        output: column of the response.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: str | None = None,
        instruction: str = "instruction",
        input: str = "input",
        output: str = "output",
    ) -> None:
        self.path = path
        self.name = name
        self.data_files = data_files
        self.fields = (instruction, input, output)

    @property
    def description(self) -> str:
        return self.path if self.name is None else f"{self.path}, {self.name}"

    def load(self) -> dict[str, list[Pair]]:
        loaded = self._load()
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict(train=loaded)
        if not {"train", "test"} & set(loaded):
            raise UsageError(
                f"the data set {self.path!r} has neither a split 'train' nor 'test', only {', '.join(loaded)}."
            )
        splits = {}
        for split in ("train", "validation", "test"):
            if split in loaded:
                where = f"{self.path}, {split}"
                pairs = [_pair(row, self.fields, f"{where}, row {index}") for index, row in enumerate(loaded[split])]
                splits[split] = _usable(pairs, where, split)
        return splits

    def _load(self) -> datasets.Dataset | datasets.DatasetDict:
        path = Path(self.path)
        try:
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return datasets.load_from_disk(self.path)
            with _without_hub(out_of_reach(self.path)):
                return datasets.load_dataset(self.path, self.name, data_files=self.data_files)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            if path.is_dir():
                said = first_line(error.__cause__ or error)
                reason = f"{said}; give a folder of files of the same columns, or one of them as data_files"
            elif path.is_file():
                reason = "it is a file; give the folder that it lies in, and its name as data_files"
            else:
                reason = (
                    "it is no local folder, and the hub has none of that name or cannot be reached; give the path of a "
                    "local folder, or a JSON Lines file through JsonLines"
                )
            raise UsageError(f"cannot load the data set {self.path!r}: {reason}.") from error


@contextmanager
def _without_hub(out_of_reach: bool) -> Iterator[None]:
    """Let ``datasets`` look into its cache alone, where the hub gives no answer."""
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

    def load(self) -> dict[str, list[Pair]]:
        repository, file = self.files[self.name]
        try:
            path = hf_hub_download(repository, file, repo_type="dataset", local_files_only=out_of_reach(repository))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise UsageError(
                f"cannot fetch {file} of the data set {repository!r}: the hub cannot be reached or has no such file; "
                "download it and give it as the test_path of JsonLines."
            ) from error
        return JsonLines(test_path=path).load()


def _pair(record: dict[str, Any], fields: tuple[str, str, str], where: str) -> Pair:
    instruction, input, output = fields
    for field in (instruction, output):
        if field not in record:
            raise UsageError(
                f"{where} has no field {field!r}, only {', '.join(record)}: name its fields in the source."
            )
    responses = record[output] if isinstance(record[output], list) else [record[output] or ""]
    for field, text in [(instruction, record[instruction]), *((output, response) for response in responses)]:
        if not isinstance(text, str):
            raise UsageError(f"{where}: the field {field!r} is no text but {text!r}: write it as a string.")
    given = record.get(input) or ""
    if not isinstance(given, str):
        raise UsageError(f"{where}: the field {input!r} is no text but {given!r}: write it as a string.")
    references = tuple(response for response in responses if response.strip())
    first = references[0] if references else ""
    several = references if len(references) > 1 else ()
    return Pair(record[instruction], first, given, references=several, cut=record.get("cut") is True)


def _usable(pairs: list[Pair], where: str, split: str) -> list[Pair]:
    """Drop pairs without an instruction or (but for a test) a response, and duplicates; keep the order."""
    usable = list(
        dict.fromkeys(pair for pair in pairs if pair.instruction.strip() and (split == "test" or pair.output.strip()))
    )
    if len(usable) < len(pairs):
        rank_zero_info(
            f"{where}: {len(pairs) - len(usable)} of {len(pairs)} pairs dropped: no instruction, no response, or there "
            "twice"
        )
    if not usable:
        raise UsageError(
            f"{where} has no usable pair left among {len(pairs)}: each needs an instruction and an output."
        )
    return usable
