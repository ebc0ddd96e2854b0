"""Prompts out of a batch, and answers into it: the one place that knows how samples lie in a batch."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from akl_lightning.batch import Batch, Response
from akl_lightning.data.aligned import TeacherSide
from akl_lightning.data.collate import IGNORE_INDEX, NO_TURN
from akl_lightning.errors import UsageError
from akl_lightning.models.generation import up_to_end
from akl_lightning.models.inputs import CONTENT
from akl_lightning.tokenizers.alignment import NONE


class Sample(NamedTuple):
    """A sample of a batch, without padding."""

    tokens: list[int]
    starts: list[int]
    """Where each of its learnt responses begins in the tokens; none of a prompt alone."""

    turns: list[int]
    """The number of the assistant turn that each response is; -1 where the batch does not say."""

    number: int | None
    """Of the sample in its split, -1 of a filler; None where the batch has no ``index``."""


class Answer(NamedTuple):
    """What takes the place of a response."""

    prompt: list[int]
    tokens: list[int]
    """Its end token included, if it has one."""

    cut: bool
    """Whether it has none."""

    own: bool
    """Whether the student itself has sampled it."""

    turn: int = NO_TURN
    """The number of the assistant turn."""


class RolloutTokens(NamedTuple):
    """Which response tokens of a batch are rollouts'."""

    samples: Tensor
    """Which of the batch's samples are rollouts, bool, ``[batch]``."""

    alpha: Tensor
    """Weight of the divergence at each response token, ``[tokens]``."""

    places: Tensor
    """Of rollouts' tokens among the response tokens, int64."""

    others: Tensor
    """Of all others."""

    own: Tensor
    """Of those that the student itself has sampled."""

    lengths: Tensor
    """Tokens of each rollout, ``[rollouts]``."""

    cut: Tensor
    """1 for each rollout that was cut off, else 0, ``[rollouts]``."""

    aligned: Tensor
    """1 for each token of a rollout at which a teacher with another tokenizer stands at the same byte, else 0; none of
    a teacher that shares the student's, ``[tokens of rollouts]`` or ``[0]``."""


def samples_of(batch: Batch, ignore_index: int) -> list[Sample]:
    """The samples of a batch.

    >>> ids, mask = torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    >>> labels = torch.tensor([[-100, 6, -100, -100, 9, -100]])
    >>> samples_of({"input_ids": ids, "attention_mask": mask, "labels": labels}, -100)
    [Sample(tokens=[5, 6, 7, 8, 9], starts=[1, 4], turns=[-1, -1], number=None)]

    Raises:
        UsageError: it holds more than tokens, which nobody could say of a new response.
    """
    if batch["attention_mask"].dim() != 2 or CONTENT & batch.keys():
        odd = min(CONTENT & batch.keys(), default="an attention_mask that is not [batch, length]")
        raise UsageError(f"the batch has {odd}, which a rollout cannot be given: set on_policy.share to 0.")
    ids, mask, labels = (batch[key].cpu() for key in ("input_ids", "attention_mask", "labels"))
    learnt = (labels != ignore_index) & mask.bool()
    turns = batch["turn"].cpu() if "turn" in batch else torch.full_like(labels, NO_TURN)
    numbers = batch["index"].tolist() if "index" in batch else [None] * len(ids)
    samples = []
    for row, number in enumerate(numbers):
        real = mask[row].bool()
        places, turn = learnt[row][real].nonzero().flatten(), turns[row][real]
        of = turn[places]
        begins = torch.ones_like(places, dtype=torch.bool)
        # A template may mark several pieces of one turn.
        begins[1:] = (of[1:] != of[:-1]) | ((of[1:] < 0) & (places[1:] != places[:-1] + 1))
        starts = places[begins]
        samples.append(Sample(ids[row][real].tolist(), starts.tolist(), turn[starts].tolist(), number))
    return samples


