"""The student's answers, scored by a teacher with another tokenizer: tiny models, everything recomputed by hand."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from akl_lightning.callbacks import LastCheckpoint, SampledAnswers, answers
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.divergences import ForwardKL, ReverseKL
from akl_lightning.errors import UsageError
from akl_lightning.kernels.classes import FLOOR
from akl_lightning.module import DistillationModule
from akl_lightning.rollouts import GenerateEngine, OnPolicy, Sampling
from akl_lightning.rollouts.aligned import sides_of
from akl_lightning.rollouts.batches import Answer
from akl_lightning.teachers.aligned import AlignedTeacher
from akl_lightning.tokenizers.bytes import TokenBytes
from tests import references
from tests.conftest import QUIET, gpt2, write
from tests.rollouts.test_rollouts import Break, Seen, rolled
from tests.test_module import parameters
from tests.tokenizers.tiny import END, byte_level

STUDENT = byte_level(["t h", "th e", "Ġ a", "o n", "n e", "y e"], [END, "<odd>"])
TEACHER = byte_level(["h e", "Ġ a", "a g", "n e", "o u", "w o", "i n"], ["<stop>"])
SHORT = Sampling(max_new_tokens=8)


class Words(GenerateEngine):
    """Says one of some answers, whatever the student would say."""

    def __init__(self, *said: list[int]) -> None:
        super().__init__()
        self.said = said

    def generate(self, prompts: Any, decoding: Any, seeds: Any) -> list[list[int]]:
        return [self.said[seed % len(self.said)] for seed in seeds]


def ids(text: str, end: bool = True) -> list[int]:
    return [*STUDENT(text).input_ids, *([STUDENT.eos_token_id] if end else [])]


ANSWERS = (
    ids("the one yes"),
    ids("wine", end=False),
    ids(""),
    ids("a👍", end=False)[:-1],
    [*ids("the", end=False), STUDENT.convert_tokens_to_ids("<odd>"), *ids("one")],
)
"""One that ends, one that is cut, nothing, half a character, a special token in the middle."""


def data_of(corpus: str, teacher: PreTrainedTokenizerFast = TEACHER, **settings: Any) -> InstructionDataModule:
    sizes = {"batch_size": 8, "max_length": 60, "validation_size": 4, "test_size": 4}
    return InstructionDataModule(STUDENT, JsonLines(corpus), **{**sizes, "teacher_tokenizer": teacher, **settings})


def module_of(on_policy: OnPolicy | None, teacher: Any = None, **settings: Any) -> DistillationModule:
    torch.manual_seed(1)
    student, own = gpt2(16, len(STUDENT)), gpt2(24, len(TEACHER), positions=128)
    settings = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.5), **settings}
    return DistillationModule(student, own if teacher is None else teacher, on_policy=on_policy, **settings)


def fit(
    on_policy: OnPolicy | None, data: Any, *callbacks: Any, ckpt_path: Any = None, **settings: Any
) -> tuple[DistillationModule, Seen, Trainer]:
    flags = {name: settings.pop(name) for name in list(settings) if name in ("max_epochs", "limit_val_batches")}
    seen = Seen()
    quiet = {**QUIET, "enable_checkpointing": bool(callbacks), "max_epochs": 1, "limit_val_batches": 0}
    trainer = Trainer(**{**quiet, **flags}, callbacks=[seen, *callbacks])
    module = module_of(on_policy, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, seen, trainer


def merged(logits: Tensor, classes: Tensor, count: int) -> Tensor:
    """Log probabilities of classes, ``[1, classes]``: a class without outputs has a floor."""
    p = logits.softmax(-1)[0]
    mass = torch.zeros(count, dtype=p.dtype).index_add(0, classes, p)
    mass = torch.where(classes.bincount(minlength=count) > 0, mass, p.max() * torch.tensor(-FLOOR).double().exp())
    return (mass / mass.sum()).log()[None]


def by_hand(module: DistillationModule, weights: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
    """Of each response token: FKL and RKL of the merged distributions, dense in float64, and cross entropy.

    Both models read the text of prompt and answer, as far as it is one; ``there`` says whether the teacher has a token
    that begins where the student's does, or nothing more to say.
    """
    teacher = module.teacher
    assert isinstance(teacher, AlignedTeacher)
    models = gpt2(16, len(STUDENT)).double(), copy.deepcopy(teacher.teacher.model.model).double()
    models[0].load_state_dict(weights)
    said = TokenBytes(STUDENT, "x"), TokenBytes(TEACHER, "y")
    columns = [side.of_output for side in (teacher.classes.student, teacher.classes.teacher)]
    found: dict[str, list[Tensor]] = {name: [] for name in ("fkl", "rkl", "cross_entropy", "there", "new", "label")}
    for row, new in enumerate(rolled(batch).tolist()):
        mine = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        yours = TEACHER(text_of(said[0].join(mine))).input_ids
        begins = {len(said[1].join(yours[:number])): number for number in range(len(yours) + 1)}
        with torch.no_grad():
            log_q = models[0].eval()(torch.tensor([mine])).logits[0].log_softmax(-1)
            logits = models[1].eval()(torch.tensor([yours])).logits[0]
        for place in (batch["turn"][row] >= 0).nonzero().flatten().tolist():
            number = begins.get(len(said[0].join(mine[:place])))
            p = merged(logits[[(number or 1) - 1]], columns[1], teacher.classes.width)
            q = merged(log_q[[place - 1]], columns[0], teacher.classes.width)
            values = {
                "fkl": references.forward_kl(p, q)[0], "rkl": references.reverse_kl(p, q)[0],
                "cross_entropy": -log_q[place - 1, mine[place]], "there": torch.tensor(number is not None),
                "new": torch.tensor(new), "label": batch["labels"][row, place],
            }  # fmt: skip
            for name, value in values.items():
                found[name].append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def text_of(said: bytes) -> str:
    """As much of some bytes as is text."""
    try:
        return said.decode()
    except UnicodeDecodeError as error:
        return said[: error.start].decode()


@pytest.mark.parametrize("own", [False, True])
def test_the_loss_is_the_dense_one_of_merged_distributions_where_both_have_read_the_same(
    corpus: str, own: bool
) -> None:
    on_policy = OnPolicy(0.6, SHORT, engine=Words(*ANSWERS), divergence=ReverseKL() if own else None)
    criterion = DistillationCriterion(ForwardKL() if own else ReverseKL(), alpha=0.25)
    module, seen, trainer = fit(on_policy, data_of(corpus), criterion=criterion)
    rollouts: list[tuple[Tensor, ...]] = []
    for batch, weights, outputs in zip(seen.batches, seen.weights, seen.outputs, strict=True):
        hand = by_hand(module, weights, batch)
        there, new, labelled = hand["there"], hand["new"], hand["label"] != -100
        # Of a rollout all that is aligned is learnt and nothing else, of the data everything.
        assert torch.equal(labelled, there | ~new) and batch["is_aligned"].tolist() == there[labelled].tolist()
        divergence = hand["fkl"] if own else hand["rkl"]
        weighted = torch.where(there, 0.25 * divergence + 0.75 * hand["cross_entropy"], hand["cross_entropy"])
        expected = torch.where(new, hand["rkl"], weighted)[labelled]
        torch.testing.assert_close(outputs["statistics"]["loss"].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs["loss"].double(), expected.sum(), rtol=1e-4, atol=1e-4)
        rollouts.append((there[new], ~new & there, ~new))
    assert {bool(flag) for there, _, _ in rollouts for flag in there} == {True, False}
    logged = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
    share = torch.cat([there for there, _, _ in rollouts]).double().mean().item()
    assert logged["rollout_aligned"] == pytest.approx(share)
    of_data = sum(int(both.sum()) for _, both, _ in rollouts) / sum(int(data.sum()) for *_, data in rollouts)
    assert logged["aligned"] == pytest.approx(of_data)
    lengths = [len(answer) for batch in seen.batches for answer in answers_of(batch)]
    assert logged["rollout_length"] == pytest.approx(sum(lengths) / len(lengths))


def answers_of(batch: dict[str, Any]) -> list[list[int]]:
    """Of the rollouts all tokens, with those that have no label."""
    rows = rolled(batch).nonzero().flatten().tolist()
    return [batch["input_ids"][row][batch["turn"][row] >= 0].tolist() for row in rows]


def test_a_permuted_copy_of_the_tokenizer_gives_the_run_of_equal_vocabularies(corpus: str) -> None:
    other = byte_level(["t h", "th e", "Ġ a", "o n", "n e", "y e"], [END, "<odd>"], order=-1)
    order = torch.tensor([STUDENT.convert_tokens_to_ids(other.convert_ids_to_tokens(n)) for n in range(len(other))])
    teacher = gpt2(24, len(STUDENT))
    permuted = copy.deepcopy(teacher)
    permuted.transformer.wte.weight.data = teacher.transformer.wte.weight.data[order]
    permuted.lm_head.weight = permuted.transformer.wte.weight
    runs = []
    for of, tokenizer in ((teacher, None), (permuted, other)):
        data = data_of(corpus, tokenizer, teacher_template=tokenizer and "plain")
        on_policy = OnPolicy(0.6, SHORT, engine=Words(*ANSWERS[:3]))
        criterion = DistillationCriterion(alpha=0.25)
        runs.append(fit(on_policy, data, teacher=of, criterion=criterion, limit_val_batches=1.0))
    (equal, _, first), (aligned, _, second) = runs
    assert isinstance(aligned.teacher, AlignedTeacher) and not isinstance(equal.teacher, AlignedTeacher)
    torch.testing.assert_close(parameters(aligned), parameters(equal), rtol=1e-4, atol=1e-6)
    means = [{name: float(value) for name, value in run.callback_metrics.items()} for run in (first, second)]
    assert {means[1].pop(name) for name in ("train/aligned", "val/aligned", "train/rollout_aligned")} == {1.0}
    assert means[0].keys() == means[1].keys() and "val/rollout_rkl" in means[0]
    same = [name for name in means[0] if "sampling" not in name]
    assert [means[1][name] for name in same] == pytest.approx([means[0][name] for name in same], rel=1e-4)


def test_a_students_own_draws_are_scored_in_training_and_in_validation(corpus: str) -> None:
    module, seen, trainer = fit(OnPolicy(1.0, SHORT), data_of(corpus), max_epochs=2, limit_val_batches=1.0)
    logged = trainer.callback_metrics
    # A new student says any byte after another: of most answers little is text.
    assert 0 < logged["train/rollout_aligned"] < 1 and logged["train/rollout_divergence"] > 0
    assert 0 < logged["val/rollout_rkl"] < 20 and "train/aligned" not in logged
    for batch, weights, outputs in zip(seen.batches, seen.weights, seen.outputs, strict=True):
        hand = by_hand(module, weights, batch)
        assert hand["new"].all() and torch.equal(hand["there"], hand["label"] != -100)
        assert outputs["statistics"]["rkl"].tolist() == pytest.approx(hand["rkl"][hand["there"]].tolist(), rel=1e-3)


@pytest.mark.parametrize("settings", [{"packing": True}, {"lora": {"rank": 2, "target_modules": ["c_attn"]}}])
def test_it_goes_with(corpus: str, settings: dict[str, Any]) -> None:
    on_policy = OnPolicy(0.5, SHORT, engine=Words(*ANSWERS))
    losses = []
    for more in ({}, settings):
        _, seen, _ = fit(on_policy, data_of(corpus), **more)
        losses.append(float(seen.outputs[0]["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("turns", ["last", "random"])
def test_a_turn_of_a_conversation_is_answered_behind_the_teachers_own_words(tmp_path: Path, turns: str) -> None:
    student, teacher = byte_level(["t h"]), byte_level(["h e"], ["<stop>"])
    for tokenizer, before, end in ((student, "{{ m.role }}: ", END), (teacher, "[{{ m.role }}]", "<stop>")):
        tokenizer.chat_template = (
            f"{{% for m in messages %}}{before}{{{{ m.content }}}}{end}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{before.replace('{{ m.role }}', 'assistant')}{{% endif %}}"
        )
    with (tmp_path / "chats.jsonl").open("w") as file:
        for number in range(8):
            words = [f"the{number}", "hat", "then", "heat"]
            messages = [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
            file.write(json.dumps({"messages": messages}) + "\n")
    data = InstructionDataModule(
        student, JsonLines(str(tmp_path / "chats.jsonl")), batch_size=8, max_length=120, validation_size=0,
        test_size=0, teacher_tokenizer=teacher,
    )  # fmt: skip
    torch.manual_seed(1)
    module = DistillationModule(
        gpt2(16, len(student), 128),
        gpt2(24, len(teacher), 128),
        on_policy=OnPolicy(1.0, SHORT, turns=turns, engine=Words([*student("the").input_ids, student.eos_token_id])),
    )
    seen = Seen()
    Trainer(**QUIET, max_epochs=1, callbacks=[seen]).fit(module, data)
    own = seen.batches[0]["of_teacher"]
    read = [teacher.decode(row[mask.bool()]) for row, mask in zip(own["input_ids"], own["attention_mask"], strict=True)]
    last = "[user]the<stop>[assistant]hat<stop>[user]then<stop>[assistant]the<stop>"
    first = "[user]the<stop>[assistant]the<stop>"
    assert {re.sub(r"\d", "", text) for text in read} == ({last} if turns == "last" else {first, last})
    # th|e|END and t|he|STOP
    assert seen.batches[0]["is_aligned"].all() and seen.batches[0]["response"].labels.tolist() == (
        [student.convert_tokens_to_ids("th"), student.eos_token_id] * 8
    )


def test_prompts_alone_are_answered(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(12)))
    data = data_of(str(tmp_path / "prompts.jsonl"))
    _, seen, trainer = fit(OnPolicy(0.5, SHORT, engine=Words(ANSWERS[0])), data, limit_val_batches=1.0)
    own = seen.batches[0]["of_teacher"]
    read = TEACHER.decode(own["input_ids"][0][own["attention_mask"][0].bool()])
    assert read.startswith("say ") and read.endswith("\nthe one yes<stop>")
    assert trainer.callback_metrics["val/rollout_rkl"] > 0


def test_what_lies_behind_the_teachers_positions_is_not_learnt_and_said(corpus: str) -> None:
    teacher = gpt2(24, len(TEACHER), positions=16)
    with pytest.warns(UserWarning, match="rollouts fill the 16 positions of the teacher with its own tokens"):
        _, seen, trainer = fit(OnPolicy(1.0, SHORT, engine=Words(ANSWERS[0])), data_of(corpus), teacher=teacher)
    assert 0 < trainer.callback_metrics["train/rollout_aligned"] < 0.9
    assert all(batch["of_teacher"]["input_ids"].shape[1] <= 16 for batch in seen.batches)


def test_rollouts_are_shown_with_the_surprise_of_their_classes(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    drawn: list[Any] = []
    surprises, draw = answers.surprises, answers.draw_surprise
    monkeypatch.setattr(answers, "surprises", lambda module, batch: seen.append(batch) or surprises(module, batch))
    monkeypatch.setattr(answers, "draw_surprise", lambda strips: drawn.extend(strips) or draw(strips))
    on_policy = OnPolicy(0.5, SHORT, engine=Words(ANSWERS[0], ANSWERS[4]))
    logger, callback = CSVLogger(tmp_path), SampledAnswers(3)
    trainer = Trainer(
        **{**QUIET, "logger": logger}, max_epochs=1, limit_train_batches=1, callbacks=[callback], log_every_n_steps=1
    )
    module = module_of(on_policy)
    trainer.fit(module, data_of(corpus))
    rows = [json.loads(line) for line in next(tmp_path.rglob("answers.jsonl")).read_text().splitlines()]
    assert len(rows) == 3 and {row["answer"] for row in rows} <= {"the one yes", "theone"}
    assert len(list(tmp_path.rglob("*.png"))) == 1
    (batch,), teacher = seen, module.teacher
    assert isinstance(teacher, AlignedTeacher) and len(drawn) == 3
    columns = teacher.classes.teacher.of_output, teacher.classes.student.of_output
    for row, strip in enumerate(drawn):
        with torch.no_grad():
            logits = teacher.teacher.model.model(batch["teacher_input_ids"][row][None]).logits[0].double()
        expected = []
        for place in (batch["labels"][row] != -100).nonzero().flatten().tolist():
            p = merged(logits[[int(batch["aligned"][row, place]) - 1]], columns[0], teacher.classes.width)
            expected.append(-p[0, columns[1][batch["labels"][row, place]]].item())
        assert strip.values == pytest.approx(expected, rel=1e-3) and strip.words[0] == "the"


def test_no_surprise_is_drawn_where_the_teacher_does_not_read_the_prompt(tmp_path: Path) -> None:
    said = ["one", "say some other word", "the"]
    with (tmp_path / "chats.jsonl").open("w") as file:
        for number in range(12):
            turns = zip(("user", "assistant") * 2, (f"{number}", *said), strict=True)
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    data = data_of(str(tmp_path / "chats.jsonl"), max_length=54)
    teacher = gpt2(24, len(TEACHER), positions=16)  # up to its second turn
    settings = {**QUIET, "logger": CSVLogger(tmp_path), "limit_train_batches": 1}
    trainer = Trainer(**settings, max_epochs=1, callbacks=[SampledAnswers(2)])
    trainer.fit(module_of(OnPolicy(0.5, SHORT, engine=Words(ANSWERS[0])), teacher), data)
    rows = [json.loads(line) for line in next(tmp_path.rglob("answers.jsonl")).read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["the one yes"] * 2 and "say some other word" in rows[0]["prompt"]
    assert not list(tmp_path.rglob("rollout_surprise"))


@pytest.mark.parametrize("step", [2, 3])
def test_killed_within_a_refresh_a_run_goes_on_with_the_same_rollouts(corpus: str, tmp_path: Path, step: int) -> None:
    settings, data = OnPolicy(0.5, SHORT, refresh_every=3), data_of(corpus)
    whole, undisturbed, _ = fit(settings, data, max_epochs=2)
    last = LastCheckpoint(tmp_path, every_n_steps=1)
    with pytest.raises(KeyError, match="killed"):
        fit(settings, data, last, Break(step), max_epochs=2)
    resumed, seen, _ = fit(settings, data, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert len(undisturbed.batches) == 8 and len(seen.batches) == 8 - step
    mine, before = [answers_of(batch) for batch in seen.batches], [answers_of(b) for b in undisturbed.batches[step:]]
    assert mine == before and any(mine)


def test_what_stays_refused_is_refused_by_name(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = write(gpt2(24, len(TEACHER), positions=128), tmp_path / "cache", data_of(corpus), codec="bfloat16")
    with pytest.raises(UsageError, match="a cached teacher cannot score rollouts"):
        fit(OnPolicy(0.5, SHORT), data_of(corpus), teacher=cached)
    batch = {name: torch.zeros(1, 2) for name in ("teacher_input_ids", "teacher_attention_mask")}
    with pytest.raises(UsageError, match="the batch has no 'teacher_turn'"):
        sides_of(batch, {0: Answer([1], [2], False, True)}, data_of(corpus).pairing)
    # Before the data are read.
    monkeypatch.setattr(JsonLines, "load", lambda *_: pytest.fail("the data were read"))
    for who in ("teacher", "mix"):
        match = f"on_policy.responses_from {who} needs a teacher of the student's tokenizer"
        with pytest.raises(UsageError, match=match):
            fit(OnPolicy(0.5, SHORT, responses_from=who), data_of(corpus))
