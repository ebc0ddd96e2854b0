"""Let a small GPT-2 learn from a larger one on its own answers, after a warm start on the data's.

    python recipes/on_policy.py                                       # the embedded default, on_policy.yaml
    python recipes/on_policy.py --model.on_policy.share 1 --model.on_policy.divergence ReverseKL
    python recipes/on_policy.py --data.source JsonLines --data.source.path pairs.jsonl
    python recipes/on_policy.py --config recipes/on_policy_gpu.yaml   # a student of 0.5B on one GPU
    python recipes/on_policy.py --ckpt_path last                      # go on with the run before

Nothing is downloaded: corpus, tokenizer and teacher are those of gpt2_distill.py, trained once and cached. A new
student says nothing worth correcting, so it first learns off-policy (--warm_epochs); then, in every step, a share of
the prompts is answered by the student, and the teacher's whole distribution is the target at each of its tokens. The
report is that of gpt2_distill.py, with the share of the time that sampling took. --help lists every option.

Prompts alone will do where nothing has to be learnt from responses first: with --warm_epochs 0, a --model.student that
has learnt something, and a --model.teacher with its --data.tokenizer.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console

from akl_lightning.callbacks import DistillationProgressBar
from akl_lightning.cli import run_command
from akl_lightning.errors import UsageError
from akl_lightning.rollouts.off import OffPolicy
from common.own_teacher import OwnTeacherCLI
from common.runs import distill

console = Console()


def main(args: list[str] | None = None) -> None:
    cli = OnPolicyRecipe(Path(__file__).with_suffix(".yaml"), __doc__, args)
    if not cli.model.rollouts.on:
        raise UsageError("this recipe is about rollouts: give model.on_policy.share above 0, or run gpt2_distill.py.")
    if cli.config.warm_epochs and cli.config.ckpt_path is None:
        warm_up(cli)
    distill(cli)


class OnPolicyRecipe(OwnTeacherCLI):
    """Adds the warm start's section."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--warm_epochs", type=int, default=1, help="Epochs on the data's responses before.")


def warm_up(cli: OnPolicyRecipe) -> None:
    """Train the student off-policy, with the same criterion and optimizer."""
    module, settings = cli.model, cli.config.trainer
    if cli.trainer.is_global_zero:
        console.print("[bold]Warm start: on the data's responses")
    same = ("accelerator", "devices", "strategy", "precision", "gradient_clip_val", "limit_train_batches")
    trainer = Trainer(
        max_epochs=cli.config.warm_epochs,
        callbacks=[DistillationProgressBar()],
        **{name: settings[name] for name in same},
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=cli.run_folder,
    )
    rollouts, module.rollouts = module.rollouts, OffPolicy()
    module.rollouts.outline = rollouts.outline  # type: ignore[method-assign]  # before the student is sharded
    trainer.fit(module, cli.datamodule)
    module.rollouts = rollouts


if __name__ == "__main__":
    run_command(main)
