"""Score what `trials.py` generated and write RESULTS.md, figures.json and the plots of a corpus.

Every figure comes from files under WORK; figures.json keeps them all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import yaml
from trials import ALL_STEPS, FEW_STEPS, HERE, SWEEPS, VARIANTS, trial_folder

from fastdiss_cli.decoding.output import read_all_references, read_system, reference_streams
from fastdiss_cli.metrics import METRICS, paired_test

# corpus -> the metric of its tables, and whether a higher value is better
METRIC = {"embedded": ("bleu", True), "multi30k": ("bleu", True), "cmudict_g2p": ("ser", False)}
NAMES = {"bleu": "BLEU", "ser": "WER (words with a wrong pronunciation, %)", "wer": "PER"}
STEPS = [int(steps) for steps in ALL_STEPS.split(",")]
FEW = [int(steps) for steps in FEW_STEPS.split(",")]
SPEED = re.compile(r"([\d,]+) sentences in ([\d.]+) s, ([\d.]+) sentences/s, NFE ([\d.]+)")

Cell = str


class Results:
    """The generate files of a corpus, and their scores (each computed once)."""

    def __init__(self, corpus: str, work: Path) -> None:
        self.corpus, self.work = corpus, work
        self.plan: dict[str, Any] = yaml.safe_load((HERE / "plan.yaml").read_text())[corpus]
        self.metric, self.higher_is_better = METRIC[corpus]
        self.seeds = range(1, self.plan["seeds"] + 1)
        self.variants = self.plan.get("variants", list(VARIANTS))
        self.scores: dict[str, float] = {}

    @cached_property
    def references(self) -> dict[str, list[list[str | None]]]:
        """sacreBLEU's reference streams by split."""
        streams = {}
        for split in ("valid", "test"):
            path = self.work / "text" / f"{split}.refs.tsv"
            if not path.exists():
                path = self.work / "text" / f"{split}.en"
            streams[split] = reference_streams(read_all_references([path], None))
        return streams

    def file(self, name: str, seed: int, way: str, steps: int | None, split: str = "test") -> Path:
        end = "" if steps is None else f".steps{steps}"
        return trial_folder(self.work, name, seed) / way / f"generate-{split}{end}.txt"

    def hypotheses(self, name: str, seed: int, way: str, steps: int) -> list[str]:
        return read_system(self.file(name, seed, way, steps)).hypotheses

    def score(self, path: Path, metric: str = "") -> float:
        """Return a metric of one file."""
        metric = metric or self.metric
        key = f"{path.relative_to(self.work)} {metric}"
        if key not in self.scores:
            split = path.name.split(".")[0].removeprefix("generate-")
            hypotheses = read_system(path).hypotheses
            if metric == "length ratio":
                result = METRICS["bleu"]().corpus_score(hypotheses, self.references[split])
                self.scores[key] = result.ratio
            else:
                result = METRICS[metric]().corpus_score(hypotheses, self.references[split])
                self.scores[key] = result.score
        return self.scores[key]

    def over_seeds(
        self, name: str, way: str, steps: int | None, metric: str = ""
    ) -> tuple[float, float] | None:
        """Return mean and standard deviation (0 for one seed) over the seeds that there are."""
        paths = [self.file(name, seed, way, steps) for seed in self.seeds]
        values = [self.score(path, metric) for path in paths if path.exists()]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def cell(self, name: str, way: str, steps: int | None, metric: str = "") -> Cell:
        found = self.over_seeds(name, way, steps, metric)
        if found is None:
            return "-"
        return f"{found[0]:.2f}" + (f" ± {found[1]:.2f}" if len(self.seeds) > 1 else "")

    def mean(self, name: str, way: str, steps: int | None) -> float | None:
        found = self.over_seeds(name, way, steps)
        return None if found is None else found[0]


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def speed_of(path: Path) -> tuple[float, float]:
    """Return sentences/s and NFE, as the last line of a generate file says."""
    match = SPEED.search(path.read_text(encoding="utf-8").rsplit("\n", 2)[-2])
    assert match is not None, path
    return float(match[3].replace(",", "")), float(match[4])


def quality_by_steps(results: Results, way: str, counts: Sequence[int]) -> str:
    rows = [
        [name, *(results.cell(name, way, steps) for steps in counts)] for name in results.variants
    ]
    return markdown(["", *counts], rows)


