"""The optimizer of a run and the schedule of its learning rate; how a run that is resumed goes on with them."""

import copy
import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from akl_lightning.data.sampler import accumulated
from akl_lightning.errors import UsageError
from akl_lightning.learning_rate import chosen_rate, class_without_rate

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]

EPOCHS = 3
"""Of a run that is given no end."""


def make_optimizer(module: "DistillationModule") -> dict[str, Any]:
    """The optimizer over all trainable parameters, and its schedule, as ``configure_optimizers`` returns them.

    Raises:
        UsageError: the optimizer does not accept one of its arguments; a schedule that spans a run without an end.
    """
    optimizer = _optimizer(module.optimizer, [p for p in module.parameters() if p.requires_grad])
    chosen, given = chosen_rate(module), class_without_rate(module.optimizer) is None
    optimizer.given_rates = [group["lr"] if given else None for group in optimizer.param_groups]  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        if module.lr is not None:
            group["lr"] = module.lr
        elif chosen is not None:
            group["lr"] = chosen.rate
    optimizer.rates = [group["lr"] for group in optimizer.param_groups]  # type: ignore[attr-defined]
    name = module.lr_scheduler
    if isinstance(name, str):
        steps = None if name.startswith("constant") else _steps_of_run(module.trainer, name)
        from transformers import get_scheduler  # PEFT comes with it, which no command line waits for

        config = {"scheduler": get_scheduler(name, optimizer, module.warmup_steps, steps), "interval": "step"}
    else:
        schedule = name(optimizer)
        config = {"scheduler": schedule, "monitor": getattr(schedule, "monitor", None)}
    return {"optimizer": optimizer, "lr_scheduler": config}


def say_rate(module: "DistillationModule") -> None:
    """Say which learning rate a run begins with whose user has given none."""
    kind, chosen = class_without_rate(module.optimizer), chosen_rate(module)
    for optimizer in module.trainer.optimizers:
        # Those of a configure_optimizers of the user's own have none, and some schedules set others.
        rates: list[Any] = getattr(optimizer, "rates", [])
        if kind is not None and module.lr is None and _same(rates, [_rate(group) for group in optimizer.param_groups]):
            why = f"{kind.__name__}'s own" if chosen is None else f"for {chosen.of}"
            rank_zero_info(f"learning rate {_text(rates[0])}, {why}: model.optimizer.lr sets another.")


def try_optimizer(optimizer: Any, lr_scheduler: Any, ends: bool) -> None:
    """Make the optimizer and the schedule that classes of torch give, of a stand-in for the parameters.

    Args:
        optimizer: as :class:`~akl_lightning.module.DistillationModule` takes it, on the command line.
        lr_scheduler: likewise.
        ends: whether the run has an end that is known.

    Raises:
        UsageError: an argument that they do not accept; a schedule that spans a run without an end.
    """
    made = _optimizer(optimizer, [nn.Parameter(torch.zeros(2, 2))])
    if not isinstance(lr_scheduler, str):
        try:
            lr_scheduler(made)
        except (TypeError, ValueError) as error:
            raise UsageError(f"model.lr_scheduler does not accept an argument: {error}; give another value.") from error
    elif not ends and not lr_scheduler.startswith("constant"):
        raise UsageError(_NO_END.format(lr_scheduler))


def end_after_epochs(trainer: Any) -> None:
    """Let a run that is given no end have three epochs, where Lightning would take 1,000, and say so.

    Args:
        trainer: the settings of the Trainer, as parsed.
    """
    if (trainer.max_epochs, trainer.max_steps, trainer.max_time) == (None, -1, None) and not trainer.fast_dev_run:
        trainer.max_epochs = EPOCHS
        rank_zero_info(f"{EPOCHS} epochs, as no end is given: trainer.max_epochs, max_steps or max_time sets another.")


