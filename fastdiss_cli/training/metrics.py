"""The figures of training: means over a window of updates, and the log ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any


class Window:
    """Means and speed over the updates since the last line of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.updates, self.tokens = 0, 0.0
        self.seconds, self._since = 0.0, time.monotonic()

    def add(self, figures: dict[str, float], tokens: float) -> None:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        if not math.isfinite(figures["grad_norm"]):  # skipped: its loss may be no number either
            return
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.updates, self.tokens = self.updates + 1, self.tokens + tokens

    def restart_clock(self) -> None:
        """Do not count the time since the last update."""
        self._since = time.monotonic()

    @property
    def loss(self) -> float:
        return self.sums.get("loss", math.nan) / max(self.updates, 1)

    @property
    def speed(self) -> float:
        """Target tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        means = {name: total / self.updates for name, total in self.sums.items()}
        return {**means, "tokens_per_second": self.speed, "seconds": self.seconds}


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, in the order of updates.

    Args:
        path: the file.
        after: lines of later updates, which a resumed run will do again, are removed.
        active: whether this process writes; only one of a distributed run does.
    """

    def __init__(self, path: Path, after: int, active: bool) -> None:
        self.path, self.active = path, active
        if active and path.exists():
            kept = [
                line
                for line in path.read_text("utf-8", "replace").splitlines()
                if _update(line) <= after
            ]
            aside = path.with_name(f".{path.name}.tmp")
            aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(aside, path)

    def write(self, figures: dict[str, Any]) -> None:
        if self.active:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")


def _update(line: str) -> float:
    """Return the update of a line; one that a kill left half written belongs to none."""
    try:
        return float(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
