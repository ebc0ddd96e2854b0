"""The optimizer of a run, and the schedule of its learning rate."""

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from transformers import get_scheduler

from akl_lightning.data.sampler import accumulated
from akl_lightning.errors import UsageError

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule


def make_optimizer(module: "DistillationModule") -> dict[str, Any]:
    """The optimizer over all trainable parameters, and its schedule, as ``configure_optimizers`` returns them.

    Raises:
        UsageError: the optimizer does not accept one of its arguments; a schedule that spans a run without an end.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        optimizer = module.optimizer(parameters)
    except ValueError as error:
        raise UsageError(f"model.optimizer does not accept an argument: {error}; give another value.") from error
    if module.lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = module.lr
    name = module.lr_scheduler
    if isinstance(name, str):
        steps = None if name.startswith("constant") else _steps_of_run(module.trainer, name)
        scheduler = get_scheduler(name, optimizer, module.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
    schedule = name(optimizer)
    config: dict[str, Any] = {"scheduler": schedule}
    if isinstance(schedule, ReduceLROnPlateau):
        config["monitor"] = schedule.monitor
    return {"optimizer": optimizer, "lr_scheduler": config}


def _steps_of_run(trainer: Trainer, schedule: str) -> int:
    steps = trainer.estimated_stepping_batches  # which loads the data, and knows no GradientAccumulationScheduler
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
    if epochs > 0 and math.isfinite(batches):
        counted = sum(math.ceil(batches / accumulated(trainer, epoch)) for epoch in range(epochs))
        steps = counted if trainer.max_steps == -1 else min(counted, trainer.max_steps)
    if not 0 <= steps < math.inf:
        raise UsageError(
            f"the schedule {schedule!r} spans the whole run, which has no end that is known: set trainer.max_steps, or "
            "take lr_scheduler constant."
        )
    return int(steps)
