"""What the README says is what the project does."""

import copy
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from akl_lightning import divergences
from akl_lightning.divergences import known_divergences
from tests.commands.start import python, warm
from tests.conftest import gpt2
from tests.evaluation.judge_server import Server, well, write

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDES = (ROOT / "recipes/README.md").read_text()
EVIDENCE = (ROOT / "recipes/results/README.md").read_text()
ALL = "\n".join((README, GUIDES, EVIDENCE))


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
    blocks = re.findall(r"^```python\n(.*?)^```", ALL, re.M | re.S)
    script = "\n".join(blocks).replace("path/or/hub/name", str(folder)).replace("max_epochs=3", "max_epochs=1")
    assert "Hellinger" in script and "Trainer(max_epochs=1" in script
    (tmp_path / "example.py").write_text(script + USED)
    result = subprocess.run(
        [python(), "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, env=os.environ
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "student/config.json").read_text())["model_type"] == "gpt2"


USED = """
if __name__ == "__main__":
    from transformers import TrainingArguments

    batch = next(data.samples("train", 4))
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    assert 0 <= train_on(batch) <= 1
    assert all(not weight.equal(before[name]) for name, weight in student.named_parameters())
    settings = TrainingArguments("huggingface", per_device_train_batch_size=2, max_steps=2, report_to=[], use_cpu=True)
    rows = [{name: batch[name][row] for name in ("input_ids", "attention_mask", "labels")} for row in range(4)]
    trained = DistillationTrainer(student.model, settings, train_dataset=rows).train()
    assert 0 < trained.training_loss < 20
"""
"""Stands behind the examples in Python, and uses what they only define."""


def test_what_is_learnt_is_what_akl_show_prints(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)  # all tests share it
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    examples = re.findall(r"^```json\n(.*?)^```\n\n```shown\n(.*?)^```", GUIDES, re.M | re.S)
    assert len(examples) == 3
    for number, (records, shown) in enumerate(examples):
        (tmp_path / f"{number}.jsonl").write_text(records)
        arguments = ["--data.tokenizer", "tokenizer", "--data.template", "chatml", "--samples", "9"]
        result = subprocess.run(
            [f"{warm()}/akl", "show", f"{number}.jsonl", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        said = [
            part.split("\n", 1) for part in re.split(r"\n(?=train \d+ of)", result.stdout.replace("\n\n", "\n"))[1:]
        ]
        # Behind what tells which sample it is, which depends on the width and on the tokenizer.
        texts = [re.sub(r"^(in \d+ turns?|turns?)\n", "", text) for _, text in said]
        assert [text.strip() for text in texts] == [text.strip() for text in shown.split("\n\n")], result.stdout


BUDGET = {
    "model": {"max_new_tokens": 4},
    "teacher": {"max_epochs": 1, "batch_size": 32},
    "data": {"source": {"class_path": "JsonLines", "init_args": {"path": "pairs.jsonl"}}, "max_length": 200},
    # Without a logger, and so without its pictures: test_gpt2_recipe.py looks at these.
    "trainer": {"max_epochs": 1, "limit_val_batches": 1, "limit_test_batches": 1, "logger": False},
}
ONLY_ITS_OPTIONS = ("compare_divergences", "gpt2_dolly", "PaperTestSet", "num_nodes")
"""In what takes hours, the hub or other machines."""


@pytest.fixture
def clone(tokenizer: PreTrainedTokenizerFast, corpus: str, tmp_path: Path) -> Path:
    """The folder in which the README is followed: the recipes, on a small budget, two models and some pairs."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    default = tmp_path / "recipes/gpt2_distill.yaml"
    settings = yaml.safe_load(default.read_text())
    default.write_text(yaml.safe_dump({**settings, **{name: settings[name] | BUDGET[name] for name in BUDGET}}))
    for name, width in (("small", 16), ("large", 24)):
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / "models" / name)
        tokenizer.save_pretrained(tmp_path / "models" / name)
    other = ByteLevelBPETokenizer()
    other.train_from_iterator([(tmp_path / "pairs.jsonl").read_text()], 280, special_tokens=["<|end|>"])
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    shutil.copytree(tmp_path / "models/large", tmp_path / "models/other")
    PreTrainedTokenizerFast(tokenizer_object=other._tokenizer, **names).save_pretrained(tmp_path / "models/other")
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": _chat(number)}) + "\n" for number in range(60)), encoding="utf-8"
    )
    write(tmp_path / "student.jsonl", ["a b c", "a b"])
    write(tmp_path / "baseline.jsonl", ["a", "z"])
    return tmp_path


def _chat(number: int) -> list[dict[str, str]]:
    return [{"role": role, "content": f"a b {number}"} for role in ("user", "assistant") * 2]


@pytest.fixture
def judge() -> Iterator[Server]:
    with Server(well) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def affordable(line: str) -> str:
    """What of a command is run here."""
    command, _, comment = line.partition("  #")
    command = re.sub(r"^torchrun --nnodes .*?(?=recipes/)", "python ", command).replace(
        " fit ... ", " fit --config run.yaml "
    )
    if command.startswith("transformers serve"):
        return "true"  # another server is there
    if "--print_completion" in command:
        return "true"  # seconds of work; test_command_line.py lets a shell complete with what it prints
    if any(sign in command for sign in ONLY_ITS_OPTIONS):
        command += " --print_config > /dev/null"
    return f"{command}  #{comment}"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["python recipes", "akl "])
def test_shell_examples_run(clone: Path, judge: Server, program: str) -> None:
    """The blocks with this program, one after another, as a reader would run them."""
    home = {"HOME": str(clone / "home"), "PATH": f"{warm()}{os.pathsep}{os.environ['PATH']}"}
    blocks = [block for block in re.findall(r"^```bash\n(.*?)^```", ALL, re.M | re.S) if program in block]
    assert len(blocks) > 5
    for block in blocks:
        lines = re.sub(r" *\\\n *", " ", block).splitlines()
        script = re.sub(r"https?://[\w.:]+/v1", judge.url, "\n".join(map(affordable, lines)))
        result = subprocess.run(
            ["bash", "-euxc", script], cwd=clone, capture_output=True, text=True, timeout=200, env=os.environ | home
        )
        assert result.returncode == 0, result.stderr[-3000:]


def test_the_table_has_every_divergence_and_no_other() -> None:
    table = README.split("## The divergences")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)\(", table, re.M)
    assert {"AdaptiveKL", "ForwardKL", "SkewKL"} < set(rows)
    assert set(rows) == {name for name in known_divergences() if hasattr(divergences, name)}


def test_the_messages_are_those_of_the_code() -> None:
    root = ROOT / "akl_lightning"
    # As one text: without the quotes, line breaks and indentation in the middle of a sentence.
    code = "".join(re.sub(r'"\n\s*f?"', "", path.read_text()) for path in root.rglob("*.py"))
    code = re.sub(r"\{[^{}\n]*\}", "*", code)
    section = GUIDES.split("## What a message means")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.M)
    assert len(messages) > 10
    for message in messages:
        if message.startswith("CUDA"):
            continue
        for part in re.split(r"\.\.\.|\b(?:teacher|student|train|512|256|127|data\.max_length)\b", message):
            assert part.strip("; ") in code, (message, part)
