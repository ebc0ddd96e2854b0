"""The shape of the house: who imports whom, how deep a step is, how long a file may be."""

import ast
import inspect
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch

import akl_lightning
from akl_lightning.kernels import reference
from akl_lightning.module import DistillationModule
from tests.conftest import gpt2

ROOT = Path(akl_lightning.__file__).parent
LAYERS = ["functional", "kernels.reference", "divergences", "criterion", "module", "cli"]
"""From below to above."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(body: list[ast.stmt]) -> Iterator[str]:
    """What a file imports when it is imported, by full names."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Try):
            yield from imports(node.body)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from imports([*node.body, *node.orelse])


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}
IMPORTED = {name: set(imports(ast.parse(path.read_text()).body)) for name, path in FILES.items()}


def within(imported: str) -> str | None:
    """The file of the package that an import means, or None."""
    name = imported.removeprefix("akl_lightning.")
    if name == imported:
        return None
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name


GRAPH = {name: {found for one in of if (found := within(one)) is not None} - {name} for name, of in IMPORTED.items()}


def reached(name: str) -> set[str]:
    found, waiting = set(), [name]
    while waiting:
        for other in GRAPH[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


@pytest.mark.parametrize("name", sorted(name for name in FILES if name))
def test_imports_have_no_cycle(name: str) -> None:
    assert name not in reached(name), f"{name} imports itself, by {sorted(GRAPH[name])}"


def test_imports_point_one_way() -> None:
    assert set(LAYERS) - {"cli"} <= reached("cli")
    for lower, upper in combinations(LAYERS, 2):
        assert upper not in reached(lower), f"{lower} imports {upper}"
    assert not {"divergences", "criterion"} & reached("projection"), "the projection knows no divergence"
    assert not any(name.startswith("teachers") for name in reached("data.module")), "data and teachers are apart"


def test_nothing_below_the_module_needs_lightning() -> None:
    for name in ("criterion", "projection", "models.split", "models.load", "kernels"):
        for file in {name, *reached(name)}:
            found = [other for other in IMPORTED[file] if other.startswith(("lightning.", "pytorch_lightning"))]
            assert not found, f"{file} imports {found[0]}, and {name} needs it"


def test_no_recipe_is_imported_and_no_file_is_too_long() -> None:
    for name, path in FILES.items():
        assert not any(other.split(".")[0] in ("recipes", "common") for other in IMPORTED[name])
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} holds more than one idea"
    recipes = list(ROOT.parent.glob("recipes/*.py"))
    for path in [*recipes, *ROOT.parent.glob("recipes/common/*.py")]:
        found = {other.split(".")[0] for other in imports(ast.parse(path.read_text()).body)}
        assert not found & {"recipes", *(other.stem for other in recipes)}, f"{path.name} imports a recipe"


def test_a_step_is_at_most_nine_frames_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    module, depth = DistillationModule(gpt2(16), gpt2(24)), []
    compare = reference.compare

    def look(*args: object, **settings: object) -> object:
        files = [(Path(frame.filename), frame.function) for frame in inspect.stack()[1:]]
        own = [f"{path.stem}.{function}" for path, function in files if ROOT in path.parents]
        depth.append(own[: own.index("module.distill") + 1])
        return compare(*args, **settings)

    monkeypatch.setattr(reference, "compare", look)
    ids = torch.randint(1, 300, (2, 12))
    module.distill({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}).loss.backward()
    assert depth and all(len(frames) + 1 <= 9 for frames in depth), depth[0]  # and the comparison itself
