"""Commands in processes of their own that start at once: forked from one that has done the imports.

A command that imports torch, transformers and Lightning needs six seconds of a core for it, whatever it does then. The
stand-ins for ``python``, ``akl`` and ``torchrun`` in the folder :func:`warm` take the same arguments and are started,
waited for and killed in the same ways, from Python or from a shell. A stand-in (``client.py``) hands its arguments,
folder, environment, input and outputs to a server (``server.py``), which forks; the fork is the command, and the
stand-in ends as it does.
"""

import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


def python() -> str:
    """What starts in the place of ``sys.executable``."""
    return str(warm() / "python")


def warm() -> Path:
    """The folder of ``python``, ``akl`` and ``torchrun``."""
    return _server()[0]


@cache
def _server() -> tuple[Path, subprocess.Popen[bytes]]:
    """Started when it is first needed; it ends, and removes its folder, when this process and so its input ends."""
    folder = Path(tempfile.mkdtemp(prefix="akl-commands-"))
    akl = Path(sys.executable).with_name("akl")
    for name, first in (("python", ""), ("akl", akl), ("torchrun", "-m torch.distributed.run")):
        client = f"{sys.executable} -SE {HERE}/client.py {folder}/socket {first}"
        (folder / name).write_text(f'#!/bin/sh\nexec {client} "$@"\n')
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        command = [sys.executable, str(HERE / "server.py"), str(listener.fileno()), str(folder)]
        return folder, subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
