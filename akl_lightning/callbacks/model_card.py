"""What a reader of an exported student has to know, as the hub's model card."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch import Trainer

from akl_lightning.callbacks.summary import compression_ratio, in_order
from akl_lightning.compat import is_stand_in
from akl_lightning.data.facts import data_of, facts_of_run
from akl_lightning.data.records import Source
from akl_lightning.divergences import Divergence
from akl_lightning.module import DistillationModule


def model_card(
    trainer: Trainer,
    module: DistillationModule,
    which: str,
    metrics: Mapping[str, float] | None,
    to_be_given: Sequence[str] = (),
) -> str:
    """The text of ``README.md``, with the hub's metadata on top.

    Args:
        trainer: of the run.
        module: student, teacher and criterion.
        which: the checkpoint that was exported.
        metrics: of validation at that checkpoint, by name, or None where there was none.
        to_be_given: names of the template's arguments that the tokenizer does not have.
    """
    criterion, teacher = module.criterion, module.teacher
    data, facts_of_data = data_of(trainer), facts_of_run(trainer)
    source = facts_of_data.source
    parameters = sum(parameter.numel() for parameter in module.student.parameters())
    ratio = compression_ratio(module)
    known = None if teacher is None else teacher.num_parameters
    facts = {
        "Teacher": "none"
        if teacher is None
        else teacher.description + ("" if known is None else f", {known:,} parameters"),
        "Student": f"{module.student.description}, {parameters:,} parameters"
        + ("" if ratio is None else f", compression ratio {ratio:.2f}"),
        "Divergence": f"{_spelled(criterion.divergence)}, alpha={criterion.alpha} (the rest is cross entropy), "
        f"temperature={criterion.temperature}",
        "Data": source.description if isinstance(source, Source) else type(data or trainer.train_dataloader).__name__,
        "Checkpoint": which,
    }
    if facts_of_data.template is not None:
        arguments = [f"{name}={value!r}" for name, value in (facts_of_data.template_arguments or {}).items()]
        given = f" with {', '.join(arguments)}" if arguments else ""
        advice = f"; give {' and '.join(to_be_given)} to apply_chat_template" if to_be_given else ""
        facts["Prompt template"] = f"{facts_of_data.template!r}{given}{advice}"
    figures = in_order({name.removeprefix("val/"): value for name, value in (metrics or {}).items()})
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["distillation", "akl-lightning"]
    )
    template = str(Path(__file__).with_suffix(".md"))
    return f"{ModelCard.from_template(metadata, template, facts=facts, figures=figures)}\n"


def _spelled(divergence: Divergence) -> str:
    """A divergence as it is written in code, with the arguments that it keeps."""
    # The default of a criterion is an instance of a subclass that jsonargparse makes.
    classes = [cls for cls in type(divergence).__mro__ if issubclass(cls, Divergence)]
    cls = next(cls for cls in classes if not is_stand_in(cls))
    names = [name for name in inspect.signature(cls).parameters if hasattr(divergence, name)]
    return f"{cls.__name__}({', '.join(f'{name}={getattr(divergence, name)!r}' for name in names)})"
