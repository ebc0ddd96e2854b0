"""All splits of the data for one walk over them, each sample once."""

from collections.abc import Iterator

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, DistributedSampler

from akl_lightning.batch import Batch, teacher_side

Data = LightningDataModule | DataLoader | list[DataLoader]


class EverySplit(LightningDataModule):
    """Train, validation and test data as one sequence of loaders for the prediction loop.

    Args:
        data: a data module, or loaders.
    """

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.data = data

    def prepare_data(self) -> None:
        """As the data module does."""
        if isinstance(self.data, LightningDataModule):
            self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Set all splits up."""
        if isinstance(self.data, LightningDataModule):
            self.data.trainer = self.trainer
            self.data.setup("fit")
            self.data.setup("test")

    def predict_dataloader(self) -> list[DataLoader]:
        """The loaders of all splits."""
        if not isinstance(self.data, LightningDataModule):
            return CombinedLoader(self.data).flattened
        loaders: list[DataLoader] = []
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            if is_overridden(name, self.data, LightningDataModule):
                loaders += CombinedLoader(getattr(self.data, name)()).flattened
        return loaders

    def batches(self) -> Iterator[tuple[Batch, bool]]:
        """Every batch as the teacher reads it, and whether it is this rank's share of the data."""
        for loader in self.predict_dataloader():
            is_share = isinstance(loader.sampler, DistributedSampler)
            yield from ((teacher_side(batch), is_share) for batch in loader)