def self_conditioning(results: Results) -> str:
    rows = [
        [name, mode, *(results.cell(name, mode, steps) for steps in FEW)]
        for name in results.variants
        for mode in ("reuse", "none", "recompute", "gold")
    ]
    return markdown(["", "told", *FEW], rows)


def at_five_steps(results: Results) -> str:
    metrics = ["bleu", "chrf", "wer", "ser", "repetition", "length ratio"]
    rows = [
        [name, *(results.cell(name, "reuse", 5, metric) for metric in metrics)]
        for name in results.variants
    ]
    for way in ("greedy", "beam"):
        cells = (results.cell("transformer", way, None, metric) for metric in metrics)
        rows.append([f"transformer, {way}", *cells])
    return markdown(["", *metrics], rows)


def candidates(results: Results) -> str:
    rows = [
        [name, *(results.cell(name, "mbr", steps) for steps in FEW)] for name in results.variants
    ]
    for way, what in (("greedy", "transformer, greedy"), ("beam", "transformer, beam 5")):
        rows.append([what, results.cell("transformer", way, None), *[""] * (len(FEW) - 1)])
    return markdown(["", *FEW], rows)


def significance(results: Results) -> tuple[str, dict[str, float]]:
    """Compare each variant with the baseline at 5 steps: by seed, and over all seeds together."""
    rows, pooled_p = [], {}
    streams = results.references["test"]
    for name in results.variants:
        if name == "difformer":
            continue
        pairs = [
            [
                read_system(results.file(system, seed, "reuse", 5)).hypotheses
                for seed in results.seeds
            ]
            for system in ("difformer", name)
        ]
        p_values = [
            paired_test(before, after, streams, [results.metric])[0][3]
            for before, after in zip(*pairs, strict=True)
        ]
        before, after = (list(chain(*by_seed)) for by_seed in pairs)
        together = [stream * len(results.seeds) for stream in streams]
        _, old, new, p, signature = paired_test(before, after, together, [results.metric])[0]
        pooled_p[name] = p
        difference = f"{new - old:+.2f}"
        rows.append([name, difference, *(f"{value:.3f}" for value in p_values), f"{p:.3f}"])
    header = ["", "difference", *(f"p, seed {seed}" for seed in results.seeds), "p, all seeds"]
    return markdown(header, rows) + f"\nSignature: `{signature}`\n", pooled_p


def targets(results: Results, p: dict[str, float]) -> str:
    """Check what the toolkit set out to show."""
    sign = 1 if results.higher_is_better else -1

    def value(name: str, way: str, steps: int | None) -> float:
        found = results.mean(name, way, steps)
        return float("nan") if found is None else sign * found

    five = {name: value(name, "reuse", 5) for name in VARIANTS}
    fast = {steps: value("fastdiss", "reuse", steps) for steps in STEPS}
    order = five["difformer"] < five["+MANS"] < five["+SCP"] < five["fastdiss"]
    beam = value("transformer", "beam", None)
    checks: list[tuple[str, bool, str]] = [
        (
            "fastdiss at 5 steps is at most 0.1 behind itself at 100",
            fast[5] >= fast[100] - 0.1,
            f"{fast[5] - fast[100]:+.2f}",
        ),
        (
            "fastdiss at 2 steps is at least difformer at 20",
            fast[2] >= value("difformer", "reuse", 20),
            f"{fast[2] - value('difformer', 'reuse', 20):+.2f}",
        ),
        (
            "at 5 steps: difformer < +MANS < +SCP < fastdiss",
            order,
            ", ".join(f"{n} {sign * five[n]:.2f}" for n in VARIANTS if n in results.variants),
        ),
        (
            "at 5 steps: fastdiss above difformer with p < 0.05",
            five["fastdiss"] > five["difformer"] and p["fastdiss"] < 0.05,
            f"{five['fastdiss'] - five['difformer']:+.2f}, p = {p['fastdiss']:.3f}",
        ),
        (
            "fastdiss at 5 steps: `reuse` within 0.2 of `recompute`",
            value("fastdiss", "recompute", 5) - fast[5] <= 0.2,
            f"{fast[5] - value('fastdiss', 'recompute', 5):+.2f}",
        ),
        (
            "fastdiss at 5 steps with MBR within 1 of transformer with beam 5",
            value("fastdiss", "mbr", 5) >= beam - 1,
            f"{value('fastdiss', 'mbr', 5) - beam:+.2f}",
        ),
    ]
    rows = [[what, "reached" if held else "**missed**", figure] for what, held, figure in checks]
    return markdown(["", "", "figure (positive is better)"], rows)


