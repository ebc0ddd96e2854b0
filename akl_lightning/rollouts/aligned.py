"""Rollouts as a teacher with another tokenizer reads them."""

from collections.abc import Mapping

from akl_lightning.batch import Batch
from akl_lightning.data.aligned import Pairing, TeacherSide
from akl_lightning.errors import UsageError
from akl_lightning.rollouts.batches import Answer
from akl_lightning.tokenizers.alignment import NONE


def sides_of(batch: Batch, answers: Mapping[int, Answer], pairing: Pairing) -> dict[int, TeacherSide]:
    """What a teacher with another tokenizer reads in place of some responses: its own prompts, and the answers' texts.

    Where the teacher's positions end before the turn that is answered, or it stands for nothing that the teacher's
    template writes, nothing of the answer is aligned.

    Args:
        batch: with the teacher's tokens of its samples, see :func:`akl_lightning.data.collate.collate`.
        answers: of some rows.
        pairing: has aligned the samples.

    Raises:
        UsageError: the batch does not say which of the teacher's tokens belong to which turn.
    """
    if "teacher_turn" not in batch:
        raise UsageError(
            "the batch has no 'teacher_turn', so that nothing tells what the teacher is asked: take an "
            "InstructionDataModule, or set on_policy.share to 0."
        )
    sides = {}
    for row, answer in answers.items():
        prompt = teacher_prompt(batch, row, answer.turn)
        if prompt is None:
            nothing = batch["teacher_input_ids"][row, :1].tolist()
            sides[row] = TeacherSide(nothing, [], [NONE] * len(answer.tokens), [])
        else:
            sides[row] = pairing.response((answer.prompt, prompt), answer.tokens)
    return sides


def teacher_prompt(batch: Batch, row: int, turn: int) -> list[int] | None:
    """The teacher's tokens of what a turn of a sample answers, or None where it writes no such turn, or nothing at all.

    Args:
        batch: as for :func:`sides_of`.
        row: of the sample.
        turn: the number of the assistant's turn, -1 of a prompt alone.
    """
    real = batch["teacher_attention_mask"][row].bool()
    tokens: list[int] = batch["teacher_input_ids"][row][real].tolist()
    if turn < 0:
        return tokens or None
    places = (batch["teacher_turn"][row][real] == turn).nonzero().flatten().tolist()
    return tokens[: places[0]] if places else None
