"""Prompts out of a batch and answers into it, by hand."""

import pytest
import torch

from akl_lightning.batch import Response
from akl_lightning.data.aligned import TeacherSide
from akl_lightning.errors import UsageError
from akl_lightning.rollouts.batches import Answer, answered, rollout_tokens, samples_of, up_to_the_end

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 0], [9, 9, 4, 0, 0], [3, 2, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
    "labels": torch.tensor([[-100, -100, 7, 8, 0], [-100, -100, 4, 0, -100], [-100] * 5]),
    "index": torch.tensor([4, 7, -1]),
}
"""End token and padding are both 0, as of GPT-2; the last one is a prompt alone."""


def test_a_prompt_is_what_stands_before_the_response() -> None:
    samples = samples_of(BATCH, -100)
    assert [sample.tokens for sample in samples] == [[5, 6, 7, 8, 0], [9, 9, 4, 0], [3, 2]]
    assert [sample.starts for sample in samples] == [[2], [2], []]
    assert [sample.number for sample in samples] == [4, 7, -1]


def test_turns_are_told_apart_and_padding_may_stand_in_front() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 2, 3, -100, 5, 6, 7]]),
    }
    (sample,) = samples_of(batch, -100)
    assert sample.tokens == [1, 2, 3, 4, 5, 6, 7] and sample.starts == [1, 4] and sample.turns == [-1, -1]
    # Two turns with nothing between them are told apart by their numbers.
    turn = torch.tensor([[-1, -1, 0, 0, -1, 1, 2, 2]])
    (sample,) = samples_of({**batch, "turn": turn}, -100)
    assert sample.starts == [1, 4, 5] and sample.turns == [0, 1, 2]


def test_an_answer_takes_the_place_of_a_response() -> None:
    turn = torch.where(BATCH["labels"] == -100, -1, 0)
    answers = {1: Answer([9, 9], [1, 2, 3, 0], False, True, 1), 2: Answer([3, 2], [0], False, True)}
    batch = answered({**BATCH, "turn": turn}, answers, 0, -100)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0], [9, 9, 1, 2, 3, 0], [3, 2, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, 7, 8, 0, -100],
        [-100, -100, 1, 2, 3, 0],
        [-100, -100, 0, -100, -100, -100],  # an empty answer is its end
    ]
    assert batch["turn"].tolist() == [[-1, -1, 0, 0, 0, -1], [-1, -1, 1, 1, 1, 1], [-1] * 6]
    assert batch["index"] is BATCH["index"]
    assert answered(BATCH, {}, 0, -100) == BATCH


def test_rows_become_shorter_where_the_longest_response_is_replaced() -> None:
    batch = answered(BATCH, {0: Answer([5, 6], [0], False, True)}, 0, -100)
    assert batch["input_ids"].shape == (3, 4)
    assert batch["labels"].tolist()[0] == [-100, -100, 0, -100]


def test_which_tokens_are_rollouts_and_what_they_weigh() -> None:
    answers = {1: Answer([9, 9], [1, 2], True, True), 2: Answer([3, 2], [0], False, False)}
    batch = answered(BATCH, answers, 0, -100)
    labels = batch["labels"]
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    positions = (following != -100).nonzero().flatten()
    found = rollout_tokens(batch, Response(positions, following[positions]), 0.25)
    assert following[positions].tolist() == [7, 8, 0, 1, 2, 0]
    assert found.samples.tolist() == [False, True, True]
    assert found.alpha.tolist() == [0.25] * 3 + [1.0] * 3
    assert found.places.tolist() == [3, 4, 5] and found.others.tolist() == [0, 1, 2]
    assert found.own.tolist() == [3, 4]  # the other one is the teacher's
    assert found.lengths.tolist() == [2, 1] and found.cut.tolist() == [1, 0] and not len(found.aligned)


def test_a_teacher_with_another_tokenizer_reads_its_own_tokens() -> None:
    teacher = {
        "teacher_input_ids": torch.tensor([[30, 31, 32, 33], [40, 41, 42, 0], [50, 51, 0, 0]]),
        "teacher_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),
        "teacher_labels": torch.tensor([[-100, -100, 32, 33], [-100, 41, 42, -100], [-100] * 4]),
        "teacher_turn": torch.tensor([[-1, -1, 0, 0], [-1, 0, 0, -1], [-1] * 4]),
        "aligned": torch.tensor([[-1, -1, 2, -1, 3], [-1, -1, 1, 2, -1], [-1] * 5]),
    }
    answers = {1: Answer([9, 9], [1, 2, 3, 0], False, True, 0), 2: Answer([3, 2], [8], True, True)}
    sides = {
        1: TeacherSide([40, 61, 62, 63, 64], [(1, 5)], [1, -1, 3, 4], [-1]),
        2: TeacherSide([70], [(0, 1)], [0], [-1]),  # nothing predicts the first token
    }
    batch = answered({**BATCH, **teacher}, answers, 0, -100, sides)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0], [9, 9, 1, 2, 3, 0], [3, 2, 8, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 0, -100], [-100, -100, 1, -100, 3, 0], [-100] * 6]
    assert batch["aligned"].tolist() == [[-1, -1, 2, -1, 3, -1], [-1, -1, 1, -1, 3, 4], [-1] * 6]
    assert batch["teacher_input_ids"].tolist() == [[30, 31, 32, 33, 0], [40, 61, 62, 63, 64], [70, 0, 0, 0, 0]]
    assert batch["teacher_attention_mask"].sum(1).tolist() == [4, 5, 1]
    assert batch["teacher_labels"].tolist() == [
        [-100, -100, 32, 33, -100],
        [-100, 61, 62, 63, 64],
        [70, -100, -100, -100, -100],
    ]
    assert batch["teacher_turn"].tolist() == [[-1, -1, 0, 0, -1], [-1, 0, 0, 0, 0], [-1] * 5]
    positions = (torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten() != -100).nonzero()[:, 0]
    found = rollout_tokens(batch, Response(positions, batch["labels"].flatten()[positions + 1]), 0.25)
    assert found.alpha.tolist() == [0.25] * 3 + [1.0] * 3
    assert found.aligned.tolist() == [1, 0, 1, 1, 0] and found.lengths.tolist() == [4, 1]


def test_nothing_is_learnt_behind_the_first_end_and_a_cut_answer_has_none() -> None:
    assert up_to_the_end([7, 1, 8, 0, 5], [0, 1], 9) == ([7, 1], False)
    assert up_to_the_end([7, 8, 9, 9], [0], 3) == ([7, 8, 9], True)
    assert up_to_the_end([7, 8, 9, 0], [0], 3) == ([7, 8, 9], True)


@pytest.mark.parametrize("more", [{"position_ids": BATCH["input_ids"]}, {"pixel_values": torch.zeros(3)}])
def test_what_a_new_response_could_not_be_given_is_refused(more: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(more))}.*share to 0"):
        samples_of({**BATCH, **more}, -100)


def test_pieces_of_a_turn_are_one_response() -> None:
    ids = torch.arange(1, 9)[None]
    labels = torch.tensor([[-100, 2, -100, 4, -100, -100, 7, 8]])
    turn = torch.tensor([[-1, 0, -1, 0, -1, -1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "turn": turn}
    (sample,) = samples_of(batch, -100)
    assert (sample.starts, sample.turns) == ([1, 6], [0, 1])
    del batch["turn"]
    (sample,) = samples_of(batch, -100)
    assert sample.starts == [1, 3, 6]
