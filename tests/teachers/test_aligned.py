"""A teacher with another tokenizer: what it is given, what comes of it, and what is refused."""

import copy
import csv
import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from tokenizers import normalizers
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from akl_lightning.callbacks import AdaptiveWeightMonitor, DistributionPlot, HeadWeightMap
from akl_lightning.cli import main
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.aligned import Pairing, TeacherSide
from akl_lightning.data.chat import Chat
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.divergences import ForwardKL
from akl_lightning.errors import UsageError
from akl_lightning.kernels.classes import Classes
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Merged
from akl_lightning.teachers.aligned import AlignedTeacher
from akl_lightning.teachers.cache.format import open_shard
from akl_lightning.tokenizers.bytes import TokenBytes
from akl_lightning.tokenizers.classes import Vocabulary, partition
from tests.conftest import QUIET, gpt2, write
from tests.tokenizers.tiny import END, byte_level, sentencepiece

MERGES = ["t h", "th e", "Ġ a", "o n", "n e"]


@pytest.fixture
def student_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(MERGES)


@pytest.fixture
def teacher_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(["h e", "Ġ t", "a g", "ag a"], ["<stop>"])


def data_of(tokenizer: PreTrainedTokenizerFast, corpus: str, **settings: Any) -> InstructionDataModule:
    settings = {"batch_size": 4, "max_length": 60, "validation_size": 4, "test_size": 4, **settings}
    return InstructionDataModule(tokenizer, JsonLines(corpus), **settings)


def fitted(module: DistillationModule, data: Any, **settings: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 1, "limit_train_batches": 2, **settings})
    trainer.fit(module, data)
    return trainer


