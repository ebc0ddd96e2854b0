"""A teacher of one's own: tokenizer and model trained on the training split, once, and found again afterwards."""

import hashlib
import json
import platform
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from filelock import FileLock
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

import akl_lightning
from akl_lightning.callbacks import DistillationProgressBar
from akl_lightning.checkpoint import atomic_folder, check_writable
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.records import content_digest
from akl_lightning.data.splits import split_records
from akl_lightning.models.load import load_causal_lm
from akl_lightning.models.split import SplitModel
from akl_lightning.module import DistillationModule
from common.runs import RunCLI

console = Console()
END_OF_TEXT = "<|endoftext|>"


class OwnTeacherCLI(RunCLI):
    """The command line of a recipe whose teacher is trained on the recipe's own data, unless one is given.

    It adds the section ``teacher``, with the arguments of :func:`prepare_teacher`.
    """

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add ``--teacher``."""
        super().add_arguments_to_parser(parser)
        parser.add_function_arguments(prepare_teacher, "teacher", skip={"student", "data"})

    def before_instantiate_classes(self) -> None:
        """Train the teacher, or find it."""
        config = self.config
        # Before the teacher's training, so that a mistake costs no time.
        self.look_first()
        criterion = config.model.criterion
        DistillationCriterion(**criterion.as_dict() | {"divergence": instantiate_class((), criterion.divergence)})
        if config.model.teacher is None:
            config.model.teacher = str(prepare_teacher(config.model.student, config.data, **config.teacher.as_dict()))
        super().before_instantiate_classes()


def prepare_teacher(
    student: Any,
    data: Any,
    model: dict[str, Any],
    vocab_size: int = 2048,
    max_epochs: int = 3,
    batch_size: int = 10,
    learning_rate: float = 1.7e-3,
    seed: int = 0,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    cache_dir: str = "~/.cache/akl_lightning",
) -> Path:
    """Train tokenizer and teacher on the training split, or find them in the cache.

    Args:
        student: what will learn from it; its positions and vocabulary are checked before any training.
        data: the settings of the data module, which the student shares.
        model: the teacher's ``transformers`` config.
        vocab_size: of the byte-level BPE tokenizer.
        max_epochs: epochs of its training.
        batch_size: of its training, on one device.
        learning_rate: of AdamW, with a cosine schedule.
        seed: of its weights and its training.
        precision: of its training, as the Trainer has it.
        cache_dir: where tokenizer and teacher are kept.

    Returns:
        A folder with model and tokenizer.
    """
    check_writable(Path(cache_dir).expanduser())
    console.print("[bold]Corpus: reading the records")
    source = instantiate_class((), {"init_args": {}, **data.source.as_dict()})
    records = split_records(source.load(), data.validation_size, data.test_size)
    console.print("  " + ", ".join(f"{split}: {len(members):,}" for split, members in records.items()) + " records")
    code = [Path(__file__), *sorted(Path(akl_lightning.__file__).parent.rglob("*.py"))]
    depends_on = {
        "records": content_digest(records["train"], records["validation"]),
        "code": _digest(*(path.read_text() for path in code)),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "lightning")},
        "machine": f"{platform.machine()}, {'cuda' if torch.cuda.is_available() else 'cpu'}",
        "data": {
            name: data[name] for name in ("template", "max_length", "max_prompt_length", "group_by_length", "seed")
        },
        "teacher": [model, vocab_size, max_epochs, batch_size, learning_rate, seed, precision],
    }
    key = _digest(json.dumps(depends_on, sort_keys=True))[:16]
    folder = Path(cache_dir).expanduser() / f"teacher-{key}"
    # One process builds; others that start with it (torchrun) wait and find what it has built.
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            console.print(f"Tokenizer and teacher: found in {folder}", soft_wrap=True)
            return folder
        # Isolated, so that the student's weights are the same whether the teacher was trained or found.
        with atomic_folder(folder) as unfinished, isolate_rng():
            console.print("[bold]Tokenizer: training a byte-level BPE")
            tokenizer = _train_tokenizer(records["train"], vocab_size)
            SplitModel(load_causal_lm(student)).check_fits("student", tokenizer, data.max_length)
            console.print("[bold]Teacher: training, once; later runs find it in the cache")
            seed_everything(seed, verbose=False)
            end = tokenizer.eos_token_id
            # Lightning clips no gradients of a fused optimizer in mixed precision.
            adam = partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.1, fused=precision == "32-true")
            module = DistillationModule(
                model | {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end},
                criterion=DistillationCriterion(alpha=0.0),
                optimizer=adam,
                lr_scheduler="cosine",
                warmup_steps=200,
            )
            settings = data.as_dict() | {"source": source, "tokenizer": tokenizer, "batch_size": batch_size}
            trainer = Trainer(
                max_epochs=max_epochs,
                callbacks=[DistillationProgressBar()],
                devices=1,
                precision=precision,
                gradient_clip_val=1.0,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=unfinished,
            )
            trainer.fit(module, InstructionDataModule(**settings))
            module.student.model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            (unfinished / "depends_on.json").write_text(json.dumps(depends_on, indent=2))
    return folder


def _train_tokenizer(records: datasets.Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(map(_all_texts, records), vocab_size, special_tokens=[END_OF_TEXT], length=len(records))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def _all_texts(record: dict[str, Any]) -> str:
    """A document, or what is said in a conversation."""
    said = []
    for message in json.loads(record["messages"] or "[]"):
        said.append(str(message["content"] or ""))
        if message["role"] == "user":
            said.append(message.get("input", ""))
    return record["text"] or "\n".join(said)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
