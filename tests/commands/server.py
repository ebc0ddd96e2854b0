"""``server.py HANDLE FOLDER``: do the imports, then fork for every command that is asked for at the socket."""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
import types
from contextlib import suppress
from typing import Any

IMPORTS = (
    "akl_lightning.cli",
    "akl_lightning.evaluation.judge",
    "matplotlib.backends.backend_agg",
    "tensorboard.compat.tensorflow_stub",
    "torch.utils.tensorboard",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)


def receive(connection: socket.socket) -> dict[str, Any]:
    size, handles, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as stream:
        return {**json.loads(stream.read(int.from_bytes(size))), "handles": handles}


def serve(listener: socket.socket, stand_ins: str) -> dict[str, Any]:
    """Fork for every command. Returns the request in the fork, and in the server never."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    running: set[int] = set()
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:  # closed: the tests are over
                shutil.rmtree(stand_ins)
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                try:
                    request = receive(connection)
                except (OSError, ValueError):  # the stand-in was killed before it had said what it wants
                    connection.close()
                    continue
                fork = os.fork()
                if fork == 0:
                    return request
                for handle in request["handles"]:
                    os.close(handle)
                running.add(fork)
                with suppress(OSError):
                    connection.sendall(f"{fork}\n".encode())
                selector.register(connection, selectors.EVENT_READ, fork)
                selector.register(os.pidfd_open(fork), selectors.EVENT_READ, (fork, connection))
            elif isinstance(key.fileobj, socket.socket):  # closed: the stand-in has ended or was killed
                selector.unregister(key.fileobj)
                key.fileobj.close()
                if key.data in running:
                    os.kill(key.data, signal.SIGKILL)
            else:  # a fork has ended
                selector.unregister(key.fileobj)
                os.close(key.fd)
                fork, connection = key.data
                running.remove(fork)
                code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
                with suppress(OSError):
                    connection.sendall(f"{code}\n".encode())


def become(python: str, argv: list[str], folder: str, environment: dict[str, str], handles: list[int]) -> None:
    """Be ``python`` with these arguments."""
    for target, handle in enumerate(handles):
        os.dup2(handle, target)
        os.close(handle)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = python  # for the processes that the command starts
    # Lightning looks at these when it is imported.
    rank_zero_only.rank = int(environment.get("RANK") or environment.get("LOCAL_RANK") or 0)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    match argv[1:] if argv[0] == "-u" else argv:
        case ["-c", code, *arguments]:
            sys.argv, sys.path[:1] = ["-c", *arguments], ["", *paths]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(code, main.__dict__)
        case ["-m", module, *arguments]:
            sys.argv, sys.path[:1] = [module, *arguments], [folder, *paths]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *arguments]:
            sys.argv, sys.path[:1] = [script, *arguments], [os.path.dirname(os.path.abspath(script)), *paths]
            runpy.run_path(script, run_name="__main__")


def end(code: int | str | None) -> None:
    """End as Python does, but for taking 5,000 modules apart, which takes two seconds."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    for name in IMPORTS:
        importlib.import_module(name)
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    gc.collect()
    gc.freeze()  # no fork copies the pages of what it never changes, only to count references
    _, handle, stand_ins = sys.argv
    with socket.socket(fileno=int(handle)) as listener:
        request = serve(listener, stand_ins)
    try:
        become(os.path.join(stand_ins, "python"), **request)
    except SystemExit as ended:
        end(ended.code)
    except BaseException as error:
        traceback.print_exc()
        end(-signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)
    end(0)
