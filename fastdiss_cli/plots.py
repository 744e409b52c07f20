"""Plots: quality against steps and speed, and training curves.

They have a white background, to be readable on dark pages too. Curves differ in colour (the palette
of Okabe and Ito, for every kind of colour vision), marker and dash pattern (for greyscale print).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiss_cli.data.files import write_whole
from fastdiss_cli.errors import FastdissError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastdiss_cli.decoding.systems import Figures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX*"  # one more than colours, so that combinations repeat late
LONGEST_LABEL = 60  # characters
DASHES = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)))
TITLES = {
    "bleu": "validation BLEU",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "target tokens/s",
    "mse": "mse: embeddings",
    "anchor": "anchor: tokens (nats)",
    "length": "length (nats)",
    "nll": "nll: tokens (nats)",
}
NO_CURVE = {"update", "epoch", "seconds"}
LINEAR = {"bleu", "lr", "tokens_per_second"}


@dataclass
class Point:
    """A scored generate file."""

    path: Path
    figures: Figures
    score: float


@dataclass
class Curves:
    """The figures of a training run: the lines of its ``metrics.jsonl``."""

    path: Path
    rows: list[dict[str, Any]]

    def of(self, key: str, split: str) -> tuple[list[float], list[float]]:
        """Return the updates and values of one figure, without non-finite values."""
        rows = [row for row in self.rows if row["split"] == split and row.get(key) is not None]
        return [row["update"] for row in rows], [row[key] for row in rows]


def _is_timed(point: Point) -> bool:
    """Return whether the speed is that of sampling: a diagnosis takes evaluations of its own."""
    return "diagnose" not in point.figures.options


def plot_quality(path: Path, points: Sequence[Point], quality: str) -> None:
    """Plot quality against steps and, beside it, against speed.

    Files of one folder and architecture that differ only in steps form one curve. A model without
    steps, such as the autoregressive baseline, is a horizontal line on the left and a point on the
    right.

    Args:
        path: the image to write.
        points: at least one.
        quality: the label of the vertical axis.
    """
    groups = _groups(points)
    figure = _figure(9, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (label, group) in enumerate(groups.items()):
        style = _style(number) | {"label": _as_text(label)}
        scores = [p.score for p in group]
        speeds = [p.figures.speed if _is_timed(p) else math.nan for p in group]
        steps = [_steps_taken(p.figures) for p in group]
        if None in steps:
            for score in scores:
                left.axhline(score, color=style["color"], linestyle=style["linestyle"])
            left.plot([], [], **style)  # for the legend
            right.plot(speeds, scores, **{**style, "linestyle": "", "markersize": 8})
            continue
        left.plot(steps, scores, **style)
        right.plot(speeds, scores, **style)
        place = (0, -13) if number % 2 else (0, 6)  # above one curve, below the next
        beside = {"xytext": place, "textcoords": "offset points", "ha": "center", "fontsize": 8}
        for x, point in zip(speeds, group, strict=True):
            if not _is_timed(point):
                continue
            count = str(point.figures.steps)
            if point.figures.stops_early:
                count += f" ({point.figures.nfe:g})"
            right.annotate(count, (x, point.score), color=style["color"], **beside)
    ticks = sorted({p.figures.steps for p in points if p.figures.steps is not None})
    left.set(xlabel="denoising steps (log scale)", ylabel=quality)
    if ticks:
        left.set_xscale("log")
        left.set_xticks(ticks, labels=map(str, ticks))
        left.minorticks_off()
    else:  # horizontal lines only
        left.set_xticks([])
    right.set(xlabel="sentences/s (log scale; numbers are steps)")
    for axes in (left, right):  # they share the vertical axis
        axes.margins(y=0.12)  # room for the numbers
    if any(map(_is_timed, points)):
        right.set_xscale("log")
        _plain_ticks(right)
    else:
        right.set_xticks([])
    _save(figure, path)


def plot_training(path: Path, runs: Sequence[Curves]) -> None:
    """Plot every figure of ``metrics.jsonl`` against updates, one panel each.

    Args:
        path: the image to write.
        runs: at least one.

    Raises:
        FastdissError: there is nothing to plot.
    """
    labels = _distinct_ends([run.path.parent for run in runs])
    if len(set(labels)) < len(labels):
        labels = _distinct_ends([run.path for run in runs])
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    drawn = [key for key in keys if key not in NO_CURVE and _is_drawn(key, runs)]
    if not drawn:
        raise FastdissError(f"{runs[0].path} has no figures to plot yet")
    columns = min(len(drawn), 4)
    figure = _figure(3.2 * columns, 2.6 * math.ceil(len(drawn) / columns) + 0.6)
    panels = figure.subplots(math.ceil(len(drawn) / columns), columns, sharex=True, squeeze=False)
    for key, axes in zip(drawn, panels.flat, strict=False):
        for number, (label, run) in enumerate(zip(labels, runs, strict=True)):
            style = _style(number)
            both = [*run.of(key, "train"), *run.of(key, "valid")]
            axes.plot(*both[:2], color=style["color"], linewidth=1, linestyle=":")
            # markers, because validations are few, perhaps a single one
            axes.plot(*both[2:], **style, label=_as_text(label))
        values = _values(key, runs)
        if key not in LINEAR and min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
            _plain_ticks(axes, vertical=True)
        logarithmic = " (log scale)" if axes.get_yscale() == "log" else ""
        axes.set_title(TITLES.get(key, key) + logarithmic, fontsize=10)
        axes.set_xlabel("updates")
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(drawn) :]:
        axes.set_visible(False)
    if any(run.of(key, "valid")[0] for run in runs for key in drawn):
        panels.flat[0].plot([], [], color="black", linewidth=1, linestyle=":", label="training")
    _save(figure, path)


def _steps_taken(figures: Figures) -> float | None:
    """Return the steps of a run: the mean over sentences if they may stop early."""
    return figures.nfe if figures.stops_early else figures.steps


def _is_drawn(key: str, runs: Sequence[Curves]) -> bool:
    """Return whether a figure is numeric and not all zeros, as skipped updates usually are."""
    values = _values(key, runs)
    return all(isinstance(value, int | float) for value in values) and any(values)


def _values(key: str, runs: Sequence[Curves]) -> list[Any]:
    """Return all finite values of one figure."""
    return [value for run in runs for row in run.rows if (value := row.get(key)) is not None]


def _groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points of each curve by its label, sorted by steps."""
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        options = [f"{k}={v}" for k, v in point.figures.options.items() if k != "steps"]
        key = (point.path.parent, point.figures.arch, *options)
        groups.setdefault(key, []).append(point)
    keys = list(groups)
    archs = [key[1] for key in keys]
    shared = {arch: set.intersection(*(set(k) for k in keys if k[1] == arch)) for arch in archs}
    options = [
        ", ".join([arch, *(option for option in key[2:] if option not in shared[arch])])
        for arch, key in zip(archs, keys, strict=True)
    ]
    folders = _distinct_ends([key[0] for key in keys])
    everything = [f"{folder}: {option}" for folder, option in zip(folders, options, strict=True)]
    # prefer folders, which the user named; that of a single curve is uninformative
    schemes = (archs, options, folders) if len(keys) == 1 else (folders, archs, options)
    distinct = [scheme for scheme in schemes if len(set(scheme)) == len(keys)]
    short = [scheme for scheme in distinct if max(map(len, scheme)) <= LONGEST_LABEL]
    labels = next(iter(short + distinct), everything)
    named = zip(labels, groups.values(), strict=True)
    return {label: sorted(group, key=lambda p: p.figures.steps or 0) for label, group in named}


