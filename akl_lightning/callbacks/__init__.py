"""What to watch during distillation, and what to keep of it."""

from akl_lightning.callbacks.answers import SampledAnswers
from akl_lightning.callbacks.distributions import DistributionPlot, draw_distributions
from akl_lightning.callbacks.export import StudentExport
from akl_lightning.callbacks.head_tail import HeadTailPlot, draw_head_tail
from akl_lightning.callbacks.last_checkpoint import LastCheckpoint
from akl_lightning.callbacks.progress import DistillationProgressBar
from akl_lightning.callbacks.summary import DistillationSummary
from akl_lightning.callbacks.weight_map import HeadWeightMap, draw_weight_map
from akl_lightning.callbacks.weights import AdaptiveWeightMonitor

__all__ = [
    "AdaptiveWeightMonitor",
    "DistillationProgressBar",
    "DistillationSummary",
    "DistributionPlot",
    "HeadTailPlot",
    "HeadWeightMap",
    "LastCheckpoint",
    "SampledAnswers",
    "StudentExport",
    "draw_distributions",
    "draw_head_tail",
    "draw_weight_map",
]
