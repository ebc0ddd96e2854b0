"""Stand-ins behave as the programs do, as far as tests can tell."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.start import python, warm


def run(*arguments: str, program: str | None = None, folder: Path | None = None) -> tuple[int, str, str]:
    result = subprocess.run(
        [program or python(), *arguments], cwd=folder, input="in\n", capture_output=True, text=True, timeout=60
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "print(sys.argv, input()); sys.exit()",
        "sys.exit(3)",
        "sys.exit('a reason')",
        "print('out', file=sys.stderr); sys.exit(0)",
        "import atexit, threading; atexit.register(print, 2); threading.Timer(0.1, print, [1]).start()",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print, args=[1]); p.start(); p.join()",
    ],
)
def test_it_ends_as_python_does(code: str, tmp_path: Path) -> None:
    code = f"import sys; {code}"
    assert run("-c", code, "a", "b") == run("-c", code, "a", "b", program=sys.executable)
    (tmp_path / "script.py").write_text(code)
    for how in (["script.py"], ["-m", "script"]):
        assert run(*how, folder=tmp_path) == run(*how, program=sys.executable, folder=tmp_path)


def test_an_error_is_shown() -> None:
    code, _, errors = run("-c", "raise ValueError('this')")
    assert code == 1 and errors.startswith("Traceback") and errors.endswith("ValueError: this\n")


def test_it_and_what_it_starts_are_what_they_stand_for(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; print(sys.executable, flush=True); subprocess.run([sys.executable, '-c', 'print(1)'])"
    )
    assert run("-c", code)[1] == f"{python()}\n1\n"
    (tmp_path / "beside.py").write_text("name = 'beside'")
    (tmp_path / "script.py").write_text("import beside, os; print(beside.name, os.getcwd(), __name__)")
    assert run(str(tmp_path / "script.py"))[1] == f"beside {Path.cwd()} __main__\n"
    assert (
        "{fit,validate,test,predict,cache,generate,judge,show,tokenizers}"
        in run("--help", program=str(warm() / "akl"))[1]
    )
    code = "import os; print(os.environ['RANK'])"
    command = ["--standalone", "--nproc_per_node", "2", "--no-python", python(), "-c", code]
    assert set(run(*command, program=str(warm() / "torchrun"))[1].split()) == {"0", "1"}


def test_it_has_the_files_that_it_was_given() -> None:
    read, write = os.pipe()
    subprocess.run([python(), "-c", f"import os; os.write({write}, b'here')"], pass_fds=[write], timeout=60, check=True)
    assert os.read(read, 4) == b"here"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [python(), "-c", "import time; print(1, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    process.send_signal(number)
    process.communicate(timeout=20)  # nothing has its output any more
    assert process.returncode == -number
