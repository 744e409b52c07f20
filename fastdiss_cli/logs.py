"""Messages and progress on stderr: progress bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` and `score` usually log nothing, and should not wait for rich
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

PLAIN_EVERY = 10.0  # seconds between progress lines where stderr is not a terminal
_quiet = False


def quiet() -> None:
    """Log errors only: for all ranks of a distributed run but the first."""
    global _quiet
    _quiet = True


def is_main_process() -> bool:
    """Return whether this process reports what concerns all processes of one command line."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def info(message: str | Text) -> None:
    """Log one line."""
    if not _quiet:
        _print(message)


def warn(message: str) -> None:
    """Log a warning, in one line."""
    if not _quiet:
        _print(f"warning: {message}", "yellow")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as ``1 sentence`` or ``2,000 sentences``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def error(message: str) -> None:
    """Log why the command fails."""
    _print(f"fastdiss: error: {message}", "bold red")


def _print(message: str | Text, style: str | None = None) -> None:
    """Print to stderr; if that fails (full disk, closed pipe), discard all further messages.

    Hours of training are worth more than a log line.
    """
    try:
        _console().print(message, style=style, markup=False)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Bar:
    """A running progress report, updated by `advance`."""

    def __init__(
        self,
        what: str,
        total: int | None,
        done: int,
        bar: Progress | None,
        hidden: bool = False,
    ) -> None:
        self.what, self.total, self.done, self._bar = what, total, done, bar
        # a stream may go on for months, and nobody may read the log
        self._logs = not hidden and total is not None
        self._started = self._reported = self._latest = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first items were done, and how many
        if bar is not None:
            self._task = bar.add_task(
                what, total=total, completed=done, count=self._count(), figures=""
            )

    def advance(self, count: int = 1, **figures: Any) -> None:
        """Count items as done and show the figures, such as ``loss="2.1"``."""
        self.done += count
        if count:
            self._latest = time.monotonic()  # the rate excludes what is between two items now
            self._first = self._first or (self._latest, self.done)  # and start-up
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self._bar is not None:
            shown = {"figures": text} if figures else {}
            self._bar.update(self._task, completed=self.done, count=self._count(), **shown)
        elif self._logs and time.monotonic() - self._reported >= PLAIN_EVERY:
            self._reported = time.monotonic()
            info(f"{self.what} {self._progress()}  {text}".rstrip())

    def expect(self, total: int) -> None:
        """Change the expected number of items."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total, count=self._count())

    def _count(self) -> str:
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"

    def _progress(self) -> str:
        elapsed = time.monotonic() - self._started
        since, before = self._first or (self._started, self.done)
        rate = (self.done - before) / max(self._latest - since, 1e-9)
        left = _clock((self.total - self.done) / rate) if rate else "?"
        share = 100 * self.done / max(self.total, 1)
        return f"{self._count()} ({share:.0f} %), {_clock(elapsed)} < {left}"


@contextmanager
def progress(
    what: str, total: int | None = None, done: int = 0, hidden: bool = False
) -> Iterator[Bar]:
    """Report the progress of some work; other messages may be logged meanwhile.

    Args:
        what: the work, in a word.
        total: the number of items, if known.
        done: how many of them are done already.
        hidden: show nothing, because the results themselves go to the terminal.
    """
    if _quiet or hidden or not _console().is_terminal or _console().is_dumb_terminal:
        yield Bar(what, total, done, None, hidden)
        return
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    def whole() -> Column:  # in a narrow terminal, cut the figures rather than the times
        return Column(no_wrap=True, min_width=7)

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        *([BarColumn(bar_width=24)] if _console().width >= 80 else []),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(whole()),
        TextColumn("<"),
        TimeRemainingColumn(table_column=whole()),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=_console(), transient=True) as bar:
        yield Bar(what, total, done, bar)


@cache
def _console() -> Console:
    from rich.console import Console

    class Stderr(Console):
        def on_broken_pipe(self) -> None:  # rich would exit
            raise BrokenPipeError

    return Stderr(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def stdout_is_terminal() -> bool:
    """Return whether stdout, where the results go, is a terminal."""
    return sys.stdout.isatty()


def stdin_is_terminal() -> bool:
    """Return whether stdin is a terminal, so that somebody has to type the input."""
    return sys.stdin.isatty()


def stdout_is_seen() -> bool:
    """Return whether whoever reads stderr also sees stdout: on a terminal, or in the same file."""
    if stdout_is_terminal():
        return True
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):  # one of them is not a file
        return False


def wants_colour() -> bool:
    """Return whether to colour stdout: it is a terminal with colours, and ``NO_COLOR`` is unset."""
    return (
        stdout_is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
