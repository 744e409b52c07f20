"""Score what `trials.py` generated and write the tables and plots of a corpus.

RESULTS.md and the plots are of the variants, SWEEPS.md of the open choices. Every figure comes from
files under WORK; figures.json and sweeps.json keep them all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from plots import plot, plot_gap, plot_quality, plot_speed
from results import FEW, METRIC, NAMES, Results, figures_of
from trials import CLAMPS, GRIDS, HERE, SWEEPS, TEMPERATURES, VARIANTS, trial_folder

from fastdiss_cli.decoding.systems import read_system
from fastdiss_cli.metrics import METRICS, paired_test


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


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
    return markdown(["", "self_cond", *FEW], rows)


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
    counts = [2, 5]
    rows = [
        [name, *(results.cell(name, way, steps) for way in ("reuse", "mbr") for steps in counts)]
        for name in results.variants
    ]
    header = [f"{steps} steps{how}" for how in ("", ", MBR") for steps in counts]
    beams = ", ".join(
        f"{what} {results.cell('transformer', way, None)}"
        for way, what in (("greedy", "greedy"), ("beam", "beam 5"))
    )
    return markdown(["", *header], rows) + f"\ntransformer of the same size: {beams}.\n"


# of Student's t, by number of trainings: half of a 95 % interval in standard errors
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the mean of trainings and half of its 95 % interval; of one it is infinite."""
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return mean, math.inf
    t = T_975[min(count, max(T_975))]  # of more trainings it is slightly less
    return mean, t * statistics.stdev(differences) / math.sqrt(count)


def significance(results: Results) -> tuple[str, dict[str, tuple[float, str, bool]]]:
    """Compare each variant with the baseline at 5 steps: in each training, and over trainings.

    Returns:
        The table; and by variant the difference, how sure it is, and whether that is 95 %.
    """
    rows, sure = [], {}
    metric, streams = METRICS[results.metric](), results.references["test"]
    signature = ""
    for name in results.variants:
        both = [
            [results.file(one, k, "reuse", 5) for one in ("difformer", name)] for k in results.seeds
        ]
        both = [files for files in both if all(path.exists() for path in files)]
        if name == "difformer" or not both:
            continue
        p_values = []
        for files in both:
            pair = [read_system(path).hypotheses for path in files]
            _, signature, (_, other) = paired_test(pair, streams, {results.metric: metric})[0]
            p_values.append(other.p_value)
        mean, half = interval([results.score(new) - results.score(old) for old, new in both])
        sure[name] = mean, f"p = {p_values[0]:.3f}", p_values[0] < 0.05
        cells = [f"{value:.3f}" for value in p_values] + ["-"] * (len(results.seeds) - len(both))
        shown = f"{mean:+.2f}"
        if len(both) > 1:
            sure[name] = mean, f"± {half:.2f}", abs(mean) > half
            shown += f" ± {half:.2f}"
        rows.append([name, shown, *cells])
    header = ["", "difference", *(f"p, seed {seed}" for seed in results.seeds)]
    note = ""
    if len(results.seeds) > 1:
        note = (
            "The difference with its 95 % interval (Student's t over trainings of the same seed); "
            "the p-values resample the sentences of one training.\n\n"
        )
    return note + markdown(header, rows) + f"\nSignature: `{signature}`\n", sure


def targets(results: Results, sure: dict[str, tuple[float, str, bool]]) -> str:
    """Check what the toolkit set out to show."""
    sign = 1 if results.higher_is_better else -1

    def value(name: str, way: str, steps: int | None) -> float:
        return sign * results.mean(name, way, steps)

    five = {name: value(name, "reuse", 5) for name in VARIANTS}
    base20 = value("difformer", "reuse", 20)
    beam = value("transformer", "beam", None)
    rows = []
    for name in [name for name in results.variants if name.startswith("+SCP")]:
        checks = [  # what, by how much, and how much is enough
            ("5 steps: at most 0.1 behind 100", five[name] - value(name, "reuse", 100), -0.1),
            ("2 steps: at least difformer at 20", value(name, "reuse", 2) - base20, 0),
            ("5 steps: above difformer", five[name] - five["difformer"], 0),
            ("`reuse` within 0.2 of `recompute`", five[name] - value(name, "recompute", 5), -0.2),
            ("5 steps, MBR: within 1 of beam 5", value(name, "mbr", 5) - beam, -1),
        ]
        for what, figure, least in checks:
            how, is_sure = "", True
            if what.endswith("above difformer") and name in sure:  # in the trainings that both have
                figure, how, is_sure = sure[name]
                figure *= sign
            verdict = "reached" if figure >= least and is_sure else "**missed**"
            shown = f"{figure:+.2f}" + (how and (f" {how}" if how.startswith("±") else f", {how}"))
            if math.isnan(figure):
                verdict, shown = "not measured", "-"
            rows.append([f"{name}, {what}", verdict, shown])
    names = ("difformer", "+MANS", "+SCP", "+SCP+MANS")
    scores = [five[name] for name in names]
    held = all(a < b for a, b in pairwise(scores))
    verdict = "reached" if held else "**missed**"
    verdict = "not measured" if any(map(math.isnan, scores)) else verdict
    shown = ", ".join(f"{sign * score:.2f}" for score in scores)
    rows.append([f"at 5 steps: {' < '.join(names)}", verdict, shown.replace("nan", "-")])
    return markdown(["", "", "figure (positive is better)"], rows)


