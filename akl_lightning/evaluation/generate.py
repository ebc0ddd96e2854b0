"""Let a model answer the prompts of a split, under the Trainer: in a test, or for its own sake."""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from akl_lightning.batch import Batch
from akl_lightning.checkpoint import check_writable
from akl_lightning.data.collate import column
from akl_lightning.data.facts import facts_of_run
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.answers import AnswerFile, Record, digest, prompts_of
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.diversity import diversity
from akl_lightning.evaluation.rouge import rouge_l
from akl_lightning.models.load import Precision
from akl_lightning.models.vocabulary import check_same_vocabulary, tokenizer_of
from akl_lightning.module import DistillationModule
from akl_lightning.parallel import data_parallel_mesh, ending_together
from akl_lightning.teachers.fingerprint import weights_digest
from akl_lightning.teachers.live import LiveTeacher


class AnswerEvaluation(Callback):
    """Let the student answer the test split's prompts while it is tested, and log how good the answers are.

    Logged: ``test/rouge_l`` (percent), the mean over the seeds, and ``test/rouge_l_sd``, their standard deviation;
    ``test/`` and each figure of :func:`~akl_lightning.evaluation.diversity.diversity`. The answers are kept in a file;
    a test that is repeated or was broken off takes them from there.

    Args:
        path: the file; ``{key}`` in it stands for a digest of the student's weights, the decoding and the prompts, so
            that different tests do not meet. ``answers-{key}.jsonl`` in the Trainer's ``default_root_dir`` where it is
            not given.
        decoding: how the answers are decoded.

    Raises:
        UsageError: no :class:`~akl_lightning.data.module.InstructionDataModule`; prompts and answers that are longer
            than the student; a file with answers of other settings.
    """

    def __init__(self, path: str | Path | None = None, decoding: Decoding = Decoding()) -> None:  # noqa: B008
        self.path = path
        self.decoding = decoding
        self.answers: list[list[Record]] = []
        """For each sample of the last test its answers, one for each seed."""
        self.written: Path | None = None
        """Their file."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there are prompts, and somebody to answer them."""
        if stage != "test":
            return
        if not isinstance(pl_module, DistillationModule):
            raise UsageError("AnswerEvaluation needs a DistillationModule: remove the callback.")
        data, positions = prompts_of(trainer), pl_module.student.max_positions
        data.check_answers_fit("test", "decoding.max_new_tokens", self.decoding.max_new_tokens, positions)

    def on_test_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Look for answers that are there already."""
        model = weights_digest(pl_module.student.model)
        path = Path(trainer.default_root_dir) / "answers-{key}.jsonl" if self.path is None else self.path
        key = digest([model, asdict(self.decoding), *column(prompts_of(trainer).splits["test"], "prompt")])[:8]
        self._file = AnswerFile(trainer, "test", str(path).replace("{key}", key), model, self.decoding)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Answer the prompts of the batch."""
        self._file.answer(batch["index"].tolist(), pl_module.student, pl_module.generate)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the answers are worth."""
        self.answers = self._file.close()
        self.written = self._file.path
        figures = answer_figures(self.answers)
        pl_module.log_dict({f"test/{name}": float(value) for name, value in figures.items() if value == value})


def answer_figures(answers: list[list[Record]]) -> dict[str, float]:
    """ROUGE-L and diversity of answers.

    Args:
        answers: for each sample its answers, one for each seed.

    Returns:
        ``rouge_l`` in percent, the mean over seeds; with several seeds ``rouge_l_sd``, their standard deviation; and
        the figures of :func:`~akl_lightning.evaluation.diversity.diversity`.
    """
    if not answers:  # documents alone
        return {}
    scores = [
        rouge_l([record["answer"] for record in column], [record["references"] for record in column])
        for column in zip(*answers, strict=True)
    ]
    figures = {"rouge_l": statistics.fmean(scores)}
    if len(scores) > 1:
        figures["rouge_l_sd"] = statistics.stdev(scores)
    return figures | diversity([[record["answer"] for record in group] for group in answers])


class AnswerWriter(LightningModule):
    """Write a model's answers to the prompts of a split: ``akl generate``, or ``trainer.predict`` with this module.

    The split is ``data.predict_split``. A file of answers is a source of pairs for sequence-level distillation:
    ``JsonLines("answers.jsonl", output="answer")``. Under ``fsdp2`` the model is sharded.

    Args:
        model: a hub name, a local folder, a ``transformers`` config mapping, or a module.
        path: the file of answers; a run that was broken off goes on with it.
        decoding: how the answers are decoded.
        trust_remote_code: run Python code that comes with the model.
        precision: of the weights of a model that is no module; auto for the one they are stored in, 8bit and 4bit
            through bitsandbytes.

    Raises:
        UsageError: a model that cannot be had; as for :class:`AnswerEvaluation`.
    """

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str,
        path: str | Path,
        decoding: Decoding = Decoding(),  # noqa: B008 (it is frozen)
        trust_remote_code: bool = False,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.language_model = LiveTeacher(model, trust_remote_code, role="model", precision=precision)
        self._tokenizer = tokenizer_of(model, trust_remote_code)
        self.path = Path(path)
        self.decoding = decoding

    def setup(self, stage: str) -> None:
        """Check that there is a place for the answers, and that they fit the model with their prompts."""
        with ending_together(self.trainer):
            check_writable(self.path.parent)
        data = prompts_of(self.trainer)
        if self._tokenizer is not None:
            check_same_vocabulary(self._tokenizer, data.tokenizer, ("model", "data"))
        self.language_model.check_fits("model", data.tokenizer, None)
        positions = self.language_model.max_positions
        data.check_answers_fit(data.predict_split, "decoding.max_new_tokens", self.decoding.max_new_tokens, positions)

    def configure_model(self) -> None:
        """Read the weights."""
        self.language_model.load(data_parallel_mesh(self.trainer.strategy))

    def on_predict_start(self) -> None:
        """Look for answers that are there already."""
        self.language_model.to(self.device)
        model = weights_digest(self.language_model.model.model)
        self._file = AnswerFile(self.trainer, prompts_of(self.trainer).predict_split, self.path, model, self.decoding)

    def predict_step(self, batch: Batch, batch_idx: int) -> int:
        """Answer the prompts of the batch; how many there are."""
        self._file.answer(batch["index"].tolist(), self.language_model.model, self._generate)
        return len(batch["index"])

    def _generate(self, prompts: Batch, **arguments: Any) -> Tensor:
        model = self.language_model.model.eval()
        sharded, facts = isinstance(model, FSDPModule), facts_of_run(self.trainer)
        return model.generate(prompts, facts.tokenizer, facts.end_tokens, **arguments, synced_gpus=sharded)

    def on_predict_end(self) -> None:
        """Write the file of all answers."""
        self._file.close()