def _optimizer(make: Any, parameters: list[nn.Parameter]) -> Optimizer:
    try:
        return make(parameters)
    except ValueError as error:
        raise UsageError(f"model.optimizer does not accept an argument: {error}; give another value.") from error


_NO_END = (
    "the schedule {!r} spans the whole run, which has no end that is known: set trainer.max_steps, or take "
    "lr_scheduler constant."
)


def _steps_of_run(trainer: Trainer, schedule: str) -> int:
    steps = trainer.estimated_stepping_batches  # which loads the data, and knows no GradientAccumulationScheduler
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
    if epochs > 0 and math.isfinite(batches):
        counted = sum(math.ceil(batches / accumulated(trainer, epoch)) for epoch in range(epochs))
        steps = counted if trainer.max_steps == -1 else min(counted, trainer.max_steps)
    if not 0 <= steps < math.inf:
        raise UsageError(_NO_END.format(schedule))
    return int(steps)


# --------------------------------------------------------------------------------------------------------------------
# Going on from a checkpoint

Settings = dict[str, Any]
"""``optimizers``, each with its ``kind``, its ``groups``, whose ``params`` are names, the rates it was ``given``, None
where the user gives none, and the ``rates`` that it had before a schedule; ``schedules``, each with its ``kind``, the
``interval`` at which it steps and the ``state`` in which it begins; and ``lr``, which the module has set in place of
the rates given."""

Groups = list[dict[str, Any]]
"""The groups of parameters of an optimizer."""

_STATES = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"}
"""What changes in torch's schedules while they run, beside what has an underscore in front."""


