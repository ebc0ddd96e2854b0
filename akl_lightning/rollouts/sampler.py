"""Answers to prompts, by the student or the teacher, on all ranks together."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch

from akl_lightning.data.facts import facts_of_run, positions_of
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.decoding import seed_of
from akl_lightning.models.generation import ending
from akl_lightning.models.layers import evaluating
from akl_lightning.models.split import SplitModel
from akl_lightning.parallel import gather_objects
from akl_lightning.rollouts.batches import Answer, up_to_the_end
from akl_lightning.rollouts.continuous import ContinuousBatching
from akl_lightning.rollouts.engines import Engine, GenerateEngine, Weights
from akl_lightning.rollouts.settings import OnPolicy
from akl_lightning.rollouts.watch import Watch
from akl_lightning.rollouts.weights import WholeModel
from akl_lightning.teachers.live import LiveTeacher

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule


class EngineError(UsageError):
    """An engine has failed on some rank; all ranks raise it together."""


class Task(NamedTuple):
    """A prompt to be answered, and what the answer depends on beside the weights."""

    step: int | str
    sample: str
    """Tells the sample from others, wherever it lies."""

    prompt: list[int]
    turn: int = -1

    def number(self, seed: int, what: str) -> float:
        """In [0, 1), from seed, step and sample."""
        return seed_of(seed, what, self.step, self.sample) / 2**56


class Sampler:
    """Gives prompts to an engine, with the weights of now.

    Args:
        module: has student and teacher.
        settings: how to sample.
    """

    def __init__(self, module: "DistillationModule", settings: OnPolicy) -> None:
        self.module = module
        self.settings = settings
        self.whole = WholeModel(module.student)
        self._engine: Engine | None = settings.engine

    @property
    def engine(self) -> Engine:
        """Who samples."""
        if self._engine is None:
            on_cuda = self.module.device.type == "cuda" and self.module.student.causal_lm is not None
            self._engine = ContinuousBatching() if on_cuda else GenerateEngine()
        return self._engine

    def release(self) -> None:
        """Free what is kept from one sampling to the next."""
        if self._engine is not None:
            self._engine.release()
        self.whole.forget()

    @property
    def ends(self) -> list[int]:
        """Tokens that end a response."""
        return self.module.student.stop_tokens(
            self.module.find_tokenizer(), facts_of_run(self.module.trainer).end_tokens
        )

    @property
    def pad(self) -> int:
        """The padding token."""
        return int(ending(self.ends, self.module.find_tokenizer())["pad_token_id"])

    @property
    def room(self) -> int | None:
        """Tokens of the longest prompt that leaves room for an answer; None where there is no bound."""
        positions = positions_of(self.module)
        return None if positions is None else positions - self.settings.decoding.max_new_tokens

    def sample(self, tasks: Sequence[Task], responses_from: str, watch: Watch | None = None) -> list[Answer]:
        """Answer prompts; called on every rank, as each may have a part of the student, and with none, too.

        Args:
            tasks: of this rank.
            responses_from: ``student``, ``teacher`` or ``mix``.
            watch: is shown the answers of all ranks.

        Raises:
            EngineError: the engine has failed on some rank.
        """
        trainer, seed = self.module.trainer, self.settings.seed
        of_student = {"student": 1.0, "teacher": 0.0, "mix": 0.5}[responses_from]
        sides: dict[bool, list[int]] = {True: [], False: []}
        for place, task in enumerate(tasks):
            sides[task.number(seed, "source") < of_student].append(place)
        answers: dict[int, Answer] = {}
        mine: Exception | None = None
        with torch.no_grad(), evaluating(self.module.student.model):
            precision = str(trainer.precision_plugin.precision)
            dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
            try:
                student = self.whole.now(dtype) if of_student else None  # first, as all ranks meet in it
                self._check_room(tasks)
                for own, places in sides.items():
                    if places:
                        model = student if own else self._teacher()
                        assert model is not None
                        found = self._answers([tasks[place] for place in places], model, own)
                        answers |= zip(places, found, strict=True)
            except Exception as error:
                mine = error
        seen = None if watch is None else watch.seen(list(answers.values()))
        parts = gather_objects(trainer, (mine and _in_one_line(mine), seen))
        if reasons := [reason for reason, _ in parts if reason is not None]:
            raise EngineError(
                f"no rollouts at optimizer step {trainer.global_step}, {type(self.engine).__name__} says: {reasons[0]};"
                " mend that and go on from the last checkpoint, or give another on_policy.engine."
            ) from mine
        if watch is not None:
            watch.look([seen for _, seen in parts if seen is not None])
        return [answers[place] for place in range(len(tasks))]

    def _teacher(self) -> SplitModel:
        teacher = self.module.teacher
        assert isinstance(teacher, LiveTeacher)
        return teacher.read().eval()

    def _answers(self, tasks: Sequence[Task], model: SplitModel, own: bool) -> list[Answer]:
        decoding, ends = self.settings.decoding, self.ends
        self.engine.refresh(Weights(model, tuple(ends), self.pad))
        seeds = [seed_of(self.settings.seed, "draw", task.step, task.sample) for task in tasks]
        found = self.engine.generate([task.prompt for task in tasks], decoding, seeds)
        if len(found) != len(tasks) or not all(len(tokens) for tokens in found):
            raise RuntimeError(f"{len(found)} answers to {len(tasks)} prompts, or an empty one, which has no end token")
        answers = []
        for task, given in zip(tasks, found, strict=True):
            tokens, cut = up_to_the_end(given, ends, decoding.max_new_tokens)
            answers.append(Answer(task.prompt, tokens, cut, own, task.turn))
        return answers

    def _check_room(self, tasks: Sequence[Task]) -> None:
        longest = max((len(task.prompt) for task in tasks), default=0)
        if self.room is not None and longest > self.room:
            raise UsageError(
                f"a prompt of {longest} tokens and an answer of on_policy.decoding.max_new_tokens = "
                f"{self.settings.decoding.max_new_tokens} are beyond the positions of the models: lower it, or give "
                "shorter prompts"
            )


def _in_one_line(error: Exception) -> str:
    reason = type(error).__name__
    with suppress(Exception):
        reason = " ".join(str(error).split()).rstrip(".") or reason
    return reason