def sweeps(results: Results) -> str:
    """Return one table a group, on validation data, best first."""
    parts = []
    seeds = range(1, results.plan["sweep_seeds"] + 1)

    def row(label: str, group: str, name: str, way: str = "reuse") -> list[Any]:
        cells = []
        for steps in FEW:
            paths = [results.file(f"sweep/{group} {name}", s, way, steps, "valid") for s in seeds]
            values = [results.score(path) for path in paths if path.exists()]
            cells.append(f"{statistics.fmean(values):.2f}" if values else "-")
        return [label, *cells]

    base = row("base", "base", "base")
    for group, settings in SWEEPS.items():
        rows = [base, *(row(name, group, name) for name in settings)]
        rows.sort(key=lambda r: float(r[1 + FEW.index(5)]), reverse=results.higher_is_better)
        parts.append(f"### {group}\n\n" + markdown(["", *FEW], rows))
    grids = [base, *(row(grid, "base", "base", grid) for grid in ("quadratic", "log-snr"))]
    parts.append("### Time grid of sampling\n\n" + markdown(["", *FEW], grids))
    return "\n".join(parts)


def speed(results: Results) -> str:
    """Return the table of quality and speed, measured one after the other on a quiet machine."""
    folder = results.work / "speed"
    rows: list[list[object]] = []
    for path, what, _ in speed_files(results):
        if path.exists():
            sentences, nfe = speed_of(path)
            rows.append([what, f"{nfe:g}", f"{sentences:.1f}", f"{results.score(path):.2f}"])
    many = folder / "single" / "generate-test.steps2000.txt"
    note = ""
    if many.exists():
        five = speed_of(folder / "single" / "generate-test.steps5.txt")[0]
        ratio = five / speed_of(many)[0]
        note = f"\n5 steps are {ratio:.0f} times as fast as 2000, in one run.\n"
    return markdown(["", "NFE", "sentences/s", NAMES[results.metric]], rows) + note


def speed_files(results: Results) -> list[tuple[Path, str, str]]:
    folder = results.work / "speed"
    files = [
        (
            folder / "single" / f"generate-test.steps{steps}.txt",
            f"fastdiss, {steps} steps",
            "single",
        )
        for steps in [*STEPS, 2000]
    ]
    files += [
        (folder / "mbr" / f"generate-test.steps{steps}.txt", f"fastdiss, {steps} steps, MBR", "mbr")
        for steps in FEW
    ]
    for way in ("greedy", "beam"):
        files.append((folder / way / "generate-test.txt", f"transformer, {way}", "transformer"))
    return files


def diagnosis(results: Results) -> tuple[str, str]:
    """Return the tables by step and by time, means over seeds, for 5 steps."""
    by_step, by_time = [], []
    for name in results.variants:
        tables = [_tables(results, name, seed, 5) for seed in results.seeds]
        for step in range(5):
            rows = [table["by_step"][step] for table in tables]
            cells = (
                f"{statistics.fmean(row[key] for row in rows):.4f}"
                for key in ("gap", "norm", "confidence")
            )
            by_step.append([name if step == 0 else "", step + 1, f"{rows[0]['t']:.1f}", *cells])
        for k in range(0, 10, 2):
            rows = [table["by_time"][k] for table in tables]
            cells = (
                f"{statistics.fmean(row[f'anchor_{told}'] for row in rows):.3f}"
                for told in ("nothing", "fresh", "stale")
            )
            by_time.append([name if k == 0 else "", f"{rows[0]['t']:.2f}", *cells])
    return (
        markdown(["", "step", "t", "gap", "norm", "confidence"], by_step),
        markdown(["", "t", "told nothing", "fresh", "stale"], by_time),
    )


def _tables(results: Results, name: str, seed: int, steps: int) -> dict[str, Any]:
    path = results.file(name, seed, "diagnosis", steps).with_suffix(".diagnosis.json")
    return json.loads(path.read_text(encoding="utf-8"))


