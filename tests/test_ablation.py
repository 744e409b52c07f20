"""The ablation recipe, from trials to report, on a small scale."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli

RECIPE = Path(__file__).parent.parent / "recipes" / "ablation"
SMALL = (
    "model: {model_dim: 16, ffn_dim: 32, heads: 2, encoder_layers: 1, decoder_layers: 1}\n"
    "train: {max_tokens: 200, valid_sentences: 5}\n"
)
PLAN = (
    "embedded: {updates: 3, seeds: 2, variants: [difformer, '+SCP, unrolled'], "
    "sweep_updates: 2, sweep_seeds: 1}\n"
)


class InThisThread(Executor):
    """Training catches signals, which only the main thread can."""

    def __init__(self, jobs: int) -> None: ...

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args, **kwargs))
        return future


@pytest.mark.slow
def test_trials_and_report(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path(shutil.copytree(RECIPE, tmp_path / "recipe"))
    shutil.rmtree(recipe / "results", ignore_errors=True)
    (recipe / "embedded.yaml").write_text(SMALL)
    (recipe / "plan.yaml").write_text(PLAN)
    work = tmp_path / "work"
    prefs = [f"--{split}pref={corpus / split}" for split in ("train", "valid", "test")]
    data = ["-s", "de", "-t", "en", "--vocab-size", "300", "--destdir", work / "data-bin"]
    assert run_cli("preprocess", *data, *prefs).returncode == 0
    shutil.copytree(corpus, work / "text")

    monkeypatch.syspath_prepend(str(recipe))
    for name in ("trials", "results", "plots", "report"):
        sys.modules.pop(name, None)
    import trials

    commands: list[tuple[object, ...]] = []

    def fastdiss(_: Path, *arguments: object) -> None:
        commands.append(arguments)
        done = run_cli(*map(str, arguments))
        assert done.returncode == 0, done.stderr

    # the same calls, but fewer, and in this process
    monkeypatch.setattr(trials, "fastdiss", fastdiss)
    monkeypatch.setattr(trials, "ThreadPoolExecutor", InThisThread)
    monkeypatch.setattr(trials, "ALL_STEPS", "1,2,5,20,100")
    few = {name: trials.SWEEPS[name] for name in ("SCP: rate", "Self-conditioning")}
    monkeypatch.setattr(trials, "SWEEPS", few)
    short = {"max_length_offset": "5"}  # untrained, the length head would draw up to 128 more
    monkeypatch.setattr(trials, "BASE", trials.BASE | short)
    variants = {name: settings | short for name, settings in trials.VARIANTS.items()}
    monkeypatch.setattr(trials, "VARIANTS", variants)
    import report

    arguments = ["embedded", str(work)]

    def run() -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["trials.py", *arguments])
        trials.main()
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        report.main()
        folder = recipe / "results" / "embedded"
        return (folder / "RESULTS.md").read_text(), (folder / "SWEEPS.md").read_text()

    first, choices = run()
    trained = [command for command in commands if command[0] == "train"]
    # 2 seeds of 2 variants and the transformer, and 1 seed of the base and three settings
    assert len(trained) == 2 * 3 + 4
    commands.clear()
    assert run() == (first, choices)
    # finished trials are checked for completeness, and not sampled again
    assert commands == trained
    monkeypatch.setitem(variants, "difformer", variants["difformer"] | {"noise_factor": "3"})
    with pytest.raises(AssertionError, match=r"model.noise_factor was 4.0 and is now 3.0"):
        run()

    figures = json.loads((recipe / "results" / "embedded" / "figures.json").read_text())
    five = [figures[f"difformer/seed{s}/reuse/generate-test.steps5.txt bleu"] for s in (1, 2)]
    assert f"{sum(five) / 2:.2f} ± " in first
    for plot in ("quality_by_steps", "quality_by_speed", "gap_by_step"):
        assert (recipe / "results" / "embedded" / f"{plot}.svg").read_text().startswith("<?xml")
    # Student's t: 4.303 and 12.706 standard errors of the mean of three and of two trainings
    assert report.interval([-3.8, -1.3, -3.1]) == pytest.approx((-2.7333, 3.2039), abs=1e-3)
    assert report.interval([1.0, 2.0]) == pytest.approx((1.5, 6.353))
    assert report.interval([1.0]) == (1.0, math.inf)
    assert "reached" in first and "nan" not in first
    scores = json.loads((recipe / "results" / "embedded" / "sweeps.json").read_text())
    for what, way in (("| raw estimate |", "Self-conditioning raw estimate/seed1/default"),
                      ("\n| 0 |", "base/seed1/temperature 0")):  # fmt: skip
        score = scores[f"sweep/{way}/generate-valid.steps1.txt bleu"]
        assert f"{what} {score:.2f} |" in choices
