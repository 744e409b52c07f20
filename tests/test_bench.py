"""The benchmark: every table is written, here for a small network."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdiss_cli.device import dtype_name

BENCH = Path(__file__).parent.parent / "recipes" / "bench" / "bench.py"


@pytest.mark.slow
def test_the_benchmark_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("bench", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "SIZE", "tiny")
    # without AVX-512, bfloat16 takes minutes
    dtypes = bench.DTYPES[: 2 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1]
    monkeypatch.setattr(bench, "DTYPES", dtypes)
    monkeypatch.setattr(bench, "growth", partial(bench.growth, count=4, tokens=256))
    few = ["--rounds", "1", "--sentences", "4", "--max-tokens", "500", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *few])
    bench.main()
    page = (tmp_path / "RESULTS.md").read_text()
    for name in [*bench.DIFFUSION, *bench.BEAMS, *bench.TRAINED]:
        assert f"| {name} | " in page
    assert "nan" not in page and page.count("## ") == 4 + len(dtypes)
    figures = json.loads((tmp_path / "figures.json").read_text())
    for dtype in map(dtype_name, dtypes):
        for way in figures["decoding"][dtype].values():
            assert min(map(min, way.values())) > 0
        assert min(map(min, figures["training"][dtype].values())) > 0


@pytest.mark.slow
def test_the_profile_accounts_for_all_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    where = importlib.import_module("where_time_goes")
    monkeypatch.setattr(importlib.import_module("bench"), "SIZE", "tiny")
    monkeypatch.setattr(where, "DTYPES", (torch.float32,))  # bfloat16 is slow on older CPUs
    monkeypatch.setattr(where, "BATCHED", 12)
    monkeypatch.setattr(where, "SINGLE", 2)
    monkeypatch.setattr(sys, "argv", ["where_time_goes.py", "--out", str(tmp_path)])
    where.main()
    table = (tmp_path / "PROFILE.md").read_text().splitlines()[4:]
    rows = [[int(cell) for cell in line.split("|")[2:-1]] for line in table[2:]]
    assert len(rows) == len(where.KINDS) + 2
    for column in zip(*rows, strict=True):
        assert 97 <= sum(column) <= 103 and min(column) >= 0
    products = table[2].split("|")
    assert products[1].strip() == "matrix products" and int(products[2]) > 20


def test_every_operator_is_of_one_kind() -> None:
    sys.path.insert(0, str(BENCH.parent))
    try:
        kind_of = importlib.import_module("where_time_goes").kind_of
    finally:
        sys.path.remove(str(BENCH.parent))
    for name, kind in (
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::bmm", "attention, expected embeddings"),
        ("aten::_softmax", "attention, expected embeddings"),
        ("aten::native_layer_norm", "norms"),
        ("aten::copy_", "copies, casts, gathering"),
        ("aten::mul", "elementwise, reductions"),
    ):
        assert kind_of(name) == kind
