"""What the strategies shard, write and read: real processes on gloo."""

import json
import os
import signal
import subprocess
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from akl_lightning.callbacks import StudentExport
from akl_lightning.models.split import SplitModel
from akl_lightning.module import DistillationModule
from akl_lightning.parallel import FSDP2Strategy, data_parallel_mesh, load_sharded, wrapping_policy
from tests.commands.start import python
from tests.conftest import QUIET, gpt2
from tests.distributed.training import apart, data_of, free_port, launch, module_of, prepare, whole_state


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    prepare(tmp_path, tokenizer)
    return tmp_path


class Projector(DistillationModule):
    """A subclass with parameters of its own, two parameter groups, and something frozen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch.manual_seed(5)
        self.projector = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(3))
        self.student.model.transformer.wpe.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        output = super().training_step(batch, batch_idx)
        tokens = output["statistics"]["loss"].numel()
        own = self.projector(torch.ones(2, 16)).square().mean() + self.scale.square().sum()
        output["loss"] = output["loss"] + tokens * own
        return output

    def configure_optimizers(self) -> Any:
        student = [p for p in self.student.parameters() if p.requires_grad]
        # Not in the order in which the module has them.
        groups = [{"params": [self.scale, *self.projector.parameters()], "lr": 0.03}, {"params": student, "lr": 0.01}]
        return torch.optim.AdamW(groups)


def projector_of(folder: Path) -> Projector:
    return Projector(str(folder / "student"), str(folder / "teacher"))


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints that go from two processes to one and back


def fit(folder: Path, epochs: int, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
    trainer = Trainer(**QUIET, max_epochs=epochs, **settings)
    batch_size = 16 // trainer.world_size
    trainer.fit(projector_of(folder), data_of(folder, batch_size=batch_size), ckpt_path=ckpt_path)
    return trainer


def fit_sharded(rank: int, folder: Path) -> None:
    two = {"strategy": "fsdp2", "devices": 2}
    first = fit(folder, 1, **two)
    assert all(isinstance(parameter, DTensor) for parameter in first.lightning_module.parameters())
    first.save_checkpoint(folder / "of two.ckpt")
    resumed = fit(folder, 2, folder / "of one.ckpt", **two)
    weights = whole_state(resumed)
    if rank == 0:
        torch.save(weights, folder / "one then two.pt")


def test_a_checkpoint_of_two_shards_resumes_on_one_process_and_the_other_way_round(folder: Path) -> None:
    undisturbed = whole_state(fit(folder, 2))
    one = fit(folder, 1)
    one.save_checkpoint(folder / "of one.ckpt")
    launch(fit_sharded, folder)
    two_then_one = whole_state(fit(folder, 2, folder / "of two.ckpt"))
    one_then_two = torch.load(folder / "one then two.pt")
    assert apart(two_then_one, undisturbed) <= 1e-5
    assert apart(one_then_two, undisturbed) <= 1e-5
    mine, theirs = (torch.load(folder / name, weights_only=True) for name in ("of one.ckpt", "of two.ckpt"))
    assert mine.keys() == theirs.keys()
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    (state,) = theirs["optimizer_states"]
    assert [len(group["params"]) for group in state["param_groups"]] == [3, len(state["state"]) - 3]
    assert state["param_groups"][0]["params"][0] == "scale"
    assert not any("wpe" in name for name in state["state"])
    assert not any("teacher" in name for name in theirs["state_dict"])


def test_a_checkpoint_holds_student_and_optimizer_and_little_else(folder: Path) -> None:
    model = gpt2(128, 300, layers=4)
    trainer = Trainer(**QUIET, max_epochs=1, limit_train_batches=1)
    module = module_of(folder, student=model, teacher=gpt2(256, 300))
    trainer.fit(module, data_of(folder))
    trainer.save_checkpoint(folder / "one.ckpt")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (folder / "one.ckpt").stat().st_size <= 1.05 * 3 * 4 * parameters  # AdamW has two states per parameter


# --------------------------------------------------------------------------------------------------------------------
# The teacher


def load_teachers(rank: int, folder: Path) -> None:
    strategy = FSDP2Strategy()
    trainer = Trainer(**QUIET, strategy=strategy, devices=2, max_epochs=1, limit_train_batches=1)
    trainer.fit(module_of(folder), data_of(folder, batch_size=4))
    mesh = data_parallel_mesh(strategy)
    batch = {key: torch.arange(12).view(2, 6) if key == "input_ids" else torch.ones(2, 6) for key in ("input_ids",)}
    batch["attention_mask"] = torch.ones(2, 6, dtype=torch.long)
    for name in ("gpt2", "llama", "gemma2"):
        reference = AutoModelForCausalLM.from_pretrained(folder / name).eval()
        expected = reference(**batch).logits
        sharded = load_sharded(str(folder / name), mesh, lambda model: SplitModel(model).requires_grad_(False))
        assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in sharded.parameters()), name
        with torch.no_grad():
            found = sharded.eval()(batch)
        assert torch.allclose(found, expected, atol=1e-5), name
    load_old(rank, folder)


def test_a_teacher_is_read_shard_by_shard_or_whole_where_its_weights_have_old_names(folder: Path) -> None:
    from transformers import Gemma2Config, LlamaConfig

    sizes = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    gpt2(24, layers=2).save_pretrained(folder / "gpt2")
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder / "llama")
    AutoModelForCausalLM.from_config(Gemma2Config(**sizes)).save_pretrained(folder / "gemma2", max_shard_size="20KB")
    assert len(list((folder / "gemma2").glob("*.safetensors"))) > 1
    gpt2(24).save_pretrained(folder / "old")
    weights = load_file(folder / "old/model.safetensors")
    renamed = {name.removeprefix("transformer."): value for name, value in weights.items()}
    save_file(renamed, folder / "old/model.safetensors", {"format": "pt"})
    launch(load_teachers, folder)


def load_old(rank: int, folder: Path) -> None:
    trainer = Trainer(**QUIET, strategy="fsdp2", devices=2, max_epochs=1, limit_train_batches=1)
    module = module_of(folder, teacher=str(folder / "old"))
    with pytest.warns(UserWarning, match="every rank reads all of") if rank == 0 else nullcontext():
        trainer.fit(module, data_of(folder, batch_size=4))
    assert all(isinstance(parameter, DTensor) for parameter in module.teacher.model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# The rest of a run on shards


def predict_and_export(rank: int, folder: Path) -> None:
    two = {"strategy": FSDP2Strategy(), "devices": 2}
    export = StudentExport(str(folder / "export"))
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[export], gradient_clip_val=0.4, **two)
    module = module_of(folder, max_new_tokens=6, activation_checkpointing=True)
    data = data_of(folder, batch_size=8)
    trainer.fit(module, data)
    assert module.student.causal_lm.is_gradient_checkpointing
    (tested,) = trainer.test(module, data, verbose=False)
    answers = torch.cat([nn.functional.pad(rows, (0, 6 - rows.shape[1])) for rows in trainer.predict(module, data)])
    weights = whole_state(trainer)
    if rank == 0:
        torch.save({"answers": answers, "weights": weights, "tested": tested}, folder / "found.pt")


def test_predict_test_export_and_activation_checkpointing_on_shards(folder: Path) -> None:
    launch(predict_and_export, folder)
    found = torch.load(folder / "found.pt")
    trainer = Trainer(**QUIET, max_epochs=2, gradient_clip_val=0.4)
    module, data = module_of(folder, max_new_tokens=6), data_of(folder)
    trainer.fit(module, data)
    assert apart(found["weights"], whole_state(trainer)) <= 1e-5
    exported = AutoModelForCausalLM.from_pretrained(folder / "export")
    for name, value in exported.state_dict().items():
        assert torch.equal(value.double(), found["weights"][f"student.model.{name}"]), name
    (tested,) = trainer.test(module, data, verbose=False)
    assert found["tested"] == pytest.approx(tested, rel=1e-4)
    whole = torch.cat([nn.functional.pad(rows, (0, 6 - rows.shape[1])) for rows in trainer.predict(module, data)])
    share = found["answers"]
    assert all(any(torch.equal(row, other) for other in whole) for row in share[:2])


def test_fsdp_wraps_block_by_block() -> None:
    policy = wrapping_policy(gpt2(16, layers=3))
    assert policy._module_classes == {GPT2Block}
    strategy = StrategyRegistry.get("fsdp")
    assert isinstance(strategy, FSDPStrategy)
    with pytest.raises(ValueError, match="requires a GPU"):
        Trainer(**QUIET, strategy="fsdp", devices=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP (version 1) needs a GPU")
def test_fsdp_gives_the_update_of_one_device(folder: Path) -> None:
    settings = {**QUIET, "accelerator": "gpu", "max_epochs": 2, "gradient_clip_val": 0.4, "devices": 1}
    one = Trainer(**settings)
    one.fit(module_of(folder, "sgd"), data_of(folder))
    sharded = Trainer(**settings, strategy="fsdp")
    with mock.patch.dict(os.environ):  # where Lightning leaves the rank of this process
        try:
            sharded.fit(module_of(folder, "sgd"), data_of(folder))
            found = whole_state(sharded)
        finally:
            torch.distributed.destroy_process_group()
    assert apart(found, whole_state(one)) <= 1e-4


def test_the_fsdp2_strategy_has_a_name() -> None:
    strategy = StrategyRegistry.get("fsdp2")
    assert isinstance(strategy, FSDP2Strategy)


# --------------------------------------------------------------------------------------------------------------------
# Several nodes, and a process that dies


def settings_of(folder: Path, **changed: Any) -> dict[str, Any]:
    base = {
        "folder": str(folder), "output": str(folder / "out"), "module": {}, "data": {"batch_size": 8},
        "trainer": {"max_epochs": 2},
    }  # fmt: skip
    return {**base, **changed}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes(folder: Path, strategy: str) -> None:
    trainer = {"max_epochs": 2, "strategy": strategy, "num_nodes": 2, "devices": 1}
    path = folder / "settings.json"
    path.write_text(json.dumps(settings_of(folder, trainer=trainer)))
    port = str(free_port())
    command = [python(), "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--master_addr", "127.0.0.1", "--master_port", port]
    nodes = [
        subprocess.Popen([*command, "--node_rank", str(node), "-m", "tests.distributed.training", str(path)])
        for node in (0, 1)
    ]
    try:
        assert [node.wait(timeout=150) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    found = torch.load(folder / "out/student.pt")
    alone = Trainer(**QUIET, max_epochs=2)
    alone.fit(module_of(folder), data_of(folder))
    assert apart(found, whole_state(alone)) <= 1e-5


LOST_RANK = {
    2: "error: another process of this run died: look at its messages",
    # Lightning looks after its processes every five seconds; where it is the first to see, it ends the run itself.
    -signal.SIGKILL: "[rank: 1] Child process with PID {pid} terminated with code -9",
}
LOST_WORKER = {2: "error: a process that prepares batches died, often for want of memory: lower data.num_workers"}


@pytest.mark.parametrize(
    ("trainer", "workers", "sentences"),
    [
        ({"strategy": "ddp", "devices": 2}, 0, LOST_RANK),
        ({"strategy": "fsdp2", "devices": 2}, 0, LOST_RANK),
        ({}, 1, LOST_WORKER),
    ],
    ids=["rank", "rank, sharded", "worker"],
)
def test_when_a_process_dies_the_run_ends_in_one_sentence(
    folder: Path, trainer: dict[str, Any], workers: int, sentences: dict[int, str]
) -> None:
    path = folder / "settings.json"
    data = {"batch_size": 2, "num_workers": workers}
    settings = settings_of(folder, trainer={"max_epochs": 500, **trainer}, data=data, pace=0.05)
    path.write_text(json.dumps(settings))
    (folder / "out").mkdir()
    process = subprocess.Popen(
        [python(), "-m", "tests.distributed.training", str(path)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(folder / "out/place")
        run = (folder / "out/pid").read_text()
        other: list[int] = []
        until = time.monotonic() + 60
        while not other and time.monotonic() < until:  # a worker begins a little later, and anew with each epoch
            children = Path(f"/proc/{run}/task/{run}/children").read_text().split()
            with suppress(FileNotFoundError):
                other = [int(pid) for pid in children if "tests/commands" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(other[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in sentences
        assert sentences[process.returncode].format(pid=other[0]) in errors and "Traceback" not in errors
    finally:
        process.kill()


def wait_for(path: Path, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
