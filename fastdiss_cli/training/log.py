"""The figures of a training run: means over a window of updates, and the files they go to."""

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
from fastdiss_cli.data.files import write_whole
from fastdiss_cli.extras import load_extra


class Window:
    """Means and speed over the updates since the last line of the log.

    Args:
        state: the `state` of the window that a resumed run continues.
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
        # in the order of the figures, which a checkpoint does not keep
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in figures.items()}
        self.updates, self.tokens = self.updates + 1, self.tokens + tokens

    def restart_clock(self) -> None:
        """Exclude the time since the last update."""
        self._since = time.monotonic()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint stores so that a resumed run logs the same as an uninterrupted one."""
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
        after: the update to resume after; lines of later updates, which will be repeated, are
            removed. None: a new training; an existing file belongs to another one, and is renamed.
        validation_due: whether a validation after that very update will be repeated, too.
        active: whether this process writes; only the first rank does.
    """

    def __init__(self, path: Path, after: int | None, validation_due: bool, active: bool) -> None:
        self.path, self.active = path, active
        self._unwritten = ""
        if active and path.exists() and after is None:
            names = (f".old{n or ''}.jsonl" for n in count())
            backup = next(p for name in names if not (p := path.with_suffix(name)).exists())
            logs.warn(f"{path} belongs to another training, and is renamed to {backup}")
            os.replace(path, backup)
        elif active and path.exists():
            lines = path.read_text("utf-8", "replace").splitlines()
            kept = [line for line in lines if _keep(line, after, validation_due)]
            write_whole(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, figures: dict[str, Any]) -> None:
        """Append a line; a line that cannot be written now is retried with the next one.

        Non-finite figures, which JSON has no numbers for, become null.
        """
        if not self.active:
            return
        row = {n: None if _is_non_finite(value) else value for n, value in figures.items()}
        self._unwritten += json.dumps(row, allow_nan=False) + "\n"
        size = None
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                rest = self._unwritten.encode()
                while rest:  # a disk that is nearly full writes a part, then fails
                    rest = rest[file.write(rest) :]
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)  # leave no partial line behind
            logs.warn(f"{self.path}: cannot write: {error.strerror}; retrying with the next line")
        else:
            self._unwritten = ""


class Events:
    """Event files for TensorBoard: every figure of the log as a curve ``split/name`` by update.

    Args:
        folder: where they go.
        after: the update to resume after; events of later ones, which will be repeated, are hidden.

    Raises:
        FastdissError: the package is not installed.
    """

    def __init__(self, folder: Path, after: int) -> None:
        module = load_extra("torch.utils.tensorboard", "tensorboard", "train.tensorboard")
        self.folder = folder
        self._writer = module.SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, update: int, figures: dict[str, Any]) -> None:
        """Add the figures of an update; if the disk is full they are lost, with a warning."""
        split, *curves = figures.items()
        try:
            for name, value in curves:
                self._writer.add_scalar(f"{split[1]}/{name}", value, update)
            self._writer.flush()
        except OSError as error:
            logs.warn(f"{self.folder}: cannot write: {error.strerror}")


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _keep(line: str, after: int, validation_due: bool) -> bool:
    """Return whether a resumed run keeps a line; it drops one that a kill left half written."""
    try:
        figures = json.loads(line)
        repeated = validation_due and figures["split"] == "valid"
        return figures["update"] < after + (not repeated)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
