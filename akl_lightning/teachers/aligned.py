"""A teacher with another tokenizer: it reads the same text, and is compared with the student over classes of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from akl_lightning.batch import Batch, teacher_side
from akl_lightning.criterion import CriterionOutput, DistillationCriterion
from akl_lightning.data.aligned import Pairing
from akl_lightning.data.facts import DataFacts, data_of, facts_of, facts_of_run
from akl_lightning.errors import UsageError
from akl_lightning.kernels.classes import Classes
from akl_lightning.metrics import OF_STUDENT
from akl_lightning.models.inputs import lay_out
from akl_lightning.models.packing import pack
from akl_lightning.models.vocabulary import check_same_vocabulary, tokenizer_of
from akl_lightning.projection import Merged, Projection, rows_of
from akl_lightning.teachers.base import Teacher
from akl_lightning.tokenizers.classes import Vocabulary, find_partition

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule

Alignment = Literal["classes", "refuse"]
"""What is done about a teacher with another tokenizer."""


@dataclass(eq=False)
class AlignedTeacher(Teacher):
    """Another teacher, which is given its own tokens of each sample.

    Its distribution where it stands at the same byte as the student is compared with the student's over classes of
    tokens that both vocabularies have. Where it does not stand there, there is nothing to compare with.

    Args:
        teacher: a live one or a cache.
        classes: of the outputs of student and teacher.
        own_tokenizer: the teacher's.
        pairing: which aligned the samples.
        packing: lay its samples into fewer rows.
    """

    teacher: Teacher
    classes: Classes
    own_tokenizer: PreTrainedTokenizerBase
    pairing: Pairing
    packing: bool = False

    def __post_init__(self) -> None:
        self.fingerprint = self.teacher.fingerprint

    @property
    def vocab_size(self) -> None:
        """None: its outputs are not the student's."""

    @property
    def description(self) -> str:
        return f"{self.teacher.description}, with a tokenizer of its own"

    @property
    def num_parameters(self) -> int | None:
        return self.teacher.num_parameters

    def prepare(self, batch: Batch, positions: Tensor) -> dict[str, Any]:
        """The teacher's side of a batch, and where it is aligned with the student's.

        Returns:
            ``of_teacher``: its own batch, with the positions of its ``response``; ``places`` ``[tokens]``: for each
            response token of the student the teacher's, counted among its own, 0 where there is none; ``is_aligned``
            ``[tokens]``: whether there is one.

        Raises:
            UsageError: the batch has no such side.
        """
        if "teacher_input_ids" not in batch:
            raise UsageError(
                "student and teacher have different tokenizers, and the batch holds the tokens of one: take an "
                "InstructionDataModule, whose batches hold both, or models that share one tokenizer."
            )
        own = teacher_side(batch)
        response = DistillationCriterion().response_positions(own["labels"])[0]
        length, width = batch["input_ids"].shape[1], own["input_ids"].shape[1]
        # What a position predicts is the token behind it, here and there.
        tokens = batch["aligned"].flatten()[positions + 1]
        before = positions // length * width + tokens - 1
        aligned = tokens > 0  # nothing predicts the teacher's first token
        places = torch.searchsorted(response, before).where(aligned, 0)
        of_teacher = {**own, "response": response, "layout": lay_out(own)}
        if self.packing:
            of_teacher["packed"] = pack(own)
        of_teacher |= self.teacher.prepare(own, response)
        return {"of_teacher": of_teacher, "places": places, "is_aligned": aligned}

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: Tensor) -> Merged:
        """Logits over the teacher's own vocabulary, with the classes over which they are compared."""
        own: Mapping[str, Any] = batch["of_teacher"]
        self.classes = self.classes.to(positions.device)  # where nothing has moved it with the module
        logits = rows_of(self.teacher(own, own["response"]), batch["places"])
        assert isinstance(logits, Tensor | Projection)
        return Merged(logits, self.classes)

    def tokens_of(self, classes: Tensor) -> list[int]:
        """For each of some classes, by number, the student's token that says least of those in it, to be looked at."""
        of_output = self.classes.numbers[self.classes.student.of_output].cpu()
        lengths = self.pairing.student.lengths(torch.arange(len(of_output)))
        found = [(of_output == number).nonzero().flatten() for number in classes.cpu()]
        return [int(own[lengths[own].argmin()]) if len(own) else 0 for own in found]

    def classes_of(self, tokens: Tensor) -> Tensor:
        """The number of the class that each of some of the student's tokens is in."""
        classes = self.classes.to(tokens.device)
        return classes.numbers[classes.student.of_output[tokens]]

    def release(self) -> None:
        self.teacher.release()

    def load(self, mesh: DeviceMesh | None) -> None:
        self.teacher.load(mesh)

    def to(self, device: torch.device) -> Self:
        self.teacher.to(device)
        if device.type != "meta":
            self.classes = self.classes.to(device)
        return self

    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        self.teacher.check_fits(name, self.own_tokenizer, None)

    def check_run(self, stage: str, trainer: Trainer, criterion: DistillationCriterion) -> None:
        self.teacher.check_run(stage, trainer, criterion)


# --------------------------------------------------------------------------------------------------------------------
# What the module asks


def inner_of(teacher: Teacher | None) -> Teacher | None:
    """The teacher that an :class:`AlignedTeacher` gives its tokens to; any other one itself."""
    return teacher.teacher if isinstance(teacher, AlignedTeacher) else teacher


