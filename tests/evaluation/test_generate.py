"""Answers through the Trainer: decoded the same whatever the batches, kept in a file, taken from there."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.answers import read_answers
from akl_lightning.evaluation.decoding import Decoding, SeededDraw, seed_of
from akl_lightning.evaluation.diversity import diversity
from akl_lightning.evaluation.generate import AnswerEvaluation, AnswerWriter
from akl_lightning.evaluation.rouge import rouge_l
from akl_lightning.module import DistillationModule
from tests.commands.start import python
from tests.conftest import QUIET, answered_in_test, gpt2

SAMPLED = Decoding(max_new_tokens=6, seeds=(10, 20))


def texts(path: Path) -> dict[tuple[str, int | None], str]:
    return {(record["prompt"], record["seed"]): record["answer"] for record in read_answers(path)}


def write(data: InstructionDataModule, path: Path, decoding: Decoding, model: nn.Module | None = None) -> None:
    torch.manual_seed(1)
    Trainer(**QUIET).predict(AnswerWriter(model or gpt2(), path, decoding), data, return_predictions=False)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, -torch.inf, 0.0])
    count = 4000
    draw = SeededDraw([seed_of(10, f"prompt {row}") for row in range(count)], length=1)
    drawn = draw(torch.empty(count, 0), logits.expand(count, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / count
    assert shares[3] == 0
    assert (shares - logits.softmax(-1)).abs().max() < 4 * 0.5 / count**0.5


def test_answers_depend_on_seed_and_prompt_alone(tokenizer, corpus: str, tmp_path: Path) -> None:
    found = []
    for batch_size in (1, 3, 36):
        data = InstructionDataModule(tokenizer, JsonLines(corpus), batch_size=batch_size, max_length=40, test_size=7)
        write(data, tmp_path / f"{batch_size}.jsonl", SAMPLED)
        found.append(texts(tmp_path / f"{batch_size}.jsonl"))
    assert len(found[0]) == 14 and found[0] == found[1] == found[2]
    prompts = {prompt for prompt, _ in found[0]}
    assert any(found[0][prompt, 10] != found[0][prompt, 20] for prompt in prompts)


def test_greedy_equals_transformers(data: InstructionDataModule, tmp_path: Path) -> None:
    model = gpt2()
    write(data, tmp_path / "a.jsonl", Decoding(max_new_tokens=6), model)
    for record in read_answers(tmp_path / "a.jsonl"):
        ids = data.tokenizer(record["prompt"], return_tensors="pt")["input_ids"]
        tokens = model.eval().generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert record["answer"] == data.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert record["seed"] is None and record["temperature"] == 0 and record["references"]


def test_the_test_logs_what_the_answers_are_worth(data: InstructionDataModule, tmp_path: Path) -> None:
    module = DistillationModule(gpt2(), gpt2())
    figures, answers = answered_in_test(module, data, tmp_path / "{key}.jsonl", SAMPLED)
    assert [len(group) for group in answers] == [2] * 4
    columns = list(zip(*answers, strict=True))
    scores = [rouge_l([r["answer"] for r in column], [r["references"] for r in column]) for column in columns]
    assert figures["test/rouge_l"] == pytest.approx(sum(scores) / 2)
    assert figures["test/rouge_l_sd"] == pytest.approx(torch.tensor(scores).std().item())
    expected = diversity([[record["answer"] for record in group] for group in answers])
    assert figures["test/distinct_1"] == pytest.approx(expected["distinct_1"])
    assert figures["test/fkl"] > 0
    assert len(list(tmp_path.glob("????????.jsonl*"))) == 1


class Counting(AnswerWriter):
    calls = 0

    def _generate(self, prompts: Any, **arguments: Any) -> torch.Tensor:
        self.calls += len(prompts["input_ids"])
        return super()._generate(prompts, **arguments)


def test_a_second_run_takes_the_answers_that_are_there(data: InstructionDataModule, tmp_path: Path) -> None:
    model, path = gpt2(), tmp_path / "a.jsonl"
    write(data, path, Decoding(max_new_tokens=6, seeds=(10,)), model)
    before = texts(path)
    again = Counting(model, path, SAMPLED)
    Trainer(**QUIET).predict(again, data, return_predictions=False)
    assert again.calls == 4, "only the answers of the new seed"
    assert before.items() <= texts(path).items() and len(texts(path)) == 8
    content = path.read_bytes()
    Trainer(**QUIET).predict(third := Counting(model, path, SAMPLED), data, return_predictions=False)
    assert third.calls == 0 and path.read_bytes() == content


def test_answers_of_other_settings_are_refused(data: InstructionDataModule, tmp_path: Path) -> None:
    model, path = gpt2(), tmp_path / "a.jsonl"
    write(data, path, SAMPLED, model)
    content = path.read_bytes()
    with pytest.raises(UsageError, match=r"a\.jsonl holds answers with model .* \(now "):
        write(data, path, SAMPLED, gpt2(width=8))
    with pytest.raises(UsageError, match=r"with max_new_tokens 6 \(now 5\): give another path"):
        write(data, path, Decoding(max_new_tokens=5, seeds=(10,)), model)
    with pytest.raises(UsageError, match=r"temperature 1\.0 \(now 0\.0\)"):
        write(data, path, Decoding(max_new_tokens=6), model)
    assert path.read_bytes() == content


KILLED = """
import os, sys, time
sys.path.insert(0, {root!r})
from tests.evaluation.test_generate import *
from tests.commands.start import python
from tests.conftest import *
class Slow(AnswerWriter):
    def _generate(self, prompts, **arguments):
        time.sleep(0.4)
        return super()._generate(prompts, **arguments)
