"""What the README says is what the project does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from akl_lightning.divergences import AdaptiveKL, Divergence, known_divergences
from tests.conftest import gpt2

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_two_commands_stand_at_the_top_each_on_one_line() -> None:
    top = README.split("\n## ")[0]
    assert re.findall(r"^    (.+)$", top, re.M) == [
        "pip install -e . && python recipes/gpt2_distill.py",
        'pip install -e ".[test]" && pytest',
    ]


def test_python_examples_run(tokenizer: PreTrainedTokenizerFast, corpus: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    gpt2(16, positions=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    script = "\n".join(blocks).replace("path/or/hub/name", str(folder)).replace("max_epochs=3", "max_epochs=1")
    assert "Hellinger" in script and "Trainer(max_epochs=1" in script
    (tmp_path / "example.py").write_text(script)
    result = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, env=os.environ
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "student/config.json").read_text())["model_type"] == "gpt2"


@pytest.mark.parametrize("name", known_divergences())
def test_the_table_has_every_divergence(name: str) -> None:
    if name in {cls.__name__ for cls in Divergence.__subclasses__() if cls.__module__ == AdaptiveKL.__module__}:
        assert re.search(rf"^\| `{name}\(", README, re.M)


def test_the_messages_are_those_of_the_code() -> None:
    root = Path(__file__).parents[2] / "akl_lightning"
    # As one text: without the quotes, line breaks and indentation in the middle of a sentence.
    code = "".join(re.sub(r'"\n\s*f?"', "", path.read_text()) for path in root.rglob("*.py"))
    code = re.sub(r"\{[^{}\n]*\}", "*", code)
    section = README.split("## What a message means")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.M)
    assert len(messages) > 10
    for message in messages:
        if message.startswith("CUDA"):
            continue
        for part in re.split(r"\.\.\.|\b(?:teacher|student|train|512|256)\b", message):
            assert part.strip("; ") in code, (message, part)
