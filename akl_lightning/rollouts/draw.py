"""Which samples get a rollout, what of them waits for its turn, and what a batch with rollouts costs."""

import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

from akl_lightning.batch import KEYS, OF_TEACHER, Batch, Response
from akl_lightning.compat import trainer_of
from akl_lightning.criterion import CriterionOutput, DistillationCriterion
from akl_lightning.data.facts import data_of, facts_of
from akl_lightning.data.sampler import FILLER, StepSampler, accumulated
from akl_lightning.data.spread import spread_over_validation
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.decoding import seed_of
from akl_lightning.metrics import TokenMean
from akl_lightning.parallel import gather_objects
from akl_lightning.projection import Logits, rows_of
from akl_lightning.rollouts.aligned import sides_of
from akl_lightning.rollouts.batches import Answer, RolloutTokens, Sample, answered, rollout_tokens, samples_of
from akl_lightning.rollouts.off import OffPolicy
from akl_lightning.rollouts.sampler import Sampler, Task
from akl_lightning.rollouts.settings import CACHED_TEACHER, OnPolicy
from akl_lightning.rollouts.watch import Watch, add_rollout_metrics, statistics_of
from akl_lightning.teachers.aligned import AlignedTeacher, inner_of, tokenizers_of, weights_of
from akl_lightning.teachers.cache.reader import CachedTeacher
from akl_lightning.tokenizers.alignment import NONE

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule

VALIDATION = "validation"
"""Stands for the step in what the draws of a validation depend on, so that they are the same in each."""


class Ahead(NamedTuple):
    """Answers that were sampled for optimizer steps to come."""

    epoch: int
    until: int
    """The first optimizer step that they are not for."""

    answers: dict[tuple[int, str], Answer]
    """By step and sample."""


class Clock(NamedTuple):
    """What sampling for a batch has taken."""

    begun: float
    sampling: float
    tokens: int


def choose_rollouts(module: "DistillationModule", settings: OnPolicy | None) -> OffPolicy:
    """What answers for a module: nobody where it is not asked for, or for a share of 0."""
    return OffPolicy() if settings is None or settings.share == 0 else Rollouts(module, settings)