torch.manual_seed(1)
data = InstructionDataModule({tokenizer!r}, JsonLines({corpus!r}), batch_size=1, max_length=40, test_size=7)
Trainer(**QUIET).predict(Slow(gpt2(), {path!r}, SAMPLED), data, return_predictions=False)
"""


def test_a_killed_run_loses_nothing(tokenizer_folder: str, corpus: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    root = str(Path(__file__).parents[2])
    code = KILLED.format(root=root, tokenizer=tokenizer_folder, corpus=corpus, path=str(path))
    process = subprocess.Popen(
        [python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ}
    )
    part = tmp_path / "a.jsonl.part0"
    try:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()  # until all that has its output is gone
    there = [json.loads(line) for line in part.read_text().splitlines() if line]
    with part.open("a") as file:
        file.write(json.dumps(there[0])[:40])  # a line that was cut off
    data = InstructionDataModule(tokenizer_folder, JsonLines(corpus), batch_size=4, max_length=40, test_size=7)
    torch.manual_seed(1)
    writer = Counting(gpt2(), path, SAMPLED)
    Trainer(**QUIET).predict(writer, data, return_predictions=False)
    assert writer.calls == 14 - len(there) and not part.exists()
    write(data, tmp_path / "undisturbed.jsonl", SAMPLED)
    assert texts(path) == texts(tmp_path / "undisturbed.jsonl")


def test_any_split_and_prompts_without_a_reference(tokenizer, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}", "output": ["one", "two"] if n else ""} for n in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionDataModule(tokenizer, JsonLines(test_path=str(tmp_path / "t.jsonl")), max_length=40)
    module = DistillationModule(gpt2(), gpt2())
    with pytest.warns(UserWarning, match="leaves out 1 of 3 samples without a reference"):
        figures, answers = answered_in_test(module, data, tmp_path / "a.jsonl", Decoding(max_new_tokens=4))
    assert [group[0]["references"] for group in answers] == [[], ["one", "two"], ["one", "two"]]
    assert figures["test/fkl"] > 0, "the sample without a response has no part in it"
    with pytest.raises(UsageError, match="JsonLines gives no train samples"):
        Trainer(**QUIET, max_epochs=1).fit(module, data)


def test_answers_to_conversations_are_data_again(tokenizer, tmp_path: Path) -> None:
    """The last turn is what is answered, and all before it the prompt; a document asks nothing."""
    spoken = [("system", "one"), ("user", "two"), ("assistant", "three"), ("user", "four"), ("assistant", "five six")]
    messages = [{"role": role, "content": content} for role, content in spoken]
    rows = [{"messages": messages}, {"instruction": "Say", "input": "one", "output": "two"}, {"text": "seven eight"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionDataModule(tokenizer, JsonLines(test_path=str(tmp_path / "t.jsonl")), batch_size=4)
    write(data, path := tmp_path / "a.jsonl", Decoding(max_new_tokens=4))
    first, second = read_answers(path)
    assert first["references"] == ["five six"] and first["messages"] == messages[:4]
    assert first["instruction"] == "system: one\n\nuser: two\n\nassistant: three\n\nuser: four" and first["input"] == ""
    assert first["prompt"] == "one\ntwo\nthree<|endoftext|>four\n"
    assert (second["instruction"], second["input"], second["references"]) == ("Say", "one", ["two"])
    assert "messages" not in second

    again = JsonLines(test_path=str(path), output="answer").load()["test"]
    answered = [json.loads(row["messages"]) for row in again]
    assert answered[0] == [*messages[:4], {"role": "assistant", "content": first["answer"]}]
    assert answered[1][0] == {"role": "user", "content": "Say", "input": "one"}
    module = DistillationModule(gpt2(), gpt2(), max_new_tokens=4)
    figures, answers = answered_in_test(module, data, tmp_path / "b.jsonl", Decoding(max_new_tokens=4))
    assert len(answers) == 2 and "test/rouge_l" in figures


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
    ],
)
def test_bad_decoding(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Decoding(**wrong)


def test_bad_input(data: InstructionDataModule, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"new_tokens = 100 are beyond the 64 positions of the model: lower decoding.max_new_tokens to \d+\.",
    ):
        write(data, tmp_path / "a.jsonl", Decoding(max_new_tokens=100))
    with pytest.raises(UsageError, match=r"cannot write .*/proc"):
        write(data, Path("/proc/a.jsonl"), SAMPLED)
    data.setup("test")
    with pytest.raises(UsageError, match="give the Trainer an InstructionDataModule"):
        Trainer(**QUIET, callbacks=[AnswerEvaluation()]).test(
            DistillationModule(gpt2(), gpt2()), data.test_dataloader(), verbose=False
        )
    (tmp_path / "b.jsonl").write_text('{"prompt": 1}\n{}\n')
    with pytest.raises(UsageError, match=r"b\.jsonl, line 1 is no answer"):
        read_answers(tmp_path / "b.jsonl")
    with pytest.raises(UsageError, match="there is no file of answers"):
        read_answers(tmp_path / "c.jsonl")


def test_a_model_in_another_precision(data: InstructionDataModule, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    writer = AnswerWriter(str(tmp_path / "model"), tmp_path / "answers.jsonl", Decoding(4), precision="bfloat16")
    Trainer(**QUIET).predict(writer, data, return_predictions=False)
    assert next(iter(writer.language_model.model.parameters())).dtype == torch.bfloat16
    assert len(read_answers(tmp_path / "answers.jsonl")) == 4