def settings_of(module: "DistillationModule") -> Settings:
    """With which settings optimizers and schedules were made; asked before anything has moved them."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizers, schedules = module.trainer.optimizers, module.trainer.lr_scheduler_configs
    return copy.deepcopy(
        {
            "lr": module.lr,
            "optimizers": [
                {
                    "kind": type(optimizer).__name__,
                    "groups": [
                        {**group, "params": [names[parameter] for parameter in group["params"]]}
                        for group in optimizer.param_groups
                    ],
                    "given": getattr(optimizer, "given_rates", None),
                    "rates": getattr(optimizer, "rates", None),
                }
                for optimizer in optimizers
            ],
            "schedules": [
                {
                    "kind": type(config.scheduler).__name__,
                    "interval": config.interval,
                    "state": config.scheduler.state_dict(),
                }
                for config in schedules
            ],
        }
    )


def kept_rate(now: Settings, checkpoint: dict[str, Any]) -> float | None:
    """The learning rate of a checkpoint's run that this one has to be set to, as it is given none.

    It may have been given then, or chosen, or a finder has found it.
    """
    then = checkpoint.get("settings") or _settings_in(checkpoint)
    pairs = zip(now["optimizers"], then["optimizers"], strict=False)
    if now["lr"] is not None or any(made["kind"] != before.get("kind", made["kind"]) for made, before in pairs):
        return None
    given, before = ([optimizer.get("given") for optimizer in of["optimizers"]] for of in (now, then))
    if any(rate is not None for rates in given for rate in rates or [0.0]):
        return then["lr"] if _same(given, before) else None
    ours, theirs = (
        {rate for made in of["optimizers"] for rate in made.get("rates") or map(_rate, made["groups"])}
        for of in (now, then)
    )
    return theirs.pop() if len(theirs) == 1 and theirs != ours else None


class Continuation:
    """Lets what is asked for now win, in a checkpoint, over what it remembers.

    A setting wins where it differs from the one that the checkpoint was made with. States stay: moments, numbers of
    steps, and a rate that ``ReduceLROnPlateau`` has lowered, as a share of the rate that it was given. A schedule with
    other settings goes on as if it had had them from the start.

    Args:
        trainer: with optimizers and schedules as they were made, before it restores them.
        now: their :func:`settings_of`.
        checkpoint: is changed by :meth:`prepare`.

    Raises:
        UsageError: the checkpoint holds weights alone.
    """

    def __init__(self, trainer: Trainer, now: Settings, checkpoint: dict[str, Any]) -> None:
        if not {"optimizer_states", "lr_schedulers"} <= checkpoint.keys():
            raise UsageError(
                "the checkpoint holds weights alone, from which no run can go on: give another one, or begin a new run."
            )
        self.trainer = trainer
        self.now = now
        self.then: Settings = checkpoint.get("settings") or _settings_in(checkpoint)
        self.checkpoint = checkpoint
        self.said: list[str] = []

    def prepare(self) -> None:
        """Put into the checkpoint what the run goes on with, and say what is other than it was.

        Raises:
            UsageError: a schedule that has no such step.
        """
        for number, optimizer in enumerate(self.trainer.optimizers):
            saved = self.checkpoint["optimizer_states"][number : number + 1]
            # Some strategies keep it elsewhere.
            groups = self._groups(number, saved[0]) if saved and "param_groups" in saved[0] else None
            if groups is None:
                continue
            for index, config in enumerate(self.trainer.lr_scheduler_configs):
                if config.scheduler.optimizer is optimizer and index < len(self.checkpoint["lr_schedulers"]):
                    self._schedule(index, config, self.now["optimizers"][number]["groups"], groups)
            # What it was made with is for the comparison alone.
            saved[0]["param_groups"] = [
                {key: value for key, value in group.items() if key != "was"} for group in groups
            ]
        if self.said:
            said = ", ".join(dict.fromkeys(self.said))
            rank_zero_info(f"going on with other settings than those of the checkpoint: {said}")

    def _groups(self, number: int, saved: dict[str, Any]) -> Groups | None:
        """The groups of parameters to go on with; None for other parameters than the checkpoint's, refused later."""
        made, then = self.now["optimizers"][number], self.then["optimizers"][number]
        order = [name for group in made["groups"] for name in group["params"]]
        loaded, before = (_by_name(of, order) for of in (saved["param_groups"], then["groups"]))
        if loaded.keys() != set(order) or before.keys() != set(order):
            return None
        if then.get("kind", made["kind"]) != made["kind"]:
            self.said.append(f"the optimizer is {made['kind']}, whose moments begin anew")
            saved["state"] = {}
            return [{**copy.deepcopy(group), "was": before[group["params"][0]]} for group in made["groups"]]
        groups = []
        for given in made["groups"]:
            old, was = (of[given["params"][0]] if given["params"] else given for of in (loaded, before))
            group = {**given, **old, "params": given["params"], "was": was}
            for key, value in given.items():
                # A rate that a schedule has set is its state: what was given is initial_lr then.
                scheduled = key == "lr" and "initial_lr" in given and "initial_lr" in old
                if key != "params" and not scheduled and not _same(value, was.get(key, value)):
                    group[key] = copy.deepcopy(value)
                    if key not in ("lr", "initial_lr"):
                        self.said.append(f"{key} {_text(value)} (was {_text(was[key])})")
            if not _same(_rate(given), _rate(was)) and _rate(was) is not None:
                self.said.append(f"lr {_text(_rate(given))} (was {_text(_rate(was))})")
            groups.append(group)
        return groups

    def _schedule(self, index: int, config: Any, given: Groups, groups: Groups) -> None:
        """Put the state of a schedule into the checkpoint, and into the groups what it has set there."""
        schedule, made, saved = config.scheduler, self.now["schedules"][index], self.checkpoint["lr_schedulers"][index]
        was = self.then["schedules"][index] if index < len(self.then["schedules"]) else None
        steps = saved.get("last_epoch", 0)
        lowers = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        if _is_another(made, was, saved):
            steps = self.checkpoint["global_step" if config.interval == "step" else "epoch"] // config.frequency
            begins = "which begins anew" if lowers else "at the rate of a run that has had it from the start"
            self.said.append(f"the schedule is {made['kind']}, {begins}")
        elif lowers:
            self._lower(made, saved, was, given, groups)
            return
        elif not _has_changed(schedule, made, saved, was):
            return
        if not lowers:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=r".*lr_scheduler.step\(\)")  # before an optimizer's
                    for _ in range(steps):
                        schedule.step()
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"the schedule {made['kind']} cannot go on at step {steps} of the checkpoint ({error}): give "
                    "model.lr_scheduler the settings of the whole run."
                ) from error
        self.checkpoint["lr_schedulers"][index] = schedule.state_dict()
        for group, start, moved in zip(groups, given, schedule.optimizer.param_groups, strict=True):
            for key in moved.keys() - {"params"}:
                if key in ("lr", "initial_lr") or not _same(moved[key], start.get(key)):
                    group[key] = copy.deepcopy(moved[key])
        self.said += [f"the learning rate goes on at {_text(group['lr'])}" for group in groups]

    def _lower(self, made: Settings, saved: Settings, was: Settings | None, given: Groups, groups: Groups) -> None:
        start = saved if was is None else was["state"]
        for key, value in made["state"].items():
            if _is_setting(key) and not _same(value, start.get(key, value)):
                saved[key] = copy.deepcopy(value)
                self.said.append(f"{key} {_text(value)} (was {_text(start[key])})")
        for group, of_now, last, least in zip(groups, given, saved["_last_lr"], saved["min_lrs"], strict=True):
            before = _rate(group["was"])
            if before is None or _same(_rate(of_now), before):
                group["lr"] = last
            else:
                group["lr"] = max(_rate(of_now) * (last / before if before else 1.0), least)
                self.said.append(f"the learning rate goes on at {_text(group['lr'])}, lowered as it was")
        saved["_last_lr"] = [group["lr"] for group in groups]