class Rollouts(OffPolicy):
    """Answers some samples of each batch anew.

    Args:
        module: whose batches they are; it gets the metrics of rollouts.
        settings: with a ``share`` above 0.
    """

    on = True

    def __init__(self, module: "DistillationModule", settings: OnPolicy) -> None:
        self.module = module
        self.settings = settings
        self.sampler = Sampler(module, settings)
        self.watch = Watch()
        if settings.divergence is not None:  # a submodule, as it may have buffers
            criterion = module.criterion
            same = criterion.temperature, criterion.ignore_index, criterion.chunk_size
            module.rollout_criterion = DistillationCriterion(settings.divergence, 1.0, *same)
        self._rkl = module.rollout_rkl = TokenMean("rollout_rkl")  # a submodule, so that it is where the device is
        add_rollout_metrics(module.train_metrics)
        self.forget()

    def forget(self) -> None:
        self._ahead = Ahead(-1, 0, {})
        self._clock: Clock | None = None
        self._order: tuple[int, list[int]] | None = None
        """An epoch, and the order of this rank's samples in it."""
        self.broken_off = False
        """Whether sampling for a batch has failed: the loader has given it, and nothing was done with it."""
        self._place: Any = None
        """Where the training loader was behind the last whole optimizer step."""
        self.watch.forget()
        self.release()

    def release(self) -> None:
        self.sampler.release()

    # ----------------------------------------------------------------------------------------------------------------
    # Training

    def outline(self, mesh: DeviceMesh | None) -> None:
        if mesh is not None:
            self.sampler.whole.outline()

    def answer(self, batch: Batch) -> Batch:
        """The batch with rollouts in place of some responses, where a training step is about to begin.

        Raises:
            EngineError: the engine has failed.
            UsageError: what the batch holds cannot be answered.
        """
        if (trainer := trainer_of(self.module)) is None or not trainer.training:
            return batch
        arrived = time.perf_counter()
        begun, step, epoch, sampled = self._now(), trainer.global_step, self.module.current_epoch, 0
        tasks = self._chosen(samples_of(batch, self.module.criterion.ignore_index), step)
        if step >= self._ahead.until or epoch != self._ahead.epoch:
            loader = self._own_loader()
            coming, until = (list(tasks.values()), step) if loader is None else self._coming(loader, step)
            answers = self._sample(coming)
            sampled = sum(len(answer.tokens) for answer in answers)
            by_task = {(int(task.step), task.sample): answer for task, answer in zip(coming, answers, strict=True)}
            self._ahead = Ahead(epoch, until, by_task)
        found = {row: self._ahead.answers.pop((step, task.sample)) for row, task in tasks.items()}
        self._clock = Clock(arrived, self._now() - begun, sampled)
        return self._answered(batch, found, watch=True)

    def _answered(self, batch: Batch, found: dict[int, Answer], watch: bool = False) -> dict[str, Any]:
        """The batch with answers, which a teacher with another tokenizer is given in its own tokens."""
        ignore_index, teacher, sides = self.module.criterion.ignore_index, self.module.teacher, {}
        if isinstance(teacher, AlignedTeacher) and "teacher_input_ids" in batch:
            sides, longest = sides_of(batch, found, teacher.pairing), teacher.pairing.longest
            if watch and sides:
                counts = [(len(side.aligned) - side.aligned.count(NONE), len(side.aligned)) for side in sides.values()]
                full = [len(side.input_ids) == longest or not side.spans for side in sides.values()]
                beyond = 0 if longest is None else sum(full)  # else its template does not write such a turn
                self.watch.add_aligned(counts, beyond, longest)
        return answered(batch, found, self.sampler.pad, ignore_index, sides)

    def prepare(self, batch: Batch, response: Response) -> dict[str, Any]:
        if "rollouts" not in batch:
            return {}
        return {"rollouts": rollout_tokens(batch, response, self.module.criterion.alpha)}

    def _sample(self, tasks: list[Task]) -> list[Answer]:
        self.broken_off = True
        answers = self.sampler.sample(tasks, self.settings.responses_from, self.watch)
        self.broken_off = False
        return answers

    def _chosen(self, samples: Iterable[Sample], step: int | str, share: float | None = None) -> dict[int, Task]:
        """What is to be answered, by row."""
        share, seed = self.settings.share if share is None else share, self.settings.seed
        seen: Counter[str] = Counter()
        tasks = {}
        for row, sample in enumerate(samples):
            if sample.number == FILLER or not sample.tokens:
                continue
            name = str(sample.number)
            if sample.number is None:  # where nobody numbers them, by what they are
                name = f"{seed_of(*sample.tokens, 'from', *sample.starts):x}"
            seen[name] += 1
            if seen[name] > 1:  # who repeats a prompt within a batch wants several answers
                name += f"/{seen[name]}"
            turn = len(sample.starts) - 1
            if self.settings.turns == "random" and turn > 0:
                turn = int(Task(step, name, []).number(seed, "turn") * len(sample.starts))
            start = sample.starts[turn] if sample.starts else len(sample.tokens)
            task = Task(step, name, sample.tokens[:start], sample.turns[turn] if sample.starts else -1)
            if start and (not sample.starts or task.number(seed, "choice") < share):
                tasks[row] = task
        return tasks

    def _own_loader(self) -> DataLoader | None:
        """The training loader, where it says which samples come."""
        loader: Any = self.module.trainer.train_dataloader
        return loader if isinstance(getattr(loader, "sampler", None), StepSampler) else None

    def _coming(self, loader: DataLoader, step: int) -> tuple[list[Task], int]:
        """Prompts of this rank's samples in the optimizer steps that are sampled for now, and the step behind them."""
        trainer, sampler = self.module.trainer, loader.sampler
        assert isinstance(sampler, StepSampler)
        size = sampler.batch_size
        if self._order is None or self._order[0] != sampler.epoch:  # to list it takes long where there are many
            self._order = sampler.epoch, list(sampler)
        order = self._order[1]
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        here = progress.processed  # batches, of this epoch
        per_step = accumulated(trainer, self.module.current_epoch)
        end = min(int(trainer.num_training_batches), here + per_step * self.settings.refresh_every)
        tasks: list[Task] = []
        for place in range(here, end):
            rows = [loader.dataset[index] for index in order[place * size : (place + 1) * size]]
            samples = samples_of(loader.collate_fn(rows), self.module.criterion.ignore_index)
            tasks += self._chosen(samples, step + (place - here) // per_step).values()
        return tasks, step - (here - end) // per_step

    def check_data(self, data: object, stage: str) -> None:
        """Check a data module before anything is done with the data.

        Raises:
            UsageError: the teacher is a cache, or is to answer and has another tokenizer.
        """
        if isinstance(inner_of(self.module.teacher), CachedTeacher) and stage in ("fit", "validate"):
            raise UsageError(CACHED_TEACHER)
        wish, (own, here) = self.settings.responses_from, tokenizers_of(self.module, facts_of(data))
        if wish == "student" or own is None or here is None or stage not in ("fit", "validate"):
            return
        if own.get_vocab() != here.get_vocab():
            raise UsageError(
                f"on_policy.responses_from {wish} needs a teacher of the student's tokenizer, and this one answers in "
                "tokens of its own: set it to student, or write the teacher's answers with akl generate first."
            )

    def start(self) -> None:
        """Check what is known only when a run has its loaders.

        Raises:
            UsageError: rollouts for more steps than an epoch has, or for steps whose samples nobody knows.
        """
        every, trainer = self.settings.refresh_every, self.module.trainer
        steps = -(-trainer.num_training_batches // accumulated(trainer, self.module.current_epoch))
        if every > 1 and self._own_loader() is None:
            raise UsageError(
                f"on_policy.refresh_every = {every} samples for optimizer steps to come, and only "
                "InstructionDataModule's loader says which samples they have: set it to 1."
            )
        if every > steps:
            raise UsageError(
                f"on_policy.refresh_every = {every} is beyond the epoch, which has {steps:.0f} optimizer steps: set it "
                "to that at most."
            )

    # ----------------------------------------------------------------------------------------------------------------
    # What they cost, and what is logged of them

    def compare(
        self,
        module: "DistillationModule",
        batch: Batch,
        student: Logits,
        teacher: Logits | None,
        labels: Tensor,
    ) -> CriterionOutput:
        """What a batch costs: its rollouts with a divergence of their own, where there is one."""
        rollouts: RolloutTokens | None = batch.get("rollouts")
        if rollouts is None:
            return super().compare(module, batch, student, teacher, labels)
        weights = weights_of(batch, rollouts.alpha)  # rollouts have no labels but where they are aligned
        own: DistillationCriterion | None = getattr(module, "rollout_criterion", None)
        if own is None:
            return module.compare(student, teacher, labels, **{"alpha": rollouts.alpha} | weights)
        assert teacher is not None
        of_others = {name: weight[rollouts.others] for name, weight in weights.items()}
        parts = [
            compare(rows_of(student, places), rows_of(teacher, places), labels[places], **more)
            for compare, places, more in ((own, rollouts.places, {}), (module.compare, rollouts.others, of_others))
        ]
        order = torch.cat([rollouts.places, rollouts.others])
        statistics = {}
        for name in parts[0].statistics:
            both = torch.cat([part.statistics[name] for part in parts])
            statistics[name] = torch.empty_like(both).index_copy_(0, order, both)
        return CriterionOutput(parts[0].loss + parts[1].loss, statistics)

    def statistics(self, batch: Batch, statistics: dict[str, Tensor]) -> dict[str, Any]:
        if "rollouts" not in batch or not self.module.trainer.training:
            return {}
        found = statistics_of(batch["rollouts"], statistics)
        self.watch.add_entropy(found["rollout_entropy"])
        # What the student itself has said has no cross entropy.
        others = batch["rollouts"].others
        found |= {name: statistics[name][others] for name in ("cross_entropy", "bytes") if name in statistics}
        return found | ({"data_aligned": statistics["aligned"][others]} if "aligned" in statistics else {})

    def end_batch(self) -> None:
        """Count the time that a batch has taken, and note where the loader is behind a whole step."""
        if self._clock is not None:
            begun, sampling, tokens = self._clock
            self.module.train_metrics.update(
                seconds=time.perf_counter() - begun, sampling_seconds=sampling, sampled_tokens=tokens
            )
            self._clock = None
        loader = self._own_loader()
        if not self.module.in_step and loader is not None and hasattr(loader, "state_dict"):
            self._place = loader.state_dict()

    def _now(self) -> float:
        """The time, when the device has done what it was given."""
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)
        return time.perf_counter()

    # ----------------------------------------------------------------------------------------------------------------
    # Validation

    def look(self, batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        """Let the student answer its share of the prompts of a validation, and measure its reverse divergence there."""
        trainer = self.module.trainer
        per_rank = -(-self.settings.validation_samples // trainer.world_size)
        if wanted := spread_over_validation(trainer, batch_idx, dataloader_idx, per_rank):
            with torch.no_grad():
                output = self.module.distill(self.answered_by_student(batch, wanted))
            self._rkl.update(rollout_rkl=output.statistics["rkl"])

    def answered_by_student(self, batch: Batch, wanted: int) -> dict[str, Any]:
        """The first samples of a batch with the student's own responses: the same draws whenever it is asked.

        Every rank has to call it where the student is sharded. Nothing is learnt of samples whose prompt leaves no room
        for an answer.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``.
            wanted: how many.
        """
        names = [name for name in (*KEYS, "turn", "index", *OF_TEACHER) if name in batch]
        few = {name: batch[name][:wanted] for name in names}
        ignore_index, room = self.module.criterion.ignore_index, self.sampler.room
        tasks = self._chosen(samples_of(few, ignore_index), VALIDATION, share=1.0)
        tasks = {row: task for row, task in tasks.items() if room is None or len(task.prompt) <= room}
        found = dict(zip(tasks, self.sampler.sample(list(tasks.values()), "student"), strict=True))
        few["labels"] = torch.full_like(few["labels"], ignore_index)
        few = self._answered(few, found)
        return {name: few[name] for name in names}

    def end_validation(self) -> None:
        """Log the mean over the tokens of the responses."""
        if self.settings.validation_samples and not self.module.trainer.sanity_checking:
            self.module.log("val/rollout_rkl", self._rkl.compute().float())
        self._rkl.reset()

    # ----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save(self, checkpoint: dict[str, Any]) -> None:
        trainer = self.module.trainer
        waiting: dict[tuple[int, str], Answer] = {}
        for part in gather_objects(trainer, self._ahead.answers):
            waiting |= part  # a rank that has gone on has those of all
        checkpoint["rollouts"] = {
            "settings": self._depends_on(),
            "epoch": self._ahead.epoch,
            "until": self._ahead.until,
            "waiting": [[*key, *answer] for key, answer in waiting.items() if key[0] >= trainer.global_step],
            "watch": self.watch.state(),
        }
        if self.broken_off:
            within = trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0
            place = [self._place] if within and self._place is not None else []
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = place

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them, unless other ones are asked for now."""
        self.forget()
        state = checkpoint.get("rollouts")
        if state is None:
            return
        watch = state["watch"]
        self.watch.load(watch[0] if isinstance(watch, list) else watch)  # once each rank had its own
        if state["settings"] == self._depends_on():
            answers = {(step, sample): Answer(*answer) for step, sample, *answer in state["waiting"]}
            self._ahead = Ahead(state["epoch"], state["until"], answers)

    def _depends_on(self) -> list[Any]:
        settings = self.settings
        decoding = settings.decoding
        drawn = [decoding.max_new_tokens, decoding.temperature, decoding.top_p, settings.seed]
        order = [getattr(data_of(self.module.trainer), name, None) for name in ("seed", "group_by_length")]
        return [settings.share, settings.refresh_every, settings.responses_from, settings.turns, *drawn, *order]
