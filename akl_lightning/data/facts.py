"""What is known of the data that a Trainer runs on, whoever gives them; asked for here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True)
class DataFacts:
    """The attributes of a data module that this package looks at; each None where the module has no such attribute.

    A data module of the user's own may have any of them. Of plain DataLoaders nothing is known.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    """Whose tokens the batches hold."""

    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    """The teacher's, where it is given apart."""

    teacher_template: str | None = None
    """How samples are written for a teacher with another tokenizer."""

    teacher_template_arguments: Any = None
    """Variables of that template."""

    pairing: Any = None
    """How samples are aligned for a teacher with another tokenizer, :class:`akl_lightning.data.aligned.Pairing`."""

    end_tokens: Sequence[int] | None = None
    """Tokens with which a turn of the assistant ends, by the template."""

    max_length: int | None = None
    """Tokens of the longest sequence."""

    batch_size: int | None = None
    """Samples of a micro-batch, per device."""

    group_by_length: bool | None = None
    """Whether samples of a step are of similar length."""

    template: str | None = None
    """How instructions become prompts."""

    template_arguments: Any = None
    """Variables of the template."""

    chat_template: str | dict[str, str] | None = None
    """What the tokenizer is to have for its chat template, where its own does not write what was learnt; as Jinja."""

    template_digest: str | None = None
    """What tells it from others."""

    source: Any = None
    """Where the samples come from, with a ``description``."""


def facts_of(data: object) -> DataFacts:
    """What a data module, or whatever else gives batches, says of itself.

    >>> facts_of(None).max_length is None
    True
    """
    return DataFacts(**{field.name: getattr(data, field.name, None) for field in fields(DataFacts)})


def data_of(trainer: "Trainer | None") -> Any:
    """The data module of a run, or None."""
    return getattr(trainer, "datamodule", None)


def facts_of_run(trainer: "Trainer | None") -> DataFacts:
    """What is known of the data of a run."""
    return facts_of(data_of(trainer))


def positions_of(module: object) -> int | None:
    """Tokens of the longest sample that all models of a module take, or None where none of them has a bound.

    A teacher's cache takes as many as its longest sample may have had.
    """
    models = [getattr(module, name, None) for name in ("student", "teacher")]
    found = [getattr(model, "max_positions", None) for model in models]
    return min((positions for positions in found if positions), default=None)