def _distinct_ends(folders: Sequence[Path]) -> list[str]:
    """Return the folders without their common beginning and end."""
    parts = [list(folder.absolute().parts) for folder in folders]
    if len(set(map(tuple, parts))) == 1:
        return [folders[0].absolute().name] * len(folders)
    while len({tuple(part[:1]) for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while len({tuple(part[-1:]) for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) or "." for part in parts]


def _as_text(label: str) -> str:
    """Escape a label for matplotlib, which hides _names and typesets $formulas$."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
        "markersize": 5,
    }


def _plain_ticks(axes: Axes, vertical: bool = False) -> None:
    """Label a logarithmic axis with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    """Write a figure with one legend for all panels; equal figures give equal bytes.

    Raises:
        FastdissError: the file cannot be written.
    """
    import matplotlib

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    width = 11 * figure.get_figwidth()  # in characters, approximately
    columns = max(1, min(len(labels), 3, int(width / (max(map(len, labels)) + 6))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    undated = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None}
    metadata = {} if path.suffix == ".png" else undated
    image, format = io.BytesIO(), path.suffix.removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "fastdiss", "svg.fonttype": "none"}):
        figure.savefig(image, format=format, facecolor="white", dpi=150, metadata=metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, image.getvalue())
    except OSError as error:
        raise FastdissError(f"{path}: cannot write: {error.strerror}") from None
