"""The figures of training: means over a window of updates, and their logs."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from fastdiss_cli import logs
from fastdiss_cli.extras import load_extra


class Window:
    """Means and speed over the updates since the last line of the log.

    Args:
        state: `state` of the window that a resumed run goes on with.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.sums: dict[str, float] = dict(state.get("sums", {}))
        self.updates, self.tokens = state.get("updates", 0), 0.0
        self.seconds, self._since = 0.0, time.monotonic()

    def add(self, figures: dict[str, float], tokens: float) -> None:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        if not all(map(math.isfinite, figures.values())):  # skipped
            return
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.updates, self.tokens = self.updates + 1, self.tokens + tokens

    def restart_clock(self) -> None:
        """Do not count the time since the last update."""
        self._since = time.monotonic()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run logs what an unbroken one does."""
        return {"sums": self.sums, "updates": self.updates}

    @property
    def loss(self) -> float:
        return self.sums.get("loss", math.nan) / max(self.updates, 1)

    @property
    def speed(self) -> float:
        """Target tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        means = {name: total / self.updates for name, total in self.sums.items()}
        return {**means, "tokens_per_second": self.speed, "seconds": self.seconds}


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, in the order of updates.

    Args:
        path: the file.
        after: lines of later updates, which a resumed run will do again, are removed. None: a new
            training; a file that is already there belongs to another one, and is renamed.
        validation_due: a validation after that very update will be done again, too.
        active: whether this process writes; only one of a distributed run does.
    """

    def __init__(self, path: Path, after: int | None, validation_due: bool, active: bool) -> None:
        self.path, self.active = path, active
        self._unwritten = ""
        if active and path.exists() and after is None:
            names = (f".old{n or ''}.jsonl" for n in count())
            before = next(p for name in names if not (p := path.with_suffix(name)).exists())
            logs.warn(f"{path} is of another training, and becomes {before}")
            os.replace(path, before)
        elif active and path.exists():
            lines = path.read_text("utf-8", "replace").splitlines()
            kept = [line for line in lines if _keep(line, after, validation_due)]
            aside = path.with_name(f".{path.name}.tmp")
            aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(aside, path)

    def write(self, figures: dict[str, Any]) -> None:
        """Append a line; what cannot be written now is written along with the next line.

        A figure that is not finite, for which JSON has no number, is null.
        """
        if not self.active:
            return
        known = {n: None if _is_broken(value) else value for n, value in figures.items()}
        self._unwritten += json.dumps(known, allow_nan=False) + "\n"
        size = None
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                rest = self._unwritten.encode()
                while rest:  # a disk that fills up takes a part, and refuses the next
                    rest = rest[file.write(rest) :]
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)  # no half line for the next to be glued to
            logs.warn(f"{self.path}: cannot write: {error.strerror}; trying again with the next")
        else:
            self._unwritten = ""


class Events:
    """Event files for TensorBoard: every figure of the log as a curve ``split/name`` by update.

    Args:
        folder: where they go.
        after: events of later updates, which a resumed run will do again, are not shown.

    Raises:
        FastdissError: the package is not installed.
    """

    def __init__(self, folder: Path, after: int) -> None:
        module = load_extra("torch.utils.tensorboard", "tensorboard", "train.tensorboard")
        self.folder = folder
        self._writer = module.SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, update: int, figures: dict[str, Any]) -> None:
        """Add the figures of an update; they are lost, with a warning, where the disk is full."""
        split, *curves = figures.items()
        try:
            for name, value in curves:
                self._writer.add_scalar(f"{split[1]}/{name}", value, update)
            self._writer.flush()
        except OSError as error:
            logs.warn(f"{self.folder}: cannot write: {error.strerror}")


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _keep(line: str, after: int, validation_due: bool) -> bool:
    """Tell whether a line stays in a resumed run; one that a kill left half written does not."""
    try:
        figures = json.loads(line)
        again = validation_due and figures["split"] == "valid"
        return figures["update"] < after + (not again)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
