"""Signals: the first one stops at the next safe point, a second one at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastdiss_cli import logs

# SIGUSR1 is sent by schedulers, and missing on some systems
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
BROKEN_PIPE = 141  # the exit code of a process that SIGPIPE ends
CAUGHT = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Stopped(Exception):
    """Work was stopped between two batches, by a signal to any rank.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@dataclass
class Stop:
    """The signal that asked this process to stop.

    Attributes:
        signal: its number; 0: none was received.
        waiting: true while waiting for input, when a signal raises `Stopped` at once.
    """

    signal: int = 0
    waiting: bool = False

    @property
    def votes(self) -> list[float]:
        """The received signal as a one-hot vector over `CAUGHT`, to be summed over the ranks."""
        return [float(number == self.signal) for number in CAUGHT]


def elected(votes: Sequence[float]) -> int:
    """Return the signal that any rank received, from the summed votes; 0 if none did."""
    return next((int(n) for n, count in zip(CAUGHT, votes, strict=True) if count), 0)


@contextmanager
def stop_on_signal(stop: Stop, what_comes: str) -> Iterator[None]:
    """Catch signals: the first is recorded in ``stop``, a second one exits at once.

    Args:
        stop: checked between two batches.
        what_comes: what happens next, for the log, as in "saving after this update".
    """

    def handle(number: int, _: Any) -> None:
        if stop.signal:
            raise SystemExit(128 + number)
        stop.signal = number
        if stop.waiting:
            raise Stopped(number)
        with suppress(RuntimeError):  # the signal interrupted the writing of another line
            logs.info(f"stopping: {what_comes} (again to stop at once)")

    # a shell ignores SIGINT for what a script starts in the background: so it stays
    ignored = [number for number in CAUGHT if signal.getsignal(number) is signal.SIG_IGN]
    before = {n: signal.signal(n, handle) for n in CAUGHT if n not in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
