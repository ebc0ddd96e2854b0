"""The settings of a run in its folder, those of a run before left alone."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from akl_lightning.checkpoint import free_path


class RunConfig(SaveConfigCallback):
    """Write the settings to ``config.yaml`` in the run's ``log_dir``; where there is one, to ``config-v1.yaml`` beside.

    Without a logger all runs have one ``log_dir``. With ``save_to_log_dir=False`` it is the Trainer's
    ``default_root_dir`` instead.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the name and write them, once."""
        if not self.already_saved and not self.overwrite:
            # The log_dir is broadcast: every rank has to ask for it.
            folder = trainer.log_dir if self.save_to_log_dir else trainer.default_root_dir
            path = free_path(Path(folder or ".", self.config_filename))
            self.config_filename = trainer.strategy.broadcast(path.name)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what does not go to the ``log_dir``; called once, on rank 0."""
        if not self.save_to_log_dir:
            path = Path(trainer.default_root_dir, self.config_filename)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, multifile=False)
