"""What a command says, and how it ends: plain lines, one message for what goes wrong, a documented exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from searchspace.errors import printable

EXIT_BAD_INPUT, EXIT_HALTED, EXIT_INTERRUPTED = 2, 3, 130  # documented in docs/search.md


class TerminalConsole(Console):
    """Leaves a reader that is gone to the command; the library would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def say(console: Console, text: str) -> None:
    """Print a line as it is: names and paths are no markup, and steer no terminal."""
    console.print(printable(text), markup=False, highlight=False)


def fail(message: str, code: int, error: BaseException) -> NoReturn:
    """End the command with one message."""
    with suppress(OSError):
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    try:
        sys.stdout.flush()
    except OSError:
        silence()
    raise typer.Exit(code) from error


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Note every SIGINT on its way: in the midst of an import, a library may make another exception of it."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def silence() -> None:
    """Nobody reads what is left to be printed, or it can't be written."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def told(error: OSError | MemoryError | RuntimeError) -> tuple[str, int] | None:
    """Message and exit code for what the machine refused; None for what is a fault of ours."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError) or "allocate memory" in text or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text}", EXIT_HALTED
    if isinstance(error, OSError):
        where = f"{error.filename}: " if isinstance(error.filename, str | Path) else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{where}the disk is full; make room, and run the command again", EXIT_HALTED
        what = printable(error.strerror or text)
        return f"{where}{what[:1].lower()}{what[1:]}; choose a place that can be read and written", EXIT_BAD_INPUT
    if any(word in text for word in ("CUDA", "cuda", "NVIDIA", "accelerator")):
        return f"the device can't be used: {text}; use --device cpu, or gpus_per_trial: 0", EXIT_BAD_INPUT
    return None


class _Tolerant(io.TextIOBase):
    """A stream that drops what can't be written: nobody may be reading what a search prints, and it goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.broken = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        if not self.broken:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):
                self.broken = True
        return len(text)

    def flush(self) -> None:
        if not self.broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self.broken = True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextmanager
def unheard() -> Iterator[None]:
    """Let a long command go on when its output can't be written."""
    stream = _Tolerant(sys.stdout)
    try:
        with redirect_stdout(stream):
            yield
            stream.flush()
    finally:
        if stream.broken:
            silence()
