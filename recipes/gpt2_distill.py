"""Distil a GPT-2 teacher into a smaller GPT-2 student with AKL, end to end.

    python recipes/gpt2_distill.py                                    # the embedded default, gpt2_distill.yaml
    python recipes/gpt2_distill.py --trainer.max_epochs 1 --model.criterion.divergence ReverseKL
    python recipes/gpt2_distill.py --config recipes/gpt2_dolly.yaml   # the paper's setting, from the public hub
    python recipes/gpt2_distill.py --ckpt_path last                   # go on with the run before

By default nothing is downloaded: the corpus is the documentation of Python's standard library, the tokenizer and the
teacher are trained on it and cached, and the student is distilled, tested and exported. --trainer.* is the student's
training, --teacher.* the teacher's; --help lists every option.
"""

import akl_lightning.interrupts  # noqa: F401 (first, so that a Ctrl-C during the other imports is no traceback)

# isort: split
from pathlib import Path

from akl_lightning.cli import run_command
from common.own_teacher import OwnTeacherCLI
from common.runs import distill


def main(args: list[str] | None = None) -> None:
    distill(OwnTeacherCLI(Path(__file__).with_suffix(".yaml"), __doc__, args))


if __name__ == "__main__":
    run_command(main)
