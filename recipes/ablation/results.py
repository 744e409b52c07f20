"""The generate files of a corpus under WORK, and their scores."""

from __future__ import annotations

import json
import statistics
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from trials import ALL_STEPS, FEW_STEPS, HERE, VARIANTS, trial_folder

from fastdiss_cli.decoding.systems import (
    Figures,
    parse_summary,
    read_all_references,
    read_system,
    reference_streams,
)
from fastdiss_cli.metrics import LOWER_IS_BETTER, METRICS

# corpus -> the metric of its tables
METRIC = {"embedded": "bleu", "multi30k": "bleu", "multi30k_small": "bleu", "cmudict_g2p": "ser"}
NAMES = {"bleu": "BLEU", "ser": "WER (words with a wrong pronunciation, %)"}
FEW = [int(steps) for steps in FEW_STEPS.split(",")]


class Results:
    """The generate files of a corpus, and their scores (each computed once)."""

    def __init__(self, corpus: str, work: Path) -> None:
        self.corpus, self.work = corpus, work
        self.plan: dict[str, Any] = yaml.safe_load((HERE / "plan.yaml").read_text())[corpus]
        self.metric = METRIC[corpus]
        self.higher_is_better = self.metric not in LOWER_IS_BETTER
        self.seeds = range(1, self.plan["seeds"] + 1)
        self.variants = self.plan.get("variants", list(VARIANTS))
        self.steps = [int(steps) for steps in self.plan.get("steps", ALL_STEPS).split(",")]
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
        self, name: str, way: str, steps: int | None, metric: str = "", split: str = "test"
    ) -> list[float]:
        """Return the scores of the seeds that there are."""
        paths = (self.file(name, seed, way, steps, split) for seed in self.seeds)
        return [self.score(path, metric) for path in paths if path.exists()]

    def mean(self, name: str, way: str, steps: int | None, split: str = "test") -> float:
        """Return the mean score over the seeds that there are, NaN if there is none."""
        values = self.over_seeds(name, way, steps, split=split)
        return statistics.fmean(values) if values else float("nan")

    def cell(self, name: str, way: str, steps: int | None, metric: str = "") -> str:
        """Return mean and, with several seeds, standard deviation as text."""
        values = self.over_seeds(name, way, steps, metric)
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}"

    def diagnosis(self, name: str, steps: int) -> dict[str, Any]:
        """Return what `generate --diagnose` measured for seed 1; empty tables if it has not."""
        path = self.file(name, 1, "diagnosis", steps).with_suffix(".diagnosis.json")
        if not path.exists():
            return {"by_step": [], "by_time": []}
        return json.loads(path.read_text(encoding="utf-8"))

    @property
    def temperature(self) -> str:
        """What the samples called ``reuse`` were made at, as they say themselves."""
        return figures_of(self.file("difformer", 1, "reuse", 5)).options["temperature"]

    @property
    def machine(self) -> str:
        """What has trained and sampled."""
        return (self.work / "machine.txt").read_text(encoding="utf-8").strip()

    def speed_files(self) -> list[tuple[Path, str, str]]:
        """Return the files of the speed measurement, what each is, and its group."""
        folder, files = self.work / "speed", []
        for way, counts, ending in (("single", [*self.steps, 2000], ""), ("mbr", FEW, ", MBR")):
            for steps in counts:
                path = folder / way / f"generate-test.steps{steps}.txt"
                files.append((path, f"fastdiss, {steps} steps{ending}", way))
        for way in ("greedy", "beam"):
            files.append((folder / way / "generate-test.txt", f"transformer, {way}", "transformer"))
        return files


def figures_of(path: Path) -> Figures:
    """Return sentences/s and NFE, as the last line of a generate file says."""
    figures = parse_summary(read_system(path).summary)
    assert figures is not None, path
    return figures