def sweeps(results: Results) -> str:
    """Return one table for each open choice, on validation data, best at 5 steps first."""
    missing = []

    def rows(sweep: str, choices: dict[str, tuple[str, str]]) -> list[list[str]]:
        """Map what a row is called -> (folder of the trial, way of sampling) to its cells."""
        found = []
        for what, (name, way) in choices.items():
            scores = [results.mean(f"sweep/{name}", way, steps, "valid") for steps in FEW]
            if math.isnan(scores[0]):
                missing.append(f"{sweep}: {what}")
            else:
                found.append([what, *(f"{score:.2f}" for score in scores)])
        at_five = 1 + FEW.index(5)
        return sorted(found, key=lambda row: float(row[at_five]), reverse=results.higher_is_better)

    tables = {
        sweep: rows(
            sweep,
            {"base": ("base", "default")}
            | {setting: (f"{sweep} {setting}", "default") for setting in settings},
        )
        for sweep, settings in SWEEPS.items()
    }
    forms = {"expected embedding (base)": "base"} | {
        setting: f"Self-conditioning {setting}" for setting in SWEEPS["Self-conditioning"]
    }
    tables["Estimate that the solver takes (`clamp`)"] = rows(
        "Solver",
        {
            f"self_cond {what}, clamp {form}": (
                name,
                "default" if form == CLAMPS[0] else f"clamp {form}",
            )
            for what, name in forms.items()
            for form in CLAMPS
        },
    )
    tables["Time grid of sampling"] = rows(
        "Grid",
        {grid: ("base", "default" if grid == GRIDS[0] else f"grid {grid}") for grid in GRIDS},
    )
    tables["Temperature of sampling"] = rows(
        "Temperature",
        {
            temperature: ("base", "default" if k == 0 else f"temperature {temperature}")
            for k, temperature in enumerate(TEMPERATURES)
        },
    )
    parts = [
        f"### {sweep}\n\n" + markdown(["", *FEW], cells)
        for sweep, cells in tables.items()
        if len(cells) > 1  # more than the base
    ]
    if missing:
        parts.append(f"Not run: {'; '.join(missing)}.\n")
    return "\n".join(parts)


def speed(results: Results) -> str:
    """Return the table of quality and speed, measured one after the other on a quiet machine."""
    folder = results.work / "speed"
    rows: list[list[object]] = []
    for path, what, _ in results.speed_files():
        if path.exists():
            figures, score = figures_of(path), results.score(path)
            rows.append([what, f"{figures.nfe:g}", f"{figures.speed:.1f}", f"{score:.2f}"])
    many = folder / "single" / "generate-test.steps2000.txt"
    note = ""
    if many.exists():
        five = figures_of(folder / "single" / "generate-test.steps5.txt").speed
        ratio = five / figures_of(many).speed
        note = f"\n5 steps are {ratio:.0f} times as fast as 2000, in one run.\n"
    return markdown(["", "NFE", "sentences/s", NAMES[results.metric]], rows) + note


def diagnosis(results: Results) -> tuple[str, str]:
    """Return the tables by step and by time, for 5 steps."""
    by_step, by_time = [], []
    for name in results.variants:
        tables = results.diagnosis(name, 5)
        for row in tables["by_step"]:
            keys = ("gap", "norm", "confidence")
            cells = (f"{row[key]:.4f}" if key in row else "-" for key in keys)
            by_step.append([name if row["step"] == 1 else "", row["step"], row["t"], *cells])
        for k, row in enumerate(tables["by_time"][::2]):
            keys = ("anchor_none", "anchor_fresh", "anchor_stale")
            cells = (f"{row[key]:.3f}" if key in row else "-" for key in keys)
            by_time.append([name if k == 0 else "", row["t"], *cells])
    return (
        markdown(["", "step", "t", "gap", "norm", "confidence"], by_step),
        markdown(["", "t", "zeros", "fresh", "stale"], by_time),
    )


