import copy
import os
import pickle
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from transformers import AutoModelForCausalLM

from akl_lightning.callbacks import LastCheckpoint
from akl_lightning.checkpoint import (
    atomic_file,
    atomic_folder,
    claim_file,
    claim_folder,
    free_path,
    key_by_name,
)
from akl_lightning.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_causal_lm
from akl_lightning.module import DistillationModule
from tests.commands.start import python
from tests.conftest import QUIET, Bigram, gpt2
from tests.distributed.training import prepare


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_nothing_at_the_path(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from akl_lightning.checkpoint import atomic_folder\n"
        "with atomic_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights').write_text('half')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([python(), "-c", script, str(tmp_path / "model")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "model").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="exists already and is never overwritten"), atomic_folder(tmp_path / "model"):
        pass
    assert free_path(tmp_path / "model") == tmp_path / "model-v1"
    (tmp_path / "figure.png").touch()
    assert free_path(tmp_path / "figure.png") == tmp_path / "figure-v1.png"


def test_a_file_is_whole_or_the_one_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_start_together_claim_different_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with ThreadPoolExecutor(16) as starters:
        folders = list(starters.map(claim_folder, [tmp_path / "run"] * 16))
        files = list(starters.map(claim_file, [tmp_path / "plot.png"] * 16))
    assert len(set(folders)) == len(set(files)) == 16 and tmp_path / "run" not in folders
    assert all(folder.is_dir() for folder in folders) and all(file.is_file() for file in files)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write to .*file: .*choose another folder"):
        claim_folder(tmp_path / "file/run")


def test_only_what_dead_processes_have_left_is_removed(tmp_path: Path) -> None:
    host = socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        f".last.ckpt.{host}-{ended.pid}.abcdefgh": False,
        f".last.ckpt.{host}-{os.getpid()}.abcdefgh": False,  # of a container's process of the same number
        f".last.ckpt.{host}-{os.getppid()}.abcdefgh": True,
        ".last.ckpt.elsewhere-1.abcdefgh": True,
        ".last.ckpt.lock": True,
        ".last.ckpt-v1.ckpt.abcdefgh": True,
    }
    for name in names:
        (tmp_path / name).touch()
    for name in (".last.ckpt.elsewhere-2.abcdefgh", ".last.ckpt.abcdefgh"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    with atomic_file(tmp_path / "last.ckpt") as file:
        assert f"-{os.getpid()}." in file.name
    stay = {name for name, stays in names.items() if stays}
    assert {path.name for path in tmp_path.iterdir()} == stay | {"last.ckpt"}
    (tmp_path / f".model.{host}-{ended.pid}.abcdefgh").mkdir()
    (tmp_path / f".model.{host}-{os.getppid()}.abcdefgh").mkdir()
    with atomic_folder(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.glob(".model*")] == [f".model.{host}-{os.getppid()}.abcdefgh"]


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_survives(tmp_path: Path) -> None:
    script = (
        "import pathlib, resource, sys, torch\n"
        "from akl_lightning.checkpoint_io import AtomicCheckpointIO\n"
        "from akl_lightning.cli import run_command\n"
        "io, path = AtomicCheckpointIO(), pathlib.Path(sys.argv[1])\n"
        "state = lambda n: {'state_dict': {'w': torch.ones(n)}, 'pytorch-lightning_version': '2'}\n"
        "io.save_checkpoint(state(10), path)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "run_command(lambda: io.save_checkpoint(state(1_000_000), path))\n"
    )
    path = tmp_path / "last.ckpt"
    result = subprocess.run([python(), "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: cannot write {path}: File too large; the one that was there before")
    assert result.stderr.count("\n") == 1
    assert AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["w"].numel() == 10
    assert list(tmp_path.iterdir()) == [path]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def spoil(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no checkpoint at all")
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif how == "zip":
        torch.save({"state_dict": Evil(), "pytorch-lightning_version": "2"}, path)
    elif how == "foreign":
        torch.save({"weights": torch.ones(3)}, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "is damaged, cut off"),
        ("empty", "is damaged, cut off"),
        ("text", "is damaged, cut off or no checkpoint"),
        ("pickle", "is damaged, cut off or no checkpoint"),
        ("zip", "holds more .* is never run"),
        ("foreign", "is no checkpoint of Lightning"),
        ("gone", "is no file"),
    ],
)
def test_a_bad_checkpoint_is_named_and_a_good_one_offered(
    tmp_path: Path, data: InstructionDataModule, how: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    for name in ("old", "good", "last"):
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (len(name), {"old": 1, "good": 2, "last": 3}[name]))
    (tmp_path / "last.ckpt").unlink() if how == "gone" else spoil(tmp_path / "last.ckpt", how)
    with pytest.raises(UsageError, match=rf"last.ckpt ({message}).*go on from .*good.ckpt"):
        Trainer(**QUIET, max_epochs=2).fit(
            DistillationModule(gpt2(16), gpt2(24)), data, ckpt_path=tmp_path / "last.ckpt"
        )
    assert not (tmp_path / "ran").exists()


def test_the_last_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    def found() -> Path:
        return newest_checkpoint(tmp_path, tmp_path.rglob("checkpoints"))

    def write(name: str, time: int) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        os.utime(path, (time, time))
        return path

    with pytest.raises(UsageError, match=f"there is no checkpoint to go on from in {tmp_path}:"):
        found()
    last = write("b/checkpoints/last.ckpt", 2)
    assert found() == last
    write("a/checkpoints/last.ckpt", 1)
    assert found() == last
    write("b/checkpoints/epoch=2.ckpt", 3)
    assert found() == last, "the best may have been written within a step"
    write("c/checkpoints/epoch=1.ckpt", 4)
    newest = write("c/checkpoints/epoch=2.ckpt", 5)
    assert found() == newest, "another run, without last.ckpt"


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_checkpoint_of_another_student_is_refused(verb: str, tmp_path: Path, data: InstructionDataModule) -> None:
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for student, name in ((gpt2(24), "model.transformer.wte.weight"), (gpt2(16, layers=2), "model.transformer.h.1")):
        with pytest.raises(UsageError, match=f"is of another student, they differ in {name}.*: give model.student"):
            getattr(Trainer(**QUIET, max_epochs=1), verb)(
                DistillationModule(student, gpt2(24)), datamodule=data, ckpt_path=tmp_path / "one.ckpt"
            )


class Remembering(Bigram):
    """A student with a state that is no tensor."""

    remembered = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"remembered": 7}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.remembered = state["remembered"]


