"""The benchmark: every table is written, of a small network here."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "recipes" / "bench" / "bench.py"


@pytest.mark.slow
def test_the_benchmark_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("bench", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "SIZE", "tiny")
    monkeypatch.setattr(bench, "growth", partial(bench.growth, count=4, tokens=256))
    few = ["--rounds", "1", "--sentences", "8", "--max-tokens", "500", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *few])
    bench.main()
    page = (tmp_path / "RESULTS.md").read_text()
    for name in [*bench.DIFFUSION, *bench.BEAMS, *bench.TRAINED]:
        assert f"| {name} | " in page
    assert "nan" not in page and page.count("## ") == 6
    figures = json.loads((tmp_path / "figures.json").read_text())
    for dtype in ("float32", "bfloat16"):
        for way in figures["decoding"][dtype].values():
            assert min(map(min, way.values())) > 0
        assert min(map(min, figures["training"][dtype].values())) > 0
