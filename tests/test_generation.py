"""Answers are decoded as they are asked for, whatever a model's own generation config says."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2LMHeadModel

from akl_lightning.callbacks import StudentExport
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.evaluation.answers import read_answers
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.generate import AnswerEvaluation, AnswerWriter
from akl_lightning.models.generation import stop_tokens
from akl_lightning.models.lora import LoraSettings
from akl_lightning.models.split import SplitModel
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, Bigram, gpt2

PROMPT = torch.tensor([[11, 12, 13, 14, 15]])
LENGTH = 8


def model() -> GPT2LMHeadModel:
    torch.manual_seed(4)
    made = gpt2(16).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    made.generation_config.eos_token_id = None
    return made


def by_hand(made: nn.Module, length: int = LENGTH) -> list[int]:
    """The likeliest token, again and again."""
    ids = PROMPT
    for _ in range(length):
        ids = torch.cat([ids, made(input_ids=ids).logits[:, -1:].argmax(-1)], -1)
    return ids[0, PROMPT.shape[1] :].tolist()


def answer(made: nn.Module, tokenizer: Any = None, **arguments: Any) -> list[int]:
    prompts = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    return SplitModel(made).generate(prompts, tokenizer, max_new_tokens=LENGTH, **arguments)[0].tolist()


FIRST, SECOND = by_hand(model())[:2]
SETTINGS: dict[str, Any] = {
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [FIRST],
    "begin_suppress_tokens": [FIRST],
    "bad_words_ids": [[FIRST]],
    "sequence_bias": [[[FIRST], -100.0]],
    "exponential_decay_length_penalty": (0, 1000.0),
    "guidance_scale": 50.0,
    "encoder_repetition_penalty": 0.01,
    "forced_eos_token_id": 7,
    "forced_bos_token_id": 7,
    "repetition_penalty": 50.0,
    "num_beams": 4,
    "min_new_tokens": LENGTH,
    "stop_strings": ["a"],
    "max_time": 1e-9,
    "do_sample": True,
    "temperature": 50.0,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_models_own_generation_config_alters_nothing(name: str) -> None:
    made = model()
    setattr(made.generation_config, name, SETTINGS[name])
    if name == "exponential_decay_length_penalty":
        made.generation_config.eos_token_id = [299]
        assert 299 not in by_hand(made)
    own = made.generation_config
    assert answer(made) == by_hand(made)
    assert made.generation_config is own and getattr(own, name) == SETTINGS[name]


@pytest.mark.parametrize("name", ["no_repeat_ngram_size", "suppress_tokens", "bad_words_ids", "forced_eos_token_id"])
def test_such_a_config_would_have_altered_them(name: str) -> None:
    made = model()
    setattr(made.generation_config, name, SETTINGS[name])
    given = {"do_sample": False, "max_new_tokens": LENGTH, "attention_mask": torch.ones_like(PROMPT)}
    assert made.generate(PROMPT, **given)[0, PROMPT.shape[1] :].tolist() != by_hand(made)


def test_under_an_adapter_too() -> None:
    made = model()
    made.generation_config = GenerationConfig(suppress_tokens=[FIRST], no_repeat_ngram_size=1)
    adapted = get_peft_model(made, LoraConfig(target_modules=["c_attn"]))
    assert answer(adapted) == by_hand(adapted)
    assert adapted.generation_config.suppress_tokens == [FIRST]


def test_what_is_asked_for_counts() -> None:
    made = model()
    assert answer(made, suppress_tokens=[FIRST])[0] != FIRST
    assert answer(made, num_beams=3, min_new_tokens=2)


def test_stop_tokens_alone_are_taken_over(tokenizer: Any, data: InstructionDataModule, tmp_path: Any) -> None:
    made = model()
    whole = by_hand(made)
    stop = next(token for token in whole if token != tokenizer.eos_token_id)
    made.generation_config.eos_token_id = [stop, 299]
    split = SplitModel(made)
    assert split.stop_tokens(tokenizer) == [tokenizer.eos_token_id, stop, 299]
    expected = whole[: whole.index(stop) + 1]
    assert answer(made, tokenizer) == expected and answer(made) == expected

    made.generation_config.eos_token_id = list(range(300))  # so that every first token ends
    Trainer(**QUIET).predict(AnswerWriter(made, tmp_path / "a.jsonl", Decoding(4)), data, return_predictions=False)
    assert [record["cut"] for record in read_answers(tmp_path / "a.jsonl")] == [False] * 4


def test_a_module_of_ones_own_is_asked_as_before(tokenizer: Any) -> None:
    seen: dict[str, Any] = {}

    class Answers(Bigram):
        def generate(self, input_ids: Tensor, **arguments: Any) -> Tensor:
            seen.update(arguments)
            return torch.cat([input_ids, input_ids[:, :1]], -1)

    assert answer(Answers(), tokenizer) == [11]
    assert seen.pop("attention_mask").shape == PROMPT.shape
    end = tokenizer.eos_token_id
    assert seen == {
        "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "eos_token_id": end, "pad_token_id": end,
        "max_new_tokens": LENGTH,
    }  # fmt: skip


class Turns(InstructionDataModule):
    """Data whose template ends a turn with a token of its own, which the tokenizer does not take for a special one."""

    end_tokens: Any = None


def test_stop_tokens_are_a_union_without_repetition(tokenizer: Any) -> None:
    made = model()
    assert stop_tokens(made, None) == [] and stop_tokens(nn.Identity(), None, [7]) == [7]
    made.generation_config.eos_token_id = [0, 299]
    assert stop_tokens(made, tokenizer, [298, 299, 298]) == [tokenizer.eos_token_id, 298, 299]
    made.generation_config.eos_token_id = 5
    assert stop_tokens(made, tokenizer, ()) == [tokenizer.eos_token_id, 5]


def test_answers_end_where_a_turn_of_the_data_does(
    tokenizer: Any, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In predict, in a test, and by akl generate; the token that ends an answer is none of its words."""
    data = Turns(tokenizer, JsonLines(corpus), batch_size=4, max_length=40, validation_size=4, test_size=4)
    made = model()

    def answers(name: str) -> list[dict[str, Any]]:
        path = tmp_path / f"{name}.jsonl"
        module = DistillationModule(made, gpt2(24))
        evaluation = AnswerEvaluation(path, Decoding(LENGTH))
        trainer = Trainer(**QUIET, callbacks=[evaluation])
        trainer.test(module, data, verbose=False)
        writer = tmp_path / f"{name}-written.jsonl"
        Trainer(**QUIET).predict(AnswerWriter(made, writer, Decoding(LENGTH)), data, return_predictions=False)
        assert [r["answer"] for r in read_answers(path)] == [r["answer"] for r in read_answers(writer)]
        return read_answers(path)

    def predicted() -> list[list[int]]:
        module = DistillationModule(made, gpt2(24), max_new_tokens=LENGTH)
        return [row for batch in Trainer(**QUIET).predict(module, data) for row in batch.tolist()]

    before, whole = answers("before"), predicted()
    assert all(record["cut"] for record in before)
    end = whole[0][LENGTH // 2]
    assert end != tokenizer.eos_token_id and end not in tokenizer.all_special_ids
    monkeypatch.setattr(Turns, "end_tokens", [end])
    after, short = answers("after"), predicted()
    expected = [row[: row.index(end)] if end in row else row for row in whole]
    texts = [text.strip() for text in tokenizer.batch_decode(expected)]
    cut = [end not in row for row in whole]
    # A prediction goes by length, a file by the order of the samples.
    assert sorted((r["answer"], r["cut"]) for r in after) == sorted(zip(texts, cut, strict=True))
    assert [row[: row.index(end)] if end in row else row for row in short] == expected
    assert len(set(map(len, expected))) > 1, "some end, and some do not"


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_exported_answers_as_the_module_does(
    adapted: bool, tokenizer: Any, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same greedy tokens from ``transformers``' own ``generate``, which knows the folder alone."""
    data = Turns(tokenizer, JsonLines(corpus), batch_size=4, max_length=40, validation_size=4, test_size=4)
    prompts = {"input_ids": torch.randint(1, 300, (8, 5)), "attention_mask": torch.ones(8, 5, dtype=torch.long)}

    def greedy(name: str) -> tuple[list[list[int]], list[list[int]]]:
        made = model()
        made.generation_config.eos_token_id = [299]
        lora = {"lora": LoraSettings(target_modules=["c_attn"])} if adapted else {}
        module = DistillationModule(made, gpt2(24), optimizer=partial(torch.optim.SGD, lr=0.1), **lora)
        export = StudentExport(str(tmp_path / name))
        Trainer(**QUIET, max_steps=2, limit_val_batches=0, callbacks=[export]).fit(module, data)
        exported = AutoModelForCausalLM.from_pretrained(export.exported)
        module.student.model.eval()
        ours = module.generate(prompts, max_new_tokens=2 * LENGTH)
        return ours.tolist(), exported.generate(**prompts, max_new_tokens=2 * LENGTH)[:, 5:].tolist()

    ours, theirs = greedy("whole")
    assert ours == theirs
    assert GenerationConfig.from_pretrained(tmp_path / "whole").eos_token_id == [tokenizer.eos_token_id, 299]
    end = ours[0][LENGTH]
    monkeypatch.setattr(Turns, "end_tokens", [end, tokenizer.eos_token_id])
    shorter, theirs = greedy("ended")
    assert shorter == theirs and shorter != ours
    assert GenerationConfig.from_pretrained(tmp_path / "ended").eos_token_id == [tokenizer.eos_token_id, end, 299]
    assert shorter[0] == ours[0][: ours[0].index(end) + 1] + shorter[0][ours[0].index(end) + 1 :]
    assert set(shorter[0][ours[0].index(end) + 1 :]) <= {tokenizer.pad_token_id}