def write_results(results: Results, folder: Path) -> None:
    """Write RESULTS.md, figures.json and the plots of the variants."""
    plan, name = results.plan, NAMES[results.metric]
    paired, sure = significance(results)
    steps_table, time_table = diagnosis(results)
    plot(folder / "quality_by_steps.svg", lambda axes: plot_quality(results, axes))
    plot(folder / "gap_by_step.svg", lambda axes: plot_gap(results, axes))
    measured_speed = []
    if (results.work / "speed").exists():
        plot(folder / "quality_by_speed.svg", lambda axes: plot_speed(results, axes))
        measured_speed = [
            "## Speed\n\nSeed 1, one run after the other, nothing else running.\n\n"
            "![](quality_by_speed.svg)\n",
            speed(results),
        ]
    by_temperature: list[str] = []
    for temperature in TEMPERATURES[1:]:
        table = quality_by_steps(results, f"temperature {temperature}", results.steps)
        by_temperature += [f"ddpm at temperature {temperature}, seed 1:\n", table]

    seeds = len(results.seeds)
    spread = "mean ± standard deviation over seeds" if seeds > 1 else "one seed: no spread is known"
    sections = [
        f"# {results.corpus}\n",
        f"Written by `bash recipes/ablation/run.sh {results.corpus}` on {results.machine}. "
        f"{plan['updates']:,} updates per model, {seeds} seed(s), test data unless said otherwise; "
        f"{name}; {spread}.\n",
        "## What was to be shown\n",
        targets(results, sure),
        "## Quality by steps\n\n![](quality_by_steps.svg)\n\n"
        f"ddpm at temperature {results.temperature}:\n",
        quality_by_steps(results, "reuse", results.steps),
        *by_temperature,
        "ddim, seed 1:\n",
        quality_by_steps(results, "ddim", results.steps),
        "## Other metrics at 5 steps\n",
        at_five_steps(results),
        "## Against difformer at 5 steps: paired bootstrap\n",
        paired,
        "## Self-conditioning at sampling time\n\n"
        "`recompute` spends two evaluations per step; `none` and `gold` (seed 1) are for diagnosis "
        "only: `gold` gives away the right answer.\n",
        self_conditioning(results),
        "## 15 candidates (5 lengths x 3 noises), MBR\n",
        candidates(results),
        *measured_speed,
        "## Why: by step of 5 (seed 1)\n\n![](gap_by_step.svg)\n\n"
        "gap: mean squared difference of a coordinate of z0_hat between the stale and a fresh "
        "self-conditioning; norm: its mean square (1 for true embeddings).\n",
        steps_table,
        "Anchor loss at time t, given zeros, a fresh estimate (at t) or a stale one (of the step "
        "before):\n",
        time_table,
    ]
    write(results, folder, "RESULTS.md", sections, "figures.json")


def write_sweeps(results: Results, folder: Path) -> None:
    """Write SWEEPS.md and sweeps.json."""
    plan, name = results.plan, NAMES[results.metric]
    sections = [
        f"# {results.corpus}: the open choices\n",
        f"Written by `bash recipes/ablation/run.sh {results.corpus}` on {results.machine}. "
        f"Validation data, {name} by steps, `fastdiss_tiny`, {plan['sweep_updates']:,} updates, "
        f"{plan['sweep_seeds']} seed(s): the spread between seeds, which RESULTS.md has, is larger "
        "than most differences here. Each setting differs from `BASE` in `trials.py`, the defaults "
        "of that commit, by what its row says; best at 5 steps first.\n",
        sweeps(results),
    ]
    write(results, folder, "SWEEPS.md", sections, "sweeps.json")


def write(results: Results, folder: Path, name: str, sections: list[str], figures: str) -> None:
    """Write a page, and beside it every score that is in it."""
    (folder / name).write_text("\n".join(sections), encoding="utf-8")
    scores = json.dumps(dict(sorted(results.scores.items())), indent=0)
    (folder / figures).write_text(scores + "\n", encoding="utf-8")
    print(f"wrote {folder / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", choices=METRIC)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    folder = HERE / "results" / arguments.corpus
    folder.mkdir(parents=True, exist_ok=True)
    if trial_folder(arguments.work, "difformer", 1).exists():
        write_results(Results(arguments.corpus, arguments.work), folder)
    if trial_folder(arguments.work, "sweep/base", 1).exists():
        write_sweeps(Results(arguments.corpus, arguments.work), folder)


if __name__ == "__main__":
    main()
