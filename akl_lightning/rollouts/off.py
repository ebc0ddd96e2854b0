"""What the module asks of rollouts, and the answer where there are none."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from akl_lightning.batch import Batch, Response
from akl_lightning.criterion import CriterionOutput
from akl_lightning.projection import Logits
from akl_lightning.teachers.aligned import weights_of

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule


class OffPolicy:
    """Leaves every batch as the data have it."""

    on = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # an average of weights (SWA, EMA) answers nothing

    def forget(self) -> None:
        """Begin anew, without what a run that was broken off has left."""

    def release(self) -> None:
        """Free what is kept from one sampling to the next."""

    def outline(self, mesh: DeviceMesh | None) -> None:
        """Note what the student looks like before it is sharded."""

    def check_data(self, data: object, stage: str) -> None:
        """Check a data module before anything is done with the data."""

    def start(self) -> None:
        """Check what is known only when a run has its loaders."""

    def answer(self, batch: Batch) -> Batch:
        """The batch with rollouts in place of some responses, where a training step is about to begin."""
        return batch

    def prepare(self, batch: Batch, response: Response) -> dict[str, Any]:
        """More entries of such a batch, found on the host."""
        return {}

    def compare(
        self,
        module: "DistillationModule",
        batch: Batch,
        student: Logits,
        teacher: Logits | None,
        labels: Tensor,
    ) -> CriterionOutput:
        """What the response tokens of a batch cost; see :meth:`DistillationModule.compare`."""
        return module.compare(student, teacher, labels, **weights_of(batch, module.criterion.alpha))

    def statistics(self, batch: Batch, statistics: dict[str, Tensor]) -> dict[str, Any]:
        """What the metrics are fed with, beside the statistics of the tokens."""
        return {}

    def end_batch(self) -> None:
        """Take note that a training batch is done."""

    def look(self, batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        """Look at the student's own responses to a few prompts of a validation batch."""

    def end_validation(self) -> None:
        """Log what was seen."""

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what waits for its turn; called on all ranks."""

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on with that."""
