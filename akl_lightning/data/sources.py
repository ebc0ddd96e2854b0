"""Where instruction pairs come from."""

import ast
import inspect
import json
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from akl_lightning.errors import UsageError


@dataclass(frozen=True)
class Pair:
    """One instruction and the response to learn."""

    instruction: str
    output: str
    input: str = ""
    name: str = ""
    """Decides the split; instruction and input decide where it is empty."""


class Source(ABC):
    """Gives instruction pairs."""

    @abstractmethod
    def load(self) -> dict[str, list[Pair]]:
        """Pairs under ``train``, and under ``validation`` and ``test`` where the source knows these splits."""

    @property
    def description(self) -> str:
        """What they are, in a few words, for model cards."""
        return type(self).__name__


class Docstrings(Source):
    """The documentation of Python's standard library, read from the running interpreter's own source files.

    The files are parsed, never imported or run. The instruction is a function's, method's or class's qualified name
    and signature; the response is its docstring's first paragraph. Tests, duplicates, and docstrings that are no text
    are dropped.
    """

    @property
    def description(self) -> str:
        return f"the documentation of Python {platform.python_version()}'s standard library"

    def load(self) -> dict[str, list[Pair]]:
        return {"train": list(_read_standard_library())}


@cache
def _read_standard_library() -> tuple[Pair, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if _is_library(path.relative_to(root))]
    pairs: list[Pair] = []
    names, outputs = set(), set()
    for path in tqdm(files, desc="Reading docstrings", unit="file", leave=False):
        for pair in _documented(path, path.relative_to(root)):
            if pair.name not in names and pair.output not in outputs:
                names.add(pair.name)
                outputs.add(pair.output)
                pairs.append(pair)
    if not pairs:
        raise UsageError(f"no docstrings in {root}: use a Python whose standard library is source files.")
    return tuple(pairs)


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
    """A JSON Lines file, an object with texts on each line.

    Args:
        path: the file that is split into train, validation and test, or is train where the others are given.
        validation_path: a file of validation pairs.
        test_path: a file of test pairs.
        instruction: field of the instruction.
        input: field of its input; it may be missing.
        output: field of the response.
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        test_path: str | None = None,
        instruction: str = "instruction",
        input: str = "input",
        output: str = "output",
    ) -> None:
        self.paths = {"train": path, "validation": validation_path, "test": test_path}
        self.fields = (instruction, input, output)

    @property
    def description(self) -> str:
        return ", ".join(Path(path).name for path in self.paths.values() if path is not None)

    def load(self) -> dict[str, list[Pair]]:
        return {split: self._read(Path(path)) for split, path in self.paths.items() if path is not None}

    def _read(self, path: Path) -> list[Pair]:
        if not path.is_file():
            raise UsageError(f"there is no file {path}: give data.source.path the path of a JSON Lines file.")
        pairs = []
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(tqdm(lines, desc=f"Reading {path.name}", unit="line", leave=False), 1):
                if line.strip():
                    pairs.append(self._pair(line, f"{path}, line {number}"))
        return _usable(pairs, str(path))

    def _pair(self, line: str, where: str) -> Pair:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is no JSON ({error}): mend or remove the line.") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where} is no JSON object but {line.strip()[:40]!r}: mend or remove the line.")
        return _pair(record, self.fields, where)


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
        if "train" not in loaded:
            raise UsageError(f"the data set {self.path!r} has no split 'train', only {', '.join(loaded)}.")
        splits = {}
        for split in ("train", "validation", "test"):
            if split in loaded:
                where = f"{self.path}, {split}"
                pairs = [_pair(row, self.fields, f"{where}, row {index}") for index, row in enumerate(loaded[split])]
                splits[split] = _usable(pairs, where)
        return splits

    def _load(self) -> datasets.Dataset | datasets.DatasetDict:
        try:
            if (Path(self.path) / "dataset_dict.json").is_file() or (Path(self.path) / "state.json").is_file():
                return datasets.load_from_disk(self.path)
            return datasets.load_dataset(self.path, self.name, data_files=self.data_files)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UsageError(
                f"cannot load the data set {self.path!r}: it is no local folder, and the hub has none of that name or "
                "cannot be reached; give the path of a local folder, or a JSON Lines file through JsonLines."
            ) from error


def _pair(record: dict[str, object], fields: tuple[str, str, str], where: str) -> Pair:
    instruction, input, output = fields
    for field in (instruction, output):
        if field not in record:
            raise UsageError(
                f"{where} has no field {field!r}, only {', '.join(record)}: name its fields in the source."
            )
    texts = [record.get(field) or "" for field in (instruction, output, input)]
    for field, text in zip((instruction, output, input), texts, strict=True):
        if not isinstance(text, str):
            raise UsageError(f"{where}: the field {field!r} is no text but {text!r}: write it as a string.")
    return Pair(*map(str, texts))


def _usable(pairs: list[Pair], where: str) -> list[Pair]:
    """Drop pairs without an instruction or a response, and duplicates; keep the order."""
    usable = list(dict.fromkeys(pair for pair in pairs if pair.instruction.strip() and pair.output.strip()))
    if not usable:
        raise UsageError(
            f"{where} has no usable pair left among {len(pairs)}: each needs an instruction and an output."
        )
    return usable
