import signal
import subprocess
import sys
from pathlib import Path

import pytest

from akl_lightning.checkpoint import atomic_folder, free_path
from akl_lightning.errors import UsageError


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
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "model")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "model").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="exists already and is never overwritten"), atomic_folder(tmp_path / "model"):
        pass
    assert free_path(tmp_path / "model") == tmp_path / "model-v1"
