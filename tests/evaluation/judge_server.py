"""An endpoint for chat completions on the loopback, and what it is asked about."""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def completion(text: Any, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 320}
    return {"object": "chat.completion", "model": "ruler-1", "choices": [choice], "usage": usage, **more}


def rate(request: dict[str, Any]) -> dict[str, Any]:
    """A judge to whom the longer answer is the better one, and the first a little better than the second."""
    text = request["messages"][1]["content"]
    first, second = (
        text.split(f"[The Start of Assistant {number}'s Answer]\n")[1].split(f"\n\n[The End of Assistant {number}'s")[0]
        for number in (1, 2)
    )
    return completion(f"{min(2 + len(first.split()), 10)} {1 + len(second.split())}\nBecause of the words.")


Behaviour = Callable[["Handler", dict[str, Any], int], Any]
"""Gets the handler, the request and its number from 0; gives what to send as JSON, or None where it sent something."""


class Server(ThreadingHTTPServer):
    """Notes what it is asked, when, and how much at once."""

    daemon_threads = True

    def __init__(self, behave: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.times: list[float] = []
        self.now = self.most = 0
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body behind its header would wait for the client's acknowledgement
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.guard:
            number = len(server.requests)
            server.requests.append(request)
            server.headers.append(self.headers)
            server.times.append(time.monotonic())
            server.now += 1
            server.most = max(server.most, server.now)
        self.counted = True
        try:
            if self.path != "/v1/chat/completions":
                self.send(404, {"error": {"message": "no such path"}})
            elif (answer := server.behave(self, request, number)) is not None:
                self.send(200, answer)
        finally:
            self.done()

    def done(self) -> None:
        """The request is not on the way any more; the client may send the next one once it has the answer."""
        with self.server.guard:
            self.server.now -= self.counted
        self.counted = False

    def send(self, status: int, body: Any, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.done()
        self.wfile.write(content)

    def drop(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def well(handler: Handler, request: dict[str, Any], number: int) -> Any:
    return rate(request)


def write(path: Path, answers: Sequence[str], seeds: Sequence[int | None] | None = None) -> str:
    seeds = seeds or [None] * len(answers)
    records = [
        {
            "instruction": f"Say {index}",
            "input": "",
            "prompt": f"Say {index}:",
            "references": [],
            "answer": answer,
            "seed": seed,
        }
        for index, (answer, seed) in enumerate(zip(answers, seeds, strict=True))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
