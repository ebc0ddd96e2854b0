"""Head error and tail error per epoch."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from akl_lightning.callbacks.checks import require_teacher
from akl_lightning.callbacks.figures import HEAD, TAIL, blank_figure, in_own_style, ink
from akl_lightning.callbacks.loggers import log_figure
from akl_lightning.checkpoint import check_writable, claim_file


class HeadTailPlot(Callback):
    """Draw head error and tail error per epoch, for training and validation, as ``head_tail_error.png``.

    The picture is drawn anew after every epoch, and goes to the loggers as ``head_tail_error``, too.

    Args:
        dirpath: folder of the picture; the Trainer's ``default_root_dir`` where it is not given. A picture of another
            run is left alone: this one goes to ``head_tail_error-v1.png`` then, and so on.

    Raises:
        UsageError: no teacher, or a folder that cannot be written to.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.path: Path | None = None
        """The picture, from the first one on."""
        self._folder: Path | None = None

    def look(self, root: Path, goes_on: bool) -> None:
        """Raise :class:`UsageError` unless the folder can be written to; as of ``StudentExport``."""
        check_writable(Path(self.dirpath or root))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a teacher to differ from, and a folder to draw it in."""
        if stage == "fit":
            require_teacher(self, pl_module)
            self._folder = Path(self.dirpath or trainer.default_root_dir)
            check_writable(self._folder)

    # At once, so that a checkpoint written at the end of a validation has it.
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the validation has logged."""
        if not trainer.sanity_checking:
            self._record(trainer, "val", trainer.current_epoch + 1)

    # Lightning logs an epoch's training means after the callbacks' own on_train_epoch_end.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the epoch before has logged."""
        if trainer.current_epoch:
            self._record(trainer, "train", trainer.current_epoch)
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the last epoch has logged."""
        self._record(trainer, "train", trainer.current_epoch)
        self._draw(trainer)

    def _record(self, trainer: Trainer, stage: str, epochs: int) -> None:
        for part in ("head_error", "tail_error"):
            value = trainer.callback_metrics.get(f"{stage}/{part}")
            if value is not None:
                points = dict(self.history.get(f"{stage}/{part}", ()))
                points[epochs] = value.item()  # in place of an earlier validation within the epoch
                self.history[f"{stage}/{part}"] = list(points.items())

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self._folder is None:
            return
        if self.path is None:  # not in setup, so that a run that fails leaves nothing
            self.path = claim_file(self._folder / "head_tail_error.png")
        figure = draw_head_tail(self.history)
        figure.savefig(self.path)
        log_figure(trainer, "head_tail_error", figure)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far and their file, so that a resumed run goes on with them."""
        return {"history": self.history, "name": self.path.name if self.path else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of the run that is resumed."""
        self.history = {name: [tuple(point) for point in points] for name, points in state_dict["history"].items()}
        if state_dict["name"] and self._folder:  # a validation of its own draws nothing
            self.path = self._folder / state_dict["name"]


@in_own_style
def draw_head_tail(history: dict[str, list[tuple[int, float]]]) -> Figure:
    """Head and tail error against epochs.

    Args:
        history: under ``{train,val}/{head_error,tail_error}``, pairs of epochs done and error.
    """
    figure = blank_figure(6.4, 4)
    axes = figure.add_subplot()
    colours = {"head_error": HEAD, "tail_error": TAIL}
    styles = {"train": "--", "val": "-"}
    for name, points in sorted(history.items()):
        stage, part = name.split("/")
        if points:
            label = f"{part.replace('_', ' ')}, {'validation' if stage == 'val' else 'training'}"
            axes.plot(*zip(*points, strict=True), styles[stage], color=colours[part], marker="o", ms=4, label=label)
    axes.set(xlabel="epoch", ylabel="mean |p - q| per response token", title="Where the student still differs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    ink(axes)
    return figure