def _by_name(groups: Groups, order: list[str]) -> dict[str, dict[str, Any]]:
    """The group of each parameter, which older checkpoints know by its position."""
    members = {name: group for group in groups for name in group["params"]}
    return {order[name] if isinstance(name, int) and name < len(order) else name: of for name, of in members.items()}


def _is_another(made: Settings, was: Settings | None, saved: Settings) -> bool:
    """Whether the state of the checkpoint's schedule means nothing to this one."""
    if was is not None and (made["kind"], made["interval"]) != (was["kind"], was["interval"]):
        return True
    return any(_is_setting(key) and key not in saved for key in made["state"])


def _has_changed(schedule: Any, made: Settings, saved: Settings, was: Settings | None) -> bool:
    if isinstance(schedule, LambdaLR):  # whose settings are in functions
        rates = [
            base * of(saved["last_epoch"]) for base, of in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        return not _same(rates, saved["_last_lr"])
    if was is not None:
        return not _same(made["state"], was["state"])
    return any(not _same(value, saved[key]) for key, value in made["state"].items() if _is_setting(key))


def _settings_in(checkpoint: dict[str, Any]) -> Settings:
    """What a checkpoint of an earlier version tells of its settings."""
    # Of a rate that was lowered it does not say from what.
    lowered = any("num_bad_epochs" in schedule for schedule in checkpoint.get("lr_schedulers", ()))
    optimizers = []
    for state in checkpoint.get("optimizer_states", ()):
        groups = [{**group, "lr": _rate(group)} for group in state.get("param_groups", [])]
        if lowered:
            groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
        optimizers.append({"groups": groups})
    return {"lr": None, "optimizers": optimizers, "schedules": []}


def _rate(group: dict[str, Any]) -> Any:
    """The learning rate that a group was given; None where that is not known."""
    return group.get("initial_lr", group.get("lr"))


def _is_setting(key: str) -> bool:
    return not key.startswith("_") and key not in _STATES


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are equal; a tuple is a list in a configuration file."""
    if one is None or other is None:
        return one is other
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return bool((torch.as_tensor(one).cpu() == torch.as_tensor(other).cpu()).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
