"""The student's answers to some validation prompts."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from akl_lightning.batch import Batch
from akl_lightning.callbacks.loggers import log_figure, log_texts
from akl_lightning.callbacks.samples import SampleCallback, read_until, response_rows
from akl_lightning.callbacks.surprise import draw_surprise, surprises
from akl_lightning.data.collate import NO_TURN
from akl_lightning.data.facts import data_of, facts_of_run
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sampler import FILLER
from akl_lightning.errors import UsageError
from akl_lightning.models.generation import up_to_end
from akl_lightning.module import DistillationModule
from akl_lightning.rollouts.aligned import teacher_prompt
from akl_lightning.rollouts.batches import padded
from akl_lightning.rollouts.draw import Rollouts
from akl_lightning.teachers.aligned import AlignedTeacher
from akl_lightning.tokenizers.alignment import NONE


class Task(NamedTuple):
    """Token ids of a prompt and of the data's answer to it."""

    prompt: Tensor
    reference: Tensor
    of_teacher: list[int]
    """The prompt as a teacher with another tokenizer reads it; nothing where it does not write the turn."""


class SampledAnswers(SampleCallback):
    """Let the student answer some validation prompts after every validation, for the loggers.

    Of a conversation the last turn is the reference, and what stands before it the prompt.
    The prompts are the same every time and the answers greedy, of ``model.max_new_tokens`` tokens at most: what changes
    is the student. They go to the loggers as ``answers``: prompt, reference and answer.

    On-policy, they are rollouts, the same draws every time, of prompts alone, too, which have no reference; and
    ``rollout_surprise`` draws along them, token by token, minus the log of the probability that the teacher gives.

    Args:
        answers: how many.

    Raises:
        UsageError: a student that cannot generate, or not so many tokens; no tokenizer or no logger.
    """

    needs_teacher = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the student can answer, in words, and that somebody hears it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert isinstance(pl_module, DistillationModule)
            if not hasattr(pl_module.student.model, "generate"):
                raise UsageError(
                    f"SampledAnswers needs a student that can generate, {type(pl_module.student.model).__name__} has "
                    "no generate method: remove the callback."
                )
            data = data_of(trainer)
            if isinstance(data, InstructionDataModule) and not pl_module.rollouts.on:  # who ask for room themselves
                positions = pl_module.student.max_positions
                data.check_answers_fit("validation", "model.max_new_tokens", pl_module.max_new_tokens, positions)

    def look_at(self, trainer: Trainer, module: DistillationModule, outputs: Any, batch: Any, wanted: int) -> None:
        """Keep the prompts; on-policy those that have a response first, then prompts alone."""
        rows = response_rows(module, batch)
        for row in rows[:wanted]:
            turn = NO_TURN
            if "turn" in batch:
                turns = batch["turn"][row.number, row.positions + 1]
                turn = int(turns.max())
                last = turns == turn
                row = row._replace(positions=row.positions[last], labels=row.labels[last])
            self.found.append(Task(read_until(batch, row), row.labels, _of_teacher(batch, row.number, turn)))
        if not module.rollouts.on:
            return
        samples, answered = batch["index"].tolist() if "index" in batch else [], {row.number for row in rows}
        alone = [n for n in range(len(batch["labels"])) if n not in answered and FILLER not in samples[n : n + 1]]
        for number in alone[: max(0, wanted - len(rows))]:
            prompt = batch["input_ids"][number][batch["attention_mask"][number].bool()]
            self.found.append(Task(prompt, prompt[:0], _of_teacher(batch, number, NO_TURN)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Generate, on every rank, as each may have a part of the student; what rank 0 has is logged."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        tokenizer = pl_module.find_tokenizer()
        assert tokenizer is not None
        if isinstance(pl_module.rollouts, Rollouts):
            self._log_rollouts(trainer, pl_module, pl_module.rollouts, tokenizer)
            return
        limit = pl_module.student.max_positions
        room = None if limit is None else limit - pl_module.max_new_tokens
        tasks = [task for task in self.found if room is None or len(task.prompt) <= room]
        pad = tokenizer.eos_token_id or 0
        filler = torch.tensor([pad], device=pl_module.device)
        batch = padded([task.prompt for task in tasks] or [filler], pad, "left")
        answers = pl_module.predict_step(batch, 0)
        ends = pl_module.student.stop_tokens(tokenizer, facts_of_run(trainer).end_tokens)
        _log(trainer, tokenizer, ends, tasks, list(answers[: len(tasks)]))

    def _log_rollouts(
        self, trainer: Trainer, module: DistillationModule, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Sample as in training, the same draws every time, and ask the teacher of each token."""
        pad = tokenizer.eos_token_id or 0
        filler = torch.tensor([pad], device=module.device)
        tasks = self.found or [Task(filler, filler, [])]
        batch = padded([task.prompt for task in tasks], pad, "right")
        batch["labels"] = torch.full_like(batch["input_ids"], module.criterion.ignore_index)
        if isinstance(module.teacher, AlignedTeacher):
            of_teacher = [torch.tensor(task.of_teacher or [0], device=module.device) for task in tasks]
            own = {f"teacher_{name}": value for name, value in padded(of_teacher, 0, "right").items()}
            own["teacher_attention_mask"] *= torch.tensor([[bool(t.of_teacher)] for t in tasks], device=module.device)
            own["teacher_labels"] = torch.full_like(own["teacher_input_ids"], module.criterion.ignore_index)
            own["teacher_turn"] = torch.full_like(own["teacher_input_ids"], NO_TURN)
            batch |= {**own, "aligned": torch.full_like(batch["input_ids"], NONE)}
        batch = rollouts.answered_by_student(batch, len(tasks))
        strips = surprises(module, batch)
        if not self.found:
            return
        room, real = rollouts.sampler.room, batch["attention_mask"].bool()
        answered = [row for row, task in enumerate(tasks) if room is None or len(task.prompt) <= room]
        answers = [batch["input_ids"][row][real[row]][len(tasks[row].prompt) :] for row in answered]
        _log(trainer, tokenizer, rollouts.sampler.ends, [tasks[row] for row in answered], answers)
        if strips:
            log_figure(trainer, "rollout_surprise", draw_surprise(strips))


def _of_teacher(batch: Batch, row: int, turn: int) -> list[int]:
    return (teacher_prompt(batch, row, turn) or []) if "teacher_turn" in batch else []


def _log(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, ends: list[int], tasks: list[Task], answers: list[Tensor]
) -> None:
    rows = []
    for task, answer in zip(tasks, answers, strict=True):
        reference, said = (up_to_end(tokens.tolist(), ends) for tokens in (task.reference, answer))
        row = {"prompt": task.prompt.tolist(), "reference": reference, "answer": said}
        texts = tokenizer.batch_decode(list(row.values()), skip_special_tokens=True)
        rows.append({name: text.strip() for name, text in zip(row, texts, strict=True)})
    log_texts(trainer, "answers", rows)
