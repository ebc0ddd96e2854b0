"""The documentation of Python's standard library and of installed packages as instructions."""

import ast
import hashlib
import importlib.util
import inspect
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from akl_lightning.data.records import Row, Source, conversation
from akl_lightning.errors import UsageError

if TYPE_CHECKING:
    import datasets


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

    def load(self) -> "dict[str, datasets.Dataset]":
        from akl_lightning.data.store import store

        library = Path(sysconfig.get_path("stdlib"))
        paths = [(path, path.relative_to(library)) for path in sorted(library.rglob("*.py"))]
        for package in self.packages:
            root = _folder_of(package)
            paths += [(path, path.relative_to(root.parent)) for path in sorted(root.rglob("*.py"))]
        paths = [(path, relative) for path, relative in paths if _is_library(relative)]
        if not paths:
            raise UsageError(f"no docstrings in {library}: use a Python whose standard library is source files.")
        contents = hashlib.sha256()
        for path, relative in paths:
            contents.update(f"{relative}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        depends_on = [platform.python_version(), contents.hexdigest()]  # the parser comes with Python
        return {"train": store(self.description, depends_on, lambda notes: _read(paths), [sys.modules[__name__]])}


def _read(paths: Sequence[tuple[Path, Path]]) -> Iterator[Row]:
    names: set[str] = set()
    outputs: set[str] = set()
    for path, relative in tqdm(paths, desc="Reading docstrings", unit="file", leave=False):
        for name, signature, text, line in _documented(path, relative):
            if name not in names and text not in outputs:
                names.add(name)
                outputs.add(text)
                messages = [{"role": "user", "content": signature}, {"role": "assistant", "content": text}]
                yield conversation(messages, "docstring", str(relative), line, name=name)


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


Documented = tuple[str, str, str, int]
"""Qualified name, signature, first paragraph, line."""


def _documented(path: Path, relative: Path) -> Iterator[Documented]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other versions
        return
    parts = relative.with_suffix("").parts
    yield from _definitions(tree, ".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def _definitions(parent: ast.AST, qualified: str) -> Iterator[Documented]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{qualified}.{node.name}"
            text = _first_paragraph(ast.get_docstring(node, clean=False) or "")
            if text:
                yield name, _signature(node, name), text, node.lineno
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