def tokenizers_of(
    module: "DistillationModule", facts: DataFacts
) -> tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]:
    """Those of a module's teacher and of the data that it runs on, each None where it is not known."""
    inner, own = inner_of(module.teacher), facts.teacher_tokenizer or module.model_tokenizers["teacher"]
    if own is None and inner is not None:
        own = inner.tokenizer
    return own, facts.tokenizer or module.model_tokenizers["student"]


def with_own_tokenizer(module: "DistillationModule", stage: str) -> Teacher | None:
    """The module's teacher, made an :class:`AlignedTeacher` where its tokenizer is not that of the data.

    Args:
        module: attached to its Trainer.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        UsageError: they are not to be aligned, or cannot be.
    """
    teacher, inner = module.teacher, inner_of(module.teacher)
    facts = facts_of_run(module.trainer)
    own, here = tokenizers_of(module, facts)
    if inner is None or own is None or here is None or own.get_vocab() == here.get_vocab():
        if facts.pairing is not None:  # for a teacher before
            data_of(module.trainer).pairing = None
        for name in ("teacher_template", "teacher_template_arguments"):
            if inner is not None and getattr(facts, name):
                raise UsageError(
                    f"data.{name} is for a teacher with another tokenizer, and this teacher's is the data's or not "
                    "known: leave it out, or give data.teacher_tokenizer."
                )
        return inner
    if getattr(inner, "top_k", None) is not None:
        raise UsageError(
            f"{inner.description} has the likeliest tokens of another tokenizer alone, which cannot be merged into "
            "classes: cache hidden states."
        )
    if module.alignment == "refuse":
        check_same_vocabulary(own, here, ("teacher", "data"))
    if stage == "predict":  # the student alone answers
        return teacher
    data = data_of(module.trainer)
    if not hasattr(data, "align"):
        kind = "plain DataLoaders give" if data is None else f"{type(data).__name__} gives"
        raise UsageError(
            f"student and teacher have different tokenizers, and {kind} no text to align them by: take an "
            "InstructionDataModule, or models that share one tokenizer."
        )
    pairing = data.align(own, inner.longest)
    if isinstance(teacher, AlignedTeacher) and teacher.pairing is pairing:
        return teacher
    chat, of_teacher = pairing.chats
    outputs = module.student.vocab_size or len(pairing.student), inner.vocab_size or len(pairing.teacher)
    classes = find_partition(
        Vocabulary(pairing.student, chat.end_tokens, outputs[0]),
        Vocabulary(pairing.teacher, of_teacher.end_tokens, outputs[1]),
    )
    shared = len(set(pairing.student.bytes) & set(pairing.teacher.bytes) - {None})
    rank_zero_info(
        f"Teacher and student have different tokenizers: {shared:,} tokens are in both, {classes.classes:,} classes "
        f"over {outputs[1]:,} and {outputs[0]:,} outputs are compared where both stand at the same byte; "
        "elsewhere the student has cross entropy alone"
    )
    return AlignedTeacher(inner, Classes(*classes), own, pairing, module.student.packing)


def read_by_teacher(
    teacher: Teacher, name: str, data: Any, top_k: int | None = None
) -> tuple[PreTrainedTokenizerBase | None, dict[str, str] | None, int | None]:
    """What a teacher that is to be cached reads of the data, which are aligned for it where it has another tokenizer.

    Args:
        teacher: the teacher.
        name: where its tokenizer may lie.
        data: a data module, set up, or loaders.
        top_k: how many of the likeliest tokens are to be cached, or None for hidden states.

    Returns:
        Its tokenizer; name and digest of its template; tokens of its longest sample. Each None where it is not known.

    Raises:
        UsageError: it has another tokenizer, of which the likeliest tokens alone are to be cached.
    """
    facts = facts_of(data)
    own, here = facts.teacher_tokenizer or tokenizer_of(name), facts.tokenizer
    if own is not None and here is not None and own.get_vocab() != here.get_vocab() and hasattr(data, "align"):
        if top_k is not None:
            raise UsageError(
                f"top_k keeps no more than the likeliest tokens of {teacher.description}, which has another tokenizer "
                "than the data's, and these cannot be merged into classes: cache hidden states, or give the data the "
                "teacher's tokenizer."
            )
        chat = data.align(own, teacher.longest).chats[1]
        return own, {"name": chat.template, "digest": chat.digest}, None
    template = None
    if facts.template_digest is not None:
        template = {"name": str(facts.template), "digest": facts.template_digest}
    return facts.tokenizer, template, facts.max_length


def weights_of(batch: Batch, alpha: float | Tensor) -> dict[str, Tensor]:
    """The weight of the divergence at each response token, where it is not the same at all: 0 where none is aligned."""
    if "is_aligned" not in batch:  # a subclass may know nothing of weights
        return {}
    return {"alpha": torch.where(batch["is_aligned"], alpha, 0.0)}


def told_apart(output: CriterionOutput, batch: Batch) -> CriterionOutput:
    """What a batch costs, with the ``bytes`` of each token and whether it is ``aligned`` among its statistics.

    Where the teacher does not stand at the same byte, what compares with it is NaN.
    """
    aligned = batch.get("is_aligned")
    statistics = output.statistics | ({"bytes": batch["bytes"]} if "bytes" in batch else {})
    if aligned is not None:
        for name in statistics.keys() - {"bytes", *OF_STUDENT}:
            statistics[name] = statistics[name].masked_fill(~aligned, torch.nan)
        statistics["aligned"] = aligned.to(statistics["loss"].dtype)
    return output._replace(statistics=statistics)
