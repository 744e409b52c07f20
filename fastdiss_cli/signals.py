"""Signals: the first asks to stop at the next good place, a second one stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastdiss_cli import logs

# schedulers send the last one, which not every system has
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
BROKEN_PIPE = 141  # the exit code of what ends by SIGPIPE
CAUGHT = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Stopped(Exception):
    """A signal to any rank has stopped a piece of work between two batches.

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
        signal: its number; 0: none came.
        waiting: nothing is at work but a wait for input, which the signal ends with `Stopped`.
    """

    signal: int = 0
    waiting: bool = False

    @property
    def votes(self) -> list[float]:
        """A 1 at the signal received, among zeros: to be summed over the ranks."""
        return [float(number == self.signal) for number in CAUGHT]


def elected(votes: Sequence[float]) -> int:
    """Return the signal that ranks have received, by their summed votes; 0 if none has."""
    return next((int(n) for n, count in zip(CAUGHT, votes, strict=True) if count), 0)


@contextmanager
def stop_on_signal(stop: Stop, what_comes: str) -> Iterator[None]:
    """Catch the signals: the first is noted in ``stop``, a second leaves at once.

    Args:
        stop: asked between two batches by who works.
        what_comes: what is said of what will happen, as in "saving after this update".
    """

    def handle(number: int, _: Any) -> None:
        if stop.signal:
            raise SystemExit(128 + number)
        stop.signal = number
        if stop.waiting:
            raise Stopped(number)
        logs.info(f"stopping: {what_comes} (again to stop at once)")

    before = [signal.signal(number, handle) for number in CAUGHT]
    try:
        yield
    finally:
        for number, handler in zip(CAUGHT, before, strict=True):
            signal.signal(number, handler)