def test_a_state_that_is_no_tensor_comes_back(tmp_path: Path, data: InstructionDataModule) -> None:
    trainer = Trainer(**QUIET, max_steps=1)
    trainer.fit(DistillationModule(Remembering(), Bigram()), data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Remembering()
    Trainer(**QUIET, max_steps=2).fit(DistillationModule(resumed, Bigram()), data, ckpt_path=tmp_path / "one.ckpt")
    assert resumed.remembered == 7


def two_groups(first: str) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    torch.manual_seed(2)
    module = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("a", "frozen", "b")})
    module["frozen"].requires_grad_(False)
    groups = [
        {"params": list(module[name].parameters()), "lr": {"a": 0.1, "b": 0.2}[name]}
        for name in (first, {"a": "b", "b": "a"}[first])
    ]
    optimizer = torch.optim.AdamW(groups)
    key_by_name(optimizer, module)
    return module, optimizer


def step(module: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    (module["a"](torch.ones(1, 3)).square().sum() + module["b"](torch.ones(1, 3)).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizer_states_go_by_names_whatever_the_order_of_groups() -> None:
    module, optimizer = two_groups("a")
    step(module, optimizer)
    state = optimizer.state_dict()
    assert set(state["state"]) == {"a.weight", "b.weight"}
    assert [group["params"] for group in state["param_groups"]] == [["a.weight"], ["b.weight"]]
    other, its = two_groups("b")
    other.load_state_dict(module.state_dict())
    its.load_state_dict(copy.deepcopy(state))
    assert [group["lr"] for group in its.param_groups] == [0.2, 0.1]
    step(module, optimizer)
    step(other, its)
    for name in ("a", "b"):
        assert torch.equal(module[name].weight, other[name].weight)
    other["frozen"].requires_grad_(True)
    its.add_param_group({"params": list(other["frozen"].parameters())})
    with pytest.raises(UsageError, match=r"disagree on 'frozen.weight'"):
        its.load_state_dict(state)


def test_states_by_position_are_taken_too() -> None:
    module, optimizer = two_groups("a")
    step(module, optimizer)
    plain = torch.optim.AdamW([{"params": list(module[name].parameters())} for name in ("a", "b")])
    plain.load_state_dict({**(by_name := optimizer.state_dict()), **_by_position(by_name)})
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state_dict()["state"].keys() == by_name["state"].keys()


def _by_position(state: dict[str, Any]) -> dict[str, Any]:
    names = [name for group in state["param_groups"] for name in group["params"]]
    return {
        "state": {names.index(name): value for name, value in state["state"].items()},
        "param_groups": [{**g, "params": [names.index(n) for n in g["params"]]} for g in state["param_groups"]],
    }


# --------------------------------------------------------------------------------------------------------------------
# What is in a checkpoint


def test_load_from_checkpoint_names_a_teacher_that_has_moved(tmp_path: Path, data: InstructionDataModule) -> None:
    prepare(tmp_path, data.tokenizer)
    trainer = Trainer(**QUIET, max_epochs=1)
    module = DistillationModule(str(tmp_path / "student"), str(tmp_path / "teacher"))
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    for mine, theirs in zip(loaded.student.parameters(), module.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"cannot load the teacher '.*teacher'"):
        DistillationModule.load_from_checkpoint(tmp_path / "one.ckpt")
    moved = DistillationModule.load_from_checkpoint(tmp_path / "one.ckpt", teacher=str(tmp_path / "moved"))
    assert moved.teacher is not None and moved.teacher.vocab_size == len(data.tokenizer)


def test_no_secret_reaches_a_checkpoint(
    tmp_path: Path, data: InstructionDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_verysecrettoken"
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    callbacks = [LastCheckpoint(tmp_path / "checkpoints")]
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": True, "logger": True},
        max_epochs=1,
        callbacks=callbacks,
        default_root_dir=tmp_path,
    )
    trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "last.ckpt" for path in files) and any("hparams" in path.name for path in files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_pickled_weights_of_a_model_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpt2(16).save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises((UsageError, pickle.UnpicklingError)):
        load_causal_lm(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path: Path) -> None:
    gpt2(16).save_pretrained(tmp_path / "model")
    config = (tmp_path / "model/config.json").read_text()
    own = '{"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}, "model_type": "own",'
    (tmp_path / "model/config.json").write_text(config.replace("{", own, 1).replace('"model_type": "gpt2"', '"was": 1'))
    (tmp_path / "model/own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UsageError, match="trust_remote_code: true"):
        DistillationModule(str(tmp_path / "model"), gpt2(24))
    with pytest.raises(SystemExit, match="ran"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
