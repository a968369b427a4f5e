"""The output of ranks: read as it comes, kept for the last word, and shown."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import subprocess
import sys
import termios
from collections import deque
from typing import IO, Literal, TextIO

TAIL_LINES = 40

Shown = Literal["no", "raw", "lines"]
"""How output is shown: not at all, as it is, or by lines that begin with the number of the rank."""

_STREAMS = ("stdout", "stderr")


def say(text: str) -> None:
    """Prints a line of the launcher, on a line of its own."""
    _end_line(sys.stderr)
    _print(f"opensmp run: {text}", sys.stderr)


def say_of(number: int, line: str) -> None:
    """Prints a line of a rank with its number."""
    _print(f"[{number}] {line}", sys.stderr)


class Output:
    """One stream of one rank: the end that is read, the last lines, and what to do with it.

    Args:
        number: The rank.
        name: `"stdout"` or `"stderr"`.
        shown: How to show it.

    Attributes:
        reader: File descriptor from which to read.
        writer: File descriptor for the rank; `release` closes it once the rank has it.
        tail: The last lines.
    """

    def __init__(self, number: int, name: str, shown: Shown) -> None:
        self.number, self.name, self.shown = number, name, shown
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._partial: list[bytes] = []
        self._terminal = shown == "raw" and _is_terminal(self._target)
        if self._terminal:
            self.reader, self.writer = pty.openpty()
            _without_processing(self.writer)
            self.fit()
        else:
            self.reader, self.writer = os.pipe()
        os.set_inheritable(self.reader, False)
        os.set_blocking(self.reader, False)

    @property
    def _target(self) -> TextIO:
        return sys.stdout if self.name == "stdout" else sys.stderr

    def fit(self) -> None:
        """Gives a pseudo-terminal the size of the one on which it is shown."""
        if not self._terminal:
            return
        with contextlib.suppress(OSError, ValueError):
            size = fcntl.ioctl(self._target.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(self.reader, termios.TIOCSWINSZ, size)

    def release(self) -> None:
        """Closes the rank's end in this process."""
        os.close(self.writer)

    def read(self) -> bytes | None:
        """Returns what there is; None if there is nothing yet, and empty at the end."""
        try:
            return os.read(self.reader, 1 << 16)
        except BlockingIOError:
            return None
        except OSError:  # how a pseudo-terminal ends
            return b""

    def close(self) -> None:
        """Shows what is left after the end."""
        os.close(self.reader)
        if self._partial:
            self._take_lines(b"\n")

    def take(self, data: bytes) -> None:
        """Shows data, and keeps the last lines."""
        if self.shown == "raw":
            _write(data, self._target)
        self._take_lines(data)

    def _take_lines(self, data: bytes) -> None:
        # Progress bars end their lines with a carriage return.
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        rest = lines.pop()
        if lines:
            lines[0] = b"".join([*self._partial, lines[0]])
            self._partial.clear()
        if rest:
            self._partial.append(rest)
        for line in lines:
            text = line.decode(errors="replace")
            self.tail.append(text)
            if self.shown == "lines":
                _print(f"[{self.number}] {text}" if text else f"[{self.number}]", self._target)


def outputs(number: int, shown: Shown) -> dict[str, Output]:
    """Returns both streams of a rank, by name."""
    return {name: Output(number, name, shown) for name in _STREAMS}


def started(
    command: list[str], streams: dict[str, Output], **arguments: object
) -> subprocess.Popen[bytes]:
    """Starts a process that writes to these streams."""
    try:
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            command,
            stdin=subprocess.DEVNULL,
            stdout=streams["stdout"].writer,
            stderr=streams["stderr"].writer,
            **arguments,
        )
    finally:
        for stream in streams.values():
            stream.release()


def _without_processing(terminal: int) -> None:
    """Leaves line ends to the terminal on which the output is shown in the end."""
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)


def _is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty() and stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False


_is_inside_line = False  # where the last output of a rank that is shown as it is has ended


def _end_line(stream: TextIO) -> None:
    global _is_inside_line
    if _is_inside_line:
        _is_inside_line = False
        print(file=stream)


def _write(data: bytes, stream: TextIO) -> None:
    global _is_inside_line
    if not data:
        return
    _is_inside_line = not data.endswith((b"\n", b"\r"))
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(data.decode(errors="replace"))
    else:
        stream.flush()
        buffer.write(data)
    stream.flush()


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        text = text.encode(encoding, errors="backslashreplace").decode(encoding)
        print(text, file=stream, flush=True)
