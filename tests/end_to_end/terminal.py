"""What a command leaves on a terminal's screen, control sequences carried out."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07]*\x07|\x1b[()][A-Z0-9]|\x1b[=>78]")


class Screen:
    """A terminal of so many columns, with all that has been scrolled out of it.

    >>> screen = Screen(4)
    >>> screen.feed("abcdef\\r\\nx\\r\\n")
    >>> screen.rows(), screen.lines()
    (['abcd', 'ef', 'x', ''], ['abcdef', 'x', ''])
    >>> screen.feed("\\x1b[1A\\x1b[2K\\rnew")
    >>> screen.rows()
    ['abcd', 'ef', 'new', '']
    """

    def __init__(self, columns: int = 80) -> None:
        self.columns = columns
        self._cells: list[list[str]] = [[]]
        self._wrapped: set[int] = set()
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        """Carry out what was written."""
        place = 0
        while place < len(text):
            if found := _SEQUENCE.match(text, place):
                self._control(found[1] or "", found[2] or "")
                place = found.end()
                continue
            self._write(text[place])
            place += 1

    def rows(self) -> list[str]:
        """Rows as they are seen."""
        return ["".join(cells).rstrip() for cells in self._cells]

    def lines(self) -> list[str]:
        """Lines as they were written, those that had no room in a row put together."""
        joined: list[str] = []
        for number, row in enumerate(self.rows()):
            if number in self._wrapped:
                joined[-1] += row
            else:
                joined.append(row)
        return joined

    def _write(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._down()
        elif character == "\b":
            self._column = max(0, self._column - 1)
        elif character >= " ":
            if self._column == self.columns:
                self._down()
                self._column = 0
                self._wrapped.add(self._row)
            cells = self._cells[self._row]
            cells.extend(" " * (self._column + 1 - len(cells)))
            cells[self._column] = character
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._cells):
            self._cells.append([])

    def _control(self, parameters: str, command: str) -> None:
        count = int(parameters) if parameters.isdigit() else 0
        if command == "A":
            self._row = max(0, self._row - max(1, count))
        elif command == "B":
            for _ in range(max(1, count)):
                self._down()
        elif command == "C":
            self._column += max(1, count)
        elif command == "D":
            self._column = max(0, self._column - max(1, count))
        elif command == "G":
            self._column = max(1, count) - 1
        elif command == "K":
            cells = self._cells[self._row]
            del cells[0 if count == 2 else self._column :]
            self._wrapped.discard(self._row)


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], columns: int = 80, timeout: float = 240
) -> tuple[int, Screen]:
    """Run a command in a pseudo-terminal; its exit code, and the screen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**environment, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written, deadline = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            try:
                part = os.read(ours, 65536)
            except OSError:  # EIO: the last one has closed its side
                break
            if not part:
                break
            written += part
        code = process.wait(timeout=30)
    finally:
        process.kill()
        os.close(ours)
    screen = Screen(columns)
    screen.feed(written.decode(errors="replace"))
    return code, screen