def models(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    return gpt2(16, len(student)), gpt2(24, len(teacher), positions=128)


def test_each_model_reads_its_own_tokens_and_is_compared_at_the_same_bytes(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs = [{"instruction": "x", "output": text} for text in ("the a the", "a")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = data_of(student_tokenizer, str(tmp_path / "pairs.jsonl"), validation_size=0, test_size=0)
    data.setup("fit")
    pairing = data.align(teacher_tokenizer)
    (batch,) = data.samples("train")
    # x|\n|the| a| |the|END and x|\n|t|he| |a| t|he|STOP
    assert [batch["aligned"][0].tolist(), batch["aligned"][1, :4].tolist()] == [
        [-1, -1, 2, 4, 6, -1, 8],
        [-1, -1, 2, 3],
    ]
    student, teacher = models(student_tokenizer, teacher_tokenizer)
    module = DistillationModule(student, teacher)
    classes = Classes(torch.arange(3), torch.arange(3), 3)
    module.teacher = AlignedTeacher(module.teacher, classes, teacher_tokenizer, pairing)
    prepared = module.prepare_batch(batch)
    positions = prepared["response"].positions
    assert prepared["is_aligned"].tolist() == [True, True, True, False, True, True, True]
    own = prepared["of_teacher"]
    merged = module.teacher(prepared, positions)
    assert isinstance(merged, Merged)
    whole = teacher.eval()(input_ids=own["input_ids"], attention_mask=own["attention_mask"]).logits
    # Row 0 predicts its tokens 2, 4, 6 and 8, row 1 its tokens 2 and 3.
    expected = torch.cat([whole[0, [1, 3, 5]], whole[0, [7]], whole[1, [1, 2]]])
    found = merged.logits.head(merged.logits.hidden)[prepared["is_aligned"]]
    torch.testing.assert_close(found, expected)


def test_a_permuted_copy_gives_the_loss_of_equal_vocabularies(corpus: str) -> None:
    one, other = byte_level(MERGES), byte_level(MERGES, order=-1)
    student, teacher = gpt2(16, len(one)), gpt2(24, len(one))
    order = torch.tensor([one.convert_tokens_to_ids(other.convert_ids_to_tokens(token)) for token in range(len(other))])
    permuted = copy.deepcopy(teacher)
    permuted.transformer.wte.weight.data = teacher.transformer.wte.weight.data[order]
    permuted.lm_head.weight = permuted.transformer.wte.weight
    losses = []
    for of, settings in ((teacher, {}), (permuted, {"teacher_tokenizer": other, "teacher_template": "plain"})):
        module = DistillationModule(copy.deepcopy(student), of, DistillationCriterion(alpha=0.7))
        data = data_of(one, corpus, **settings)
        trainer = Trainer(**QUIET)
        trainer.validate(module, data, verbose=False)
        losses.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert losses[1].pop("val/aligned") == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert isinstance(module.teacher, AlignedTeacher)


def test_it_learns_with_cross_entropy_where_nothing_is_aligned(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str
) -> None:
    student, teacher = models(student_tokenizer, teacher_tokenizer)
    module = DistillationModule(student, teacher, DistillationCriterion(ForwardKL(), alpha=0.7))
    data = data_of(student_tokenizer, corpus, teacher_tokenizer=teacher_tokenizer)
    trainer = fitted(module, data)
    logged = trainer.callback_metrics
    assert 0 < logged["train/aligned"] < 1 and 0 < logged["val/aligned"] < 1
    assert torch.isfinite(torch.stack(list(logged.values()))).all()
    batch = module.prepare_batch(next(iter(data.val_dataloader())))
    output = module.eval().distill(batch)
    aligned, of = batch["is_aligned"], output.statistics
    weighted = torch.where(aligned, 0.7 * of["divergence"] + 0.3 * of["cross_entropy"], of["cross_entropy"])
    torch.testing.assert_close(of["loss"], weighted)
    torch.testing.assert_close(output.loss, weighted.sum())
    assert of["head_gap"].isnan().tolist() == (~aligned).tolist()
    # And the means are over aligned tokens.
    module.val_metrics.reset()
    module.val_metrics.update(**of)
    means = module.val_metrics.compute()
    torch.testing.assert_close(means["val/fkl"], of["fkl"][aligned].double().mean())
    torch.testing.assert_close(means["val/cross_entropy"], of["cross_entropy"].double().mean())
    torch.testing.assert_close(means["val/aligned"], aligned.double().mean())
    said = TokenBytes(student_tokenizer, "x").join(batch["response"].labels.tolist()).replace(b"\xff", b"")
    bits = of["cross_entropy"].double().sum() / torch.tensor(2.0).double().log() / len(said)
    torch.testing.assert_close(means["val/bits_per_byte"], bits)


def test_bits_per_byte_are_logged_without_a_teacher(data: InstructionDataModule) -> None:
    trainer = Trainer(**QUIET)
    trainer.validate(DistillationModule(gpt2(), criterion=DistillationCriterion(alpha=0.0)), data, verbose=False)
    assert 1 < trainer.callback_metrics["val/bits_per_byte"] < 20 and "val/aligned" not in trainer.callback_metrics


def test_conversations_are_aligned_turn_by_turn(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    turns = ["the one", "a the", "agath", "none"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    student_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    teacher_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<stop>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    data = data_of(student_tokenizer, str(tmp_path / "chats.jsonl"), max_length=200, validation_size=0, test_size=0)
    data.setup("fit")
    data.align(teacher_tokenizer)
    (batch,) = data.samples("train")
    sides = []
    for name in ("", "teacher_"):
        tokenizer = teacher_tokenizer if name else student_tokenizer
        learnt = batch[f"{name}labels"][0] != -100
        sides.append(tokenizer.decode(batch[f"{name}input_ids"][0][learnt]))
    assert sides == ["a the<end>none<end>", "a the<stop>none<stop>"]
    ids, yours = batch["input_ids"][0], batch["teacher_input_ids"][0]
    aligned = {
        student_tokenizer.decode(ids[place]): teacher_tokenizer.decode(yours[other])
        for place, other in enumerate(batch["aligned"][0].tolist())
        if other >= 0
    }
    # a| |the|END n|one|END (n|on|e?) and a| t|he|STOP n|o|n|e|STOP
    assert aligned["<end>"] == "<stop>" and aligned["a"] == "a" and aligned[" "] == " t" and "the" not in aligned


def test_documents_are_aligned_block_by_block(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = "the agath one and the other one 👍 " * 6
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    data = data_of(student_tokenizer, str(tmp_path / "texts.jsonl"), max_length=31, validation_size=0, test_size=0)
    data.setup("fit")
    data.align(teacher_tokenizer)
    mine, yours = TokenBytes(student_tokenizer, "x"), TokenBytes(teacher_tokenizer, "y")
    (batch,) = data.samples("train")
    assert len(batch["input_ids"]) > 3
    for row, others, aligned in zip(batch["input_ids"], batch["teacher_input_ids"], batch["aligned"], strict=True):
        assert (aligned >= 0).sum() > 0.3 * (row != data.pad_id).sum()
        # All that is aligned has read the same of the block.
        block = mine.join(row.tolist())
        skipped = len(block) - len(block.decode(errors="ignore").encode()) if block[0] >= 0x80 else 0
        for place, other in enumerate(aligned.tolist()):
            if other > 0 and mine.of(int(row[place])) is not None:
                assert mine.join(row[:place].tolist())[skipped:] == yours.join(others[:other].tolist())


def test_the_teachers_template_has_arguments_of_its_own(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str
) -> None:
    teacher_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ lead }}{{ m.content }}<stop>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ lead }}{% endif %}"
    )
    for arguments, lead in ((None, ""), ({"lead": "[]"}, "[]")):
        data = data_of(student_tokenizer, corpus, teacher_template_arguments=arguments)
        data.setup("fit")
        data.align(teacher_tokenizer)
        for row in data.splits["train"]:
            asked, answer = (message["content"] for message in json.loads(row["messages"]))
            assert teacher_tokenizer.decode(row["teacher_input_ids"]) == f"{asked}{lead}{answer}<stop>"
            assert row["aligned"][0] == row["teacher_spans"][0]  # the answer's first token, behind all that
    wrong = data_of(student_tokenizer, corpus, teacher_template_arguments={"led": "[]"})
    wrong.setup("fit")
    with pytest.raises(UsageError, match=r"teacher's tokenizer: data\.teacher_template_arguments has 'led', which"):
        wrong.align(teacher_tokenizer)


@pytest.mark.parametrize("setting", [{"teacher_template": "plain"}, {"teacher_template_arguments": {"a": 1}}])
def test_a_template_for_a_teacher_that_reads_the_students_tokens_is_refused(
    setting: dict[str, Any], student_tokenizer: PreTrainedTokenizerFast, corpus: str
) -> None:
    module = DistillationModule(*models(student_tokenizer, student_tokenizer))
    with pytest.raises(UsageError, match=f"{next(iter(setting))} is for a teacher with another tokenizer"):
        fitted(module, data_of(student_tokenizer, corpus, **setting))


def test_what_lies_behind_the_teachers_positions_is_not_aligned(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str
) -> None:
    data = data_of(student_tokenizer, corpus)
    data.setup("fit")
    data.align(teacher_tokenizer, longest=16)
    (batch,) = data.samples("validation")
    assert batch["teacher_input_ids"].shape[1] == 16 and (batch["aligned"] >= 0).sum() > 0
    assert batch["aligned"].max() < 16


def test_a_prompt_behind_the_teachers_positions_is_an_error_where_there_are_many(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str
) -> None:
    data = data_of(student_tokenizer, corpus)
    data.setup("fit")
    with pytest.raises(UsageError, match=r"36 of 36 samples cannot be aligned .*the 4 positions of the teacher"):
        data.align(teacher_tokenizer, longest=4)


def test_a_sample_that_the_teacher_does_not_say_is_dropped_and_counted(
    student_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [{"instruction": f"say {n}", "output": "caf\u00e9" if n else "cafe\u0301"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    composing = byte_level(["h e"])
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    data = data_of(student_tokenizer, str(tmp_path / "pairs.jsonl"), validation_size=0, test_size=0)
    data.setup("fit")
    with caplog.at_level("INFO"):
        data.align(composing)
    assert "1 of 30 samples dropped, the first because the teacher's tokenizer does not say its text" in caplog.text
    assert len(data.splits["train"]) == 29
    data.align(student_tokenizer)  # of another teacher


def test_two_tokenizers_are_refused_where_that_is_asked_for_or_nothing_gives_the_text(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str
) -> None:
    student, teacher = models(student_tokenizer, teacher_tokenizer)
    data = data_of(student_tokenizer, corpus, teacher_tokenizer=teacher_tokenizer)
    with pytest.raises(UsageError, match="disagree on the vocabulary"):
        fitted(DistillationModule(student, teacher, alignment="refuse"), data)
    module = DistillationModule(student, teacher)
    module.model_tokenizers = {"student": student_tokenizer, "teacher": teacher_tokenizer}
    ids = torch.ones(2, 8, dtype=torch.int64)
    rows = [{"input_ids": row, "attention_mask": row, "labels": row} for row in ids]
    with pytest.raises(UsageError, match="plain DataLoaders give no text to align them by"):
        fitted(module, DataLoader(rows, batch_size=2))


def test_a_teacher_without_an_end_is_refused(student_tokenizer: PreTrainedTokenizerFast, corpus: str) -> None:
    data = data_of(student_tokenizer, corpus)
    data.setup("fit")
    with pytest.raises(UsageError, match="of the teacher's tokenizer: the tokenizer has no end-of-text token"):
        data.align(byte_level(["h e"], []))


def test_an_empty_and_a_one_letter_response(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs = [{"instruction": "say", "output": ""}, {"instruction": "say x", "output": "x"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = data_of(student_tokenizer, str(tmp_path / "pairs.jsonl"), validation_size=0, test_size=0)
    data.setup("fit")
    data.align(teacher_tokenizer)
    (batch,) = data.samples("train")
    learnt = (batch["labels"] != -100).sum(1).tolist()
    assert sorted((batch["aligned"] >= 0).sum(1).tolist()) == sorted(learnt) == [2]  # of nothing, nothing
    module = DistillationModule(*models(student_tokenizer, teacher_tokenizer))
    module.teacher = AlignedTeacher(
        module.teacher,
        Classes(torch.arange(262), torch.arange(261), 262),
        teacher_tokenizer,
        data.align(teacher_tokenizer),
    )
    assert module.distill(batch).loss.isfinite()


def test_pictures_are_drawn_of_classes_and_of_aligned_tokens(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str, tmp_path: Path
) -> None:
    module = DistillationModule(*models(student_tokenizer, teacher_tokenizer))
    data = data_of(student_tokenizer, corpus, teacher_tokenizer=teacher_tokenizer)
    logger = CSVLogger(tmp_path)
    callbacks = [DistributionPlot(), HeadWeightMap(), AdaptiveWeightMonitor(every_n_steps=1)]
    fitted(module, data, logger=logger, callbacks=callbacks)
    assert len(list(tmp_path.rglob("*.png"))) == 2
    logger.save()
    means = [row["train/head_weight_step"] for row in csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())]
    assert all(0 < float(mean) < 1 for mean in means if mean) and any(means)
    batch = module.prepare_batch(next(iter(data.val_dataloader())))
    student, teacher = module.distributions(batch, slice(0, 2))
    assert student.shape == teacher.shape == (2, 257)
    # A class is shown as the shortest token in it: "t" begins "th" and "the".
    classes, said = module.teacher.classes, module.teacher.pairing.student
    of = {
        said.of(token): int(classes.numbers[column]) for token, column in enumerate(classes.student.of_output.tolist())
    }
    shown = module.teacher.tokens_of(torch.tensor([of[b"the"], of[b"x"]]))
    assert [said.of(token) for token in shown] == [b"t", b"x"]


def test_special_tokens_by_another_name_are_nearly_equal_vocabularies(corpus: str) -> None:
    one, other = byte_level(MERGES), byte_level(MERGES, ["<eos>", "[PAD]"])
    module = DistillationModule(gpt2(16, len(one)), gpt2(24, len(other) + 5))
    data = data_of(one, corpus, teacher_tokenizer=other)
    trainer = fitted(module, data)
    assert trainer.callback_metrics["train/aligned"] == 1
    classes = module.teacher.classes
    columns = classes.student.of_output, classes.teacher.of_output
    assert columns[0][one.convert_tokens_to_ids(END)] == columns[1][other.convert_tokens_to_ids("<eos>")]
    assert len(columns[1]) == len(other) + 5 and len(columns[0]) == len(one)


@pytest.mark.parametrize("settings", [{"packing": True}, {"lora": {"rank": 2}}])
def test_it_goes_with(
    settings: dict[str, Any],
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
    corpus: str,
) -> None:
    student, teacher = models(student_tokenizer, teacher_tokenizer)
    data = data_of(student_tokenizer, corpus, teacher_tokenizer=teacher_tokenizer)
    plain, other = (
        DistillationModule(copy.deepcopy(student), copy.deepcopy(teacher)),
        DistillationModule(student, teacher, **settings),
    )
    losses = [
        fitted(module, data, limit_train_batches=0).validate(module, data, verbose=False)[0]
        for module in (plain, other)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    fitted(other, data, accumulate_grad_batches=2)


def test_a_cache_holds_the_teachers_side(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str, tmp_path: Path
) -> None:
    student, teacher = models(student_tokenizer, teacher_tokenizer)
    data = data_of(student_tokenizer, corpus, teacher_tokenizer=teacher_tokenizer)
    cache = write(teacher, tmp_path / "cache", data, codec="bfloat16")
    found = []
    for of in (teacher, cache):
        module = DistillationModule(copy.deepcopy(student), of)
        fresh = data_of(student_tokenizer, corpus, teacher_tokenizer=teacher_tokenizer)
        found.append(Trainer(**QUIET).validate(module, fresh, verbose=False)[0])
    assert found[1] == pytest.approx(found[0], rel=2e-2)
    assert found[1]["val/aligned"] == found[0]["val/aligned"] < 1
    # What is not there is said with the teacher's template, not the student's.
    apart = {"teacher_tokenizer": teacher_tokenizer, "teacher_template": "{instruction}? "}
    with pytest.raises(
        UsageError, match=r"lacks 4 of 4 validation samples.* template 'plain', this run's is '.instruct"
    ):
        Trainer(**QUIET).validate(
            DistillationModule(student, cache), data_of(student_tokenizer, corpus, **apart), verbose=False
        )
    other = data_of(student_tokenizer, corpus, teacher_tokenizer=byte_level(["n o"], ["<stop>"]))
    with pytest.raises(UsageError, match="another tokenizer"):
        Trainer(**QUIET).validate(DistillationModule(student, cache), other, verbose=False)


def rows_of_cache(path: Path) -> dict[bytes, list[bytes]]:
    """What a cache holds of each sample, by its digest."""
    found = {}
    for file in path.glob("shard-*"):
        shard = open_shard(file)
        offsets = shard.pop("offsets").tolist()
        for number, digest in enumerate(shard.pop("digests")):
            rows = [shard[name][offsets[number] : offsets[number + 1]] for name in sorted(shard)]
            found[digest.numpy().tobytes()] = [row.view(torch.uint8).numpy().tobytes() for row in rows]
    return found


def test_one_cache_serves_students_of_several_tokenizers(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str, tmp_path: Path
) -> None:
    _, teacher = models(student_tokenizer, teacher_tokenizer)
    other_tokenizer = byte_level(["e n", "Ġ o", "i n", "in g", "o r", "Ġ w"])
    # Samples one by one, so that nothing depends on what they are padded to.
    both = [
        partial(data_of, tokenizer, corpus, teacher_tokenizer=teacher_tokenizer, batch_size=1, max_length=200)
        for tokenizer in (student_tokenizer, other_tokenizer)
    ]
    caches = [write(teacher, tmp_path / f"cache{number}", data()) for number, data in enumerate(both)]
    held = [rows_of_cache(tmp_path / f"cache{number}") for number in range(2)]
    assert held[0] == held[1] and len(held[0]) == 36
    # The second student's data add nothing to the first one's cache.
    shards = sorted((tmp_path / "cache0").glob("shard-*"))
    write(teacher, tmp_path / "cache0", both[1]())
    assert sorted((tmp_path / "cache0").glob("shard-*")) == shards
    student = gpt2(16, len(other_tokenizer), positions=256)
    found = [
        Trainer(**QUIET).validate(DistillationModule(copy.deepcopy(student), cache), both[1](), verbose=False)[0]
        for cache in caches
    ]
    assert found[0] == found[1] and 0 < found[0]["val/aligned"] < 1
    live = Trainer(**QUIET).validate(DistillationModule(student, teacher), both[1](), verbose=False)[0]
    assert found[0] == pytest.approx(live, rel=2e-2) and found[0]["val/aligned"] == live["val/aligned"]


def test_the_likeliest_tokens_of_another_tokenizer_are_refused_before_they_are_cached_and_after(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, corpus: str, tmp_path: Path
) -> None:
    student, teacher = models(student_tokenizer, teacher_tokenizer)
    both = {"teacher_tokenizer": teacher_tokenizer}
    with pytest.raises(UsageError, match="top_k keeps no more than the likeliest tokens of GPT2LMHeadModel"):
        write(teacher, tmp_path / "cache", data_of(student_tokenizer, corpus, **both), top_k=4)
    assert not list(tmp_path.glob("cache/shard-*"))
    cache = write(teacher, tmp_path / "own", data_of(teacher_tokenizer, corpus), top_k=4)
    with pytest.raises(UsageError, match="likeliest tokens of another tokenizer alone"):
        fitted(DistillationModule(student, cache), data_of(student_tokenizer, corpus, **both))


# --------------------------------------------------------------------------------------------------------------------
# One source of text under two tokenizers

WORDS = ("the", "then", "to", "an", "and")
NEXT = torch.tensor(
    [[0.1, 0.2, 0.3, 0.2, 0.2], [0.3, 0.1, 0.2, 0.3, 0.1], [0.4, 0.2, 0.1, 0.1, 0.2], [0.2, 0.3, 0.1, 0.1, 0.3],
     [0.3, 0.1, 0.4, 0.1, 0.1]], dtype=torch.float64,
)  # fmt: skip
"""Of a word behind another."""


def next_token(tokenizer: PreTrainedTokenizerFast, begun: Sequence[str], width: int) -> torch.Tensor:
    """What an ideal model expects behind some words, found by splitting all that may come."""
    expected = torch.zeros(width, dtype=torch.float64)
    encode = tokenizer.backend_tokenizer.encode
    first = len(encode(" ".join(begun)).ids)
    for following in product(range(len(WORDS)), repeat=2):
        mass, before = 1.0, WORDS.index(begun[-1])
        for word in following:
            mass, before = mass * float(NEXT[before, word]), word
        expected[encode(" ".join([*begun, *(WORDS[word] for word in following)])).ids[first]] += mass
    return expected


def test_one_source_under_two_tokenizers_is_the_same_over_classes_and_not_with_a_bucket_for_the_rest() -> None:
    # " the", " an" and "the" of the one are " t", " a" and "t" of the other, which goes on with "hen" and "nd".
    student = byte_level(["Ġ t", "Ġ a", "h e", "t he", "Ġt he", "Ġa n"])
    teacher = byte_level(["Ġ t", "Ġ a", "h e", "he n", "n d", "t o"], ["<stop>"])
    sides = [Vocabulary(TokenBytes(one, "x"), [one.eos_token_id], len(one)) for one in (student, teacher)]
    found = partition(*sides)
    said = [[side.of(token) for token in range(side.outputs)] for side in sides]
    shared = {of: number for number, of in enumerate(sorted((set(said[0]) & set(said[1])) - {None}))}
    bucket = [torch.tensor([shared.get(of, len(shared)) for of in side]) for side in said]
    for begun in (["to"], ["the", "and"], ["an", "then"]):
        q, p = (next_token(one, begun, side.outputs) for one, side in zip((student, teacher), sides, strict=True))
        far = {}
        for name, (mine, yours) in {"classes": (found.student, found.teacher), "bucket": bucket}.items():
            count = int(max(mine.max(), yours.max())) + 1
            of_student, of_teacher = (
                torch.zeros(count, dtype=torch.float64).index_add(0, of, mass) for of, mass in ((mine, q), (yours, p))
            )
            logits = [(mass + 1e-12).log()[None] for mass in (of_student, of_teacher)]
            far[name] = float(ForwardKL()(*logits).sum())
        assert far["classes"] == pytest.approx(0, abs=1e-9) and far["bucket"] > 0.3


def test_a_response_that_is_known_by_its_tokens_alone_has_a_teachers_side(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    pairing = Pairing(Chat(student_tokenizer, "plain"), Chat(teacher_tokenizer, "plain"))
    end, prompt = teacher_tokenizer.eos_token_id, [7, 8, 9]
    prompts = student_tokenizer("x\n").input_ids, prompt
    ids = [*student_tokenizer("the a the").input_ids, student_tokenizer.eos_token_id]
    # the| a| |the|END and t|he| |a| t|he|STOP
    side = pairing.response(prompts, ids)
    assert side.input_ids == [*prompt, *teacher_tokenizer("the a the").input_ids, end]
    assert side.spans == [(3, 10)] and side.aligned == [3, 5, 7, -1, 9]
    cut = pairing.response(prompts, ids[:-1])
    assert cut.input_ids == side.input_ids[:-1] and cut.aligned == side.aligned[:-1]
    assert pairing.response(prompts, ids[-1:]) == TeacherSide([*prompt, end], [(3, 4)], [3], [-1])


def test_a_response_is_aligned_up_to_what_is_no_text(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    pairing = Pairing(Chat(student_tokenizer, "plain"), Chat(teacher_tokenizer, "plain"))
    end, prompts = teacher_tokenizer.eos_token_id, (student_tokenizer("x\n").input_ids, [7, 8, 9])
    said = [7, 8, 9, *teacher_tokenizer("a").input_ids, end]
    # Half a character: the teacher says of its first byte that something else was to come, of the others nothing.
    thumb = student_tokenizer("👍").input_ids
    for half in ([*thumb[:-2]], [*thumb[:-2], *student_tokenizer("the").input_ids, student_tokenizer.eos_token_id]):
        side = pairing.response(prompts, [*student_tokenizer("a").input_ids, *half])
        assert side.input_ids == said and side.aligned == [3, 4, *[-1] * (len(half) - 1)]
    # A whole one is a text.
    side = pairing.response(prompts, [*student_tokenizer("a").input_ids, *thumb])
    assert side.input_ids == [7, 8, 9, *teacher_tokenizer("a👍").input_ids] and side.aligned == [3, 4, 5, 6, 7]
    # A special token in the middle, which ends nothing.
    more = byte_level(MERGES, [END, "<odd>"])
    pairing = Pairing(Chat(more, "plain"), Chat(teacher_tokenizer, "plain"))
    ids = [*more("a").input_ids, more.convert_tokens_to_ids("<odd>"), *more("the").input_ids, more.eos_token_id]
    side = pairing.response((more("x\n").input_ids, [7, 8, 9]), ids)
    assert side.input_ids == said and side.aligned == [3, 4, -1, -1]
    # And nothing but that.
    side = pairing.response((more("x\n").input_ids, [7, 8, 9]), ids[1:2])
    assert side.input_ids == [7, 8, 9, end] and side.aligned == [3]


ODD = byte_level(MERGES, [END, "<odd>"])
OTHERS = (
    byte_level(["h e", "Ġ t", "ð Ł"], ["<stop>"]),
    sentencepiece(["▁", *"abcdefghijklmnopqrstuvwxyz"], ["▁ t", "h e"]),
)
PAIRINGS = [Pairing(Chat(ODD, "plain"), Chat(other, "plain")) for other in OTHERS]


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(st.integers(0, len(ODD) - 1), min_size=1, max_size=12), st.sampled_from(PAIRINGS))
def test_whatever_a_student_says_aligned_tokens_have_read_the_same(ids: list[int], pairing: Pairing) -> None:
    ids = ids[: ids.index(ODD.eos_token_id) + 1] if ODD.eos_token_id in ids else ids
    prompt = pairing.tokenizer("x\n").input_ids
    side = pairing.response((ODD("x\n").input_ids, prompt), ids)
    assert len(side.aligned) == len(ids) and side.input_ids[: len(prompt)] == prompt
    for number, other in enumerate(side.aligned):
        before = pairing.student.join(ids[:number])
        if other >= 0:
            assert pairing.teacher.join(side.input_ids[len(prompt) : other]) == before
    places = [other for other in side.aligned if other >= 0]
    assert places == sorted(set(places)) and side.aligned[0] == len(prompt)


def test_what_looks_like_the_teachers_end_in_a_response_is_text(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    pairing = Pairing(Chat(student_tokenizer, "plain"), Chat(teacher_tokenizer, "plain"))
    ids = [*student_tokenizer("a<stop>a").input_ids, student_tokenizer.eos_token_id]
    side = pairing.response((student_tokenizer("x\n").input_ids, [7]), ids)
    assert side.input_ids.count(teacher_tokenizer.eos_token_id) == 1
    assert side.aligned[0] == 1 and side.aligned[-1] == len(side.input_ids) - 1 and -1 not in side.aligned[:3]


def test_a_text_that_the_teacher_cannot_say_is_aligned_up_to_there(student_tokenizer: PreTrainedTokenizerFast) -> None:
    composing = byte_level(["h e"], ["<stop>"])
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    pairing = Pairing(Chat(student_tokenizer, "plain"), Chat(composing, "plain"))
    ids = [*student_tokenizer("the cafe\u0301 a").input_ids, student_tokenizer.eos_token_id]
    side = pairing.response((student_tokenizer("x\n").input_ids, [7]), ids)
    # the| |c|a|f|e|cc|81| a|END and t|he| |c|a|f|c3|a9| |a|STOP: behind "caf" they differ.
    assert side.aligned == [1, 3, 4, 5, 6, 7, -1, -1, -1, -1]


def test_a_response_is_cut_at_the_teachers_positions(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [*student_tokenizer("the a the").input_ids, student_tokenizer.eos_token_id]
    for longest, aligned in ((6, [3, 5, -1, -1, -1]), (3, [-1] * 5)):
        pairing = Pairing(Chat(student_tokenizer, "plain"), Chat(teacher_tokenizer, "plain"), longest)
        side = pairing.response((student_tokenizer("x\n").input_ids, [7, 8, 9]), ids)
        assert side.aligned == aligned and len(side.input_ids) == longest
        assert side.spans == ([(3, 6)] if longest > 3 else [])


THINKS = (
    "{% for m in messages %}{{ m.role }}: {{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"
    "<stop>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_what_a_template_writes_before_an_answer_is_written_before_a_response(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher_tokenizer.chat_template = THINKS
    pairing = Pairing(Chat(student_tokenizer, "plain"), Chat(teacher_tokenizer))
    assert pairing.chats[1].rendering.before == "<think></think>"
    ids = [*student_tokenizer("the a").input_ids, student_tokenizer.eos_token_id]
    side = pairing.response((student_tokenizer("x\n").input_ids, [7]), ids)
    assert teacher_tokenizer.decode(side.input_ids[1:]) == "<think></think>the a<stop>"
    first = 1 + len(teacher_tokenizer("<think></think>").input_ids)
    assert side.aligned == [first, first + 2, first + 4]
    # Of a student that says as much itself, the answer alone is the text.
    other = byte_level(MERGES)
    other.chat_template = THINKS.replace("<stop>", END)
    pairing = Pairing(Chat(other), Chat(teacher_tokenizer))
    ids = [*other("<think></think>the a").input_ids, other.eos_token_id]
    again = pairing.response((other("x").input_ids, [7]), ids)
    assert again.input_ids == side.input_ids and [at for at in again.aligned if at >= 0] == side.aligned


def test_a_space_that_a_tokenizer_puts_before_each_text_is_none_of_a_response(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    pieces = sentencepiece(["▁", "t", "h", "e", "a", "x", "\n"], ["▁ t", "h e"])
    pairing = Pairing(Chat(student_tokenizer, "plain"), Chat(pieces, "plain"))
    ids = [*student_tokenizer("the").input_ids, student_tokenizer.eos_token_id]
    side = pairing.response((student_tokenizer("x\n").input_ids, [7]), ids)
    # the|END and, behind a line, t|he|</s>
    assert pieces.convert_ids_to_tokens(side.input_ids[1:]) == ["t", "he", END] and side.aligned == [1, 3]
    pairing = Pairing(Chat(pieces, "plain"), Chat(teacher_tokenizer, "plain"))
    side = pairing.response((pieces("x\n").input_ids, [7]), pieces.convert_tokens_to_ids(["t", "he", END]))
    assert side.input_ids[1:] == teacher_tokenizer("the<stop>").input_ids and side.aligned == [1, 2, 3]


def test_the_command_takes_the_students_tokenizer_and_says_what_is_compared(
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tokenizer, model in zip(
        ("student", "teacher"),
        (student_tokenizer, teacher_tokenizer),
        models(student_tokenizer, teacher_tokenizer),
        strict=True,
    ):
        tokenizer.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
    source = ["--data.source", "JsonLines", "--data.source.path", corpus, "--data.max_length", "60"]
    source += ["--data.validation_size", "4", "--data.test_size", "4", "--trainer.accelerator", "cpu"]
    cached = ["cache", "--model.teacher", "teacher", "--model.path", "cached", "--data.tokenizer", "student", *source]
    fit = ["fit", "--model.student", "student", *source, "--trainer.max_steps", "1", "--trainer.logger", "false"]
    for arguments in ([*fit, "--model.teacher", "teacher"], cached, [*fit, "--model.teacher", "cache:cached"]):
        monkeypatch.setattr("sys.argv", ["akl", *arguments])
        main()
        said = capsys.readouterr().err
        assert "train: " in said and "% of" in said and "response tokens are aligned with the teacher's" in said
        if "fit" in arguments:
            assert "Teacher and student have different tokenizers: 256 tokens are in both, 257 classes" in said
    monkeypatch.setattr("sys.argv", ["akl", *fit, "--model.teacher", "teacher", "--model.alignment", "refuse"])
    with pytest.raises(SystemExit):
        main()
    assert "error: teacher and student disagree on the vocabulary" in capsys.readouterr().err
