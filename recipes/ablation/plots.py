"""The plots of an ablation."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from results import NAMES, Results, figures_of


def plot(path: Path, draw: Callable[[Any], None]) -> None:
    """Draw a figure that reads on white, and write it as SVG without a date."""
    plt.rcParams.update({"svg.hashsalt": "fastdiss", "font.size": 10, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def plot_quality(results: Results, axes: Any) -> None:
    for name in results.variants:
        scores = {steps: results.over_seeds(name, "reuse", steps) for steps in results.steps}
        scores = {steps: values for steps, values in scores.items() if values}
        means = [statistics.fmean(values) for values in scores.values()]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0 for v in scores.values()]
        axes.errorbar(list(scores), means, spreads, marker="o", capsize=2, label=name)
    beam = results.over_seeds("transformer", "beam", None)
    if beam:
        label = f"transformer, beam 5: {statistics.fmean(beam):.1f}"
        axes.plot([], [], " ", label=label)
    axes.set(xscale="log", xlabel="steps", ylabel=NAMES[results.metric])
    axes.set_xticks(results.steps, labels=map(str, results.steps))
    axes.minorticks_off()


def plot_speed(results: Results, axes: Any) -> None:
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for path, what, way in results.speed_files():
        if path.exists() and "2000" not in what:
            point = (figures_of(path).speed, results.score(path), what.split(", ")[1])
            groups.setdefault(way, []).append(point)
    labels = {"single": "fastdiss", "mbr": "fastdiss, 15 candidates, MBR"}
    for way, points in groups.items():
        speeds, scores, _ = zip(*points, strict=True)
        style = "s" if way == "transformer" else "o-"
        axes.plot(speeds, scores, style, label=labels.get(way, way))
        for x, y, name in points:
            axes.annotate(name.split()[0], (x, y), (3, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="sentences/s", ylabel=NAMES[results.metric])


def plot_gap(results: Results, axes: Any) -> None:
    for name in results.variants:
        rows = [row for row in results.diagnosis(name, 20)["by_step"] if "gap" in row]
        if rows:
            steps, gaps = [row["step"] for row in rows], [row["gap"] for row in rows]
            axes.plot(steps, gaps, marker=".", label=name)
    axes.set_xticks(range(0, 21, 5))
    axes.set(yscale="log", xlabel="step of 20", ylabel="gap of stale to fresh estimate (MSE)")