def plot(path: Path, draw: Callable[[Any], None]) -> None:
    """Draw a figure that reads on white, and write it as SVG without a date."""
    plt.rcParams.update({"svg.hashsalt": "fastdiss", "font.size": 10, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def plot_quality(results: Results, axes: Any) -> None:
    for name in results.variants:
        points = [(s, results.over_seeds(name, "reuse", s)) for s in STEPS]
        found = [(s, *p) for s, p in points if p]
        if found:
            steps, means, spreads = zip(*found, strict=True)
            axes.errorbar(steps, means, spreads, marker="o", capsize=2, label=name)
    beam = results.mean("transformer", "beam", None)
    if beam is not None:
        axes.axhline(beam, color="0.4", linestyle="--", label="transformer, beam 5")
    axes.set(xscale="log", xlabel="steps", ylabel=NAMES[results.metric])
    axes.set_xticks(STEPS, labels=map(str, STEPS))
    axes.minorticks_off()


def plot_speed(results: Results, axes: Any) -> None:
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for path, what, way in speed_files(results):
        if path.exists() and "2000" not in what:
            point = (speed_of(path)[0], results.score(path), what.split(", ")[1])
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
        rows = zip(
            *(_tables(results, name, seed, 20)["by_step"] for seed in results.seeds), strict=True
        )
        means = [statistics.fmean(row["gap"] for row in by_seed) for by_seed in rows]
        axes.plot(range(1, len(means) + 1), means, marker=".", label=name)
    axes.set(yscale="log", xlabel="step of 20", ylabel="gap of stale to fresh estimate (MSE)")


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        model = found[1] if found else model
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", choices=METRIC)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    results = Results(arguments.corpus, arguments.work)
    folder = HERE / "results" / results.corpus
    folder.mkdir(parents=True, exist_ok=True)
    plan, name = results.plan, NAMES[results.metric]

    paired, p = significance(results)
    steps_table, time_table = diagnosis(results)
    plot(folder / "quality_by_steps.svg", lambda axes: plot_quality(results, axes))
    plot(folder / "gap_by_step.svg", lambda axes: plot_gap(results, axes))
    if (results.work / "speed").exists():
        plot(folder / "quality_by_speed.svg", lambda axes: plot_speed(results, axes))

    seeds = len(results.seeds)
    spread = "mean ± standard deviation over seeds" if seeds > 1 else "one seed: no spread is known"
    sections = [
        f"# {results.corpus}\n",
        f"Written by `bash recipes/ablation/run.sh {results.corpus}` on {machine()}. "
        f"{plan['updates']:,} updates a model, {seeds} seed(s), test data unless said otherwise; "
        f"{name}; {spread}.\n",
        "## What was to be shown\n",
        targets(results, p),
        "## Quality by steps\n\n![](quality_by_steps.svg)\n\nddpm:\n",
        quality_by_steps(results, "reuse", STEPS),
        "ddim:\n",
        quality_by_steps(results, "ddim", STEPS),
        "## Other metrics at 5 steps\n",
        at_five_steps(results),
        "## Against difformer at 5 steps: paired bootstrap\n",
        paired,
        "## What the network is told, at sampling time\n\n"
        "`gold` tells it the right answer: an upper bound for diagnosis only.\n",
        self_conditioning(results),
        "## 15 candidates (5 lengths x 3 noises), MBR\n",
        candidates(results),
        "## Speed\n\nSeed 1, one run after the other, nothing else running.\n\n"
        "![](quality_by_speed.svg)\n",
        speed(results),
        "## Why: by step of 5\n\n![](gap_by_step.svg)\n\n"
        "gap: mean squared difference of a coordinate of z0_hat between the stale and a fresh "
        "self-conditioning; norm: its mean square (1 for true embeddings).\n",
        steps_table,
        "Anchor loss at time t, told nothing, a fresh estimate (at t) or a stale one (t + 0.2):\n",
        time_table,
    ]
    if plan["sweep_seeds"]:
        sections += [
            f"## The open choices\n\nValidation data, {plan['sweep_updates']:,} updates, "
            f"{plan['sweep_seeds']} seed(s); each setting differs from the base in `trials.py` by "
            "what its row says; best at 5 steps first.\n",
            sweeps(results),
        ]
    (folder / "RESULTS.md").write_text("\n".join(sections), encoding="utf-8")
    figures = json.dumps(dict(sorted(results.scores.items())), indent=0)
    (folder / "figures.json").write_text(figures + "\n", encoding="utf-8")
    print(f"wrote {folder / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
