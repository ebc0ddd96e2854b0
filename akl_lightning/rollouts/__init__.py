"""On-policy: the student answers, and the batch that comes back looks like any other."""

from akl_lightning.evaluation.decoding import Sampling
from akl_lightning.rollouts.continuous import ContinuousBatching
from akl_lightning.rollouts.draw import choose_rollouts
from akl_lightning.rollouts.engines import Engine, GenerateEngine, Weights
from akl_lightning.rollouts.settings import OnPolicy

__all__ = ["ContinuousBatching", "Engine", "GenerateEngine", "OnPolicy", "Sampling", "Weights", "choose_rollouts"]
