"""What one sets for rollouts."""

from dataclasses import dataclass
from typing import Literal

from akl_lightning.divergences import Divergence
from akl_lightning.errors import UsageError, check_count
from akl_lightning.evaluation.decoding import Sampling
from akl_lightning.functional import check_fraction
from akl_lightning.rollouts.engines import Engine

CACHED_TEACHER = (
    "a cached teacher cannot score rollouts, which it has not seen: give model.teacher the model itself, or set "
    "on_policy.share to 0."
)
"""Said before any work, whoever is asked first."""


@dataclass(frozen=True)
class OnPolicy:
    """Fresh responses in place of the data's, for some samples of every optimizer step.

    A rollout has no cross entropy, as its labels are the student's own tokens: it counts with ``alpha = 1``. The first
    end token is learnt and nothing behind it; a rollout that was cut off learns no end. Of a teacher with another
    tokenizer, the tokens that are aligned with the teacher's are learnt alone.

    Args:
        share: of the samples of every optimizer step, in [0, 1]; which ones depends on seed, step and sample, not on
            how a step is split. A sample that has no response, a prompt alone, always gets one. 0 turns it off.
        decoding: how responses are sampled.
        refresh_every: rollouts for so many optimizer steps are sampled at once, from the weights at their start: larger
            batches, slightly off-policy. More than 1 needs the package's own data module.
        divergence: of rollouts; None for the criterion's own.
        responses_from: who answers: the student, the teacher (sequence-level distillation without a file), or mix, for
            each rollout one of the two. A teacher with another tokenizer does not answer.
        turns: which assistant turn of a conversation is answered anew, what follows it is left out.
        engine: samples; None for :class:`~akl_lightning.rollouts.ContinuousBatching` on CUDA and
            :class:`~akl_lightning.rollouts.GenerateEngine` elsewhere.
        validation_samples: of the first validation set, spread over it, are answered in each validation, which logs
            ``val/rollout_rkl``; 0 for none.
        seed: of the choice and of the draws.

    Raises:
        UsageError: a value out of its range.
    """

    share: float = 0.5
    decoding: Sampling = Sampling()  # noqa: RUF009 (it is frozen)
    refresh_every: int = 1
    divergence: Divergence | None = None
    responses_from: Literal["student", "teacher", "mix"] = "student"
    turns: Literal["last", "random"] = "last"
    engine: Engine | None = None
    validation_samples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("on_policy.share", self.share)
        check_count("on_policy.refresh_every", self.refresh_every)
        check_count("on_policy.validation_samples", self.validation_samples, least=0)
        for name, value, known in (
            ("responses_from", self.responses_from, ("student", "teacher", "mix")),
            ("turns", self.turns, ("last", "random")),
        ):
            if value not in known:
                raise UsageError(f"on_policy.{name} must be one of {', '.join(known)}, got {value!r}.")