def answered(
    batch: Batch,
    answers: Mapping[int, Answer],
    pad: int,
    ignore_index: int,
    sides: Mapping[int, TeacherSide] | None = None,
) -> dict[str, Any]:
    """A batch in which some samples are prompts and new responses, padded on the right.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``; ``turn`` likewise, if it is
            there, and what a teacher with another tokenizer reads. What else it has stays.
        answers: of some rows.
        pad: the padding token.
        ignore_index: label of what is not to be learnt.
        sides: what such a teacher reads of each answer. Without a target there is nothing to learn, so that a token at
            which it does not stand has no label.

    Returns:
        The batch, with ``rollouts``: the answers by row.

    >>> ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    >>> answered(batch, {1: Answer([8], [2, 3, 4], False, True)}, 0, -100)["labels"]
    tensor([[   5,    6,    7, -100],
            [-100,    2,    3,    4]])
    """
    if not answers:
        return dict(batch)
    padding = {"input_ids": pad, "attention_mask": 0, "labels": ignore_index, "turn": NO_TURN}
    if sides:
        padding |= {"aligned": NONE, "teacher_input_ids": 0, "teacher_attention_mask": 0}
        padding |= {"teacher_labels": IGNORE_INDEX, "teacher_turn": NO_TURN}
    rows: dict[int, dict[str, list[int]]] = {}
    for row, answer in answers.items():
        before, behind = len(answer.prompt), len(answer.tokens)
        rows[row] = {
            "input_ids": [*answer.prompt, *answer.tokens],
            "attention_mask": [1] * (before + behind),
            "labels": [ignore_index] * before + answer.tokens,
            "turn": [NO_TURN] * before + [answer.turn] * behind,
        }
        if sides:
            rows[row] |= _read_by_teacher(answer, sides[row], ignore_index)
    new = {}
    for name in padding.keys() & batch.keys():
        of_teacher = name.startswith("teacher_")
        old, real = batch[name], batch["teacher_attention_mask" if of_teacher else "attention_mask"].bool()
        parts = [
            torch.tensor(rows[row][name], dtype=old.dtype, device=old.device) if row in rows else old[row][real[row]]
            for row in range(len(old))
        ]
        new[name] = pad_sequence(parts, True, padding[name])
    return {**batch, **new, "rollouts": dict(answers)}


def _read_by_teacher(answer: Answer, side: TeacherSide, ignore_index: int) -> dict[str, list[int]]:
    """What the row of an answer has for a teacher with another tokenizer, and other labels."""
    said = sum(end - start for start, end in side.spans)
    read = len(side.input_ids) - said
    aligned = [number if number > 0 else NONE for number in side.aligned]  # nothing predicts the first token
    labels = [ignore_index if at == NONE else token for token, at in zip(answer.tokens, aligned, strict=True)]
    return {
        "labels": [ignore_index] * len(answer.prompt) + labels,
        "aligned": [NONE] * len(answer.prompt) + aligned,
        "teacher_input_ids": side.input_ids,
        "teacher_attention_mask": [1] * (read + said),
        "teacher_labels": [IGNORE_INDEX] * read + side.input_ids[read:],
        "teacher_turn": [NO_TURN] * read + [answer.turn] * said,
    }


def padded(rows: Sequence[Tensor], pad: int, side: Literal["left", "right"]) -> dict[str, Tensor]:
    """Token ids of some texts, ``[tokens]`` each, as a batch of ``input_ids`` and ``attention_mask``.

    >>> padded([torch.tensor([5, 6]), torch.tensor([7])], 0, "left")["input_ids"]
    tensor([[5, 6],
            [0, 7]])
    """
    return {
        "input_ids": pad_sequence(list(rows), True, pad, side),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0, side),
    }


def rollout_tokens(batch: Batch, response: Response, alpha: float) -> RolloutTokens:
    """Which of a batch's response tokens are rollouts', found on the host.

    Args:
        batch: as :func:`answered` gives it.
        response: of that batch.
        alpha: weight of the divergence at all other tokens.
    """
    answers, labels = batch["rollouts"], batch["labels"]
    rows = response.positions.cpu() // labels.shape[1]
    samples, own = torch.zeros(2, len(labels), dtype=torch.bool)
    for row, answer in answers.items():
        samples[row], own[row] = True, answer.own
    new = samples[rows]
    weights = torch.full(rows.shape, alpha, dtype=torch.float32).masked_fill_(new, 1.0)
    places = [mask.nonzero().flatten() for mask in (new, ~new, own[rows])]
    lengths = torch.tensor([float(len(answer.tokens)) for answer in answers.values()])
    cut = torch.tensor([float(answer.cut) for answer in answers.values()])
    aligned = torch.zeros(0)
    if "aligned" in batch:
        of_answers = [batch["aligned"][row, len(a.prompt) :][: len(a.tokens)] for row, a in answers.items()]
        aligned = (torch.cat(of_answers) != NONE).float()
    found = (samples, weights, *places, lengths, cut, aligned)
    return RolloutTokens(*(tensor.to(labels.device) for tensor in found))


def up_to_the_end(tokens: Sequence[int], ends: Sequence[int], length: int) -> tuple[list[int], bool]:
    """A response up to its first end token, that included, and whether it was cut off before one.

    >>> up_to_the_end([7, 8, 0, 0, 9], [0], 5), up_to_the_end([7, 8], [0], 2), up_to_the_end([0], [0], 4)
    (([7, 8, 0], False), ([7, 8], True), ([0], False))
    """
    tokens = list(tokens[:length])
    said = len(up_to_end(tokens, ends))
    return tokens[: said + 1], said == len(tokens)
