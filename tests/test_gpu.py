"""A GPU gives the results of a CPU; skipped without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU_ENVIRONMENT, SIZES, run_process
from runs import command

_LOOK = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
HAS_GPU = (
    torch.version.cuda is not None and not subprocess.run(_LOOK, env=GPU_ENVIRONMENT).returncode
)
pytestmark = pytest.mark.slow
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU")

# decodes sentences one by one; prints how many answers of a graph differ from those without one,
# how many from those of a CPU, and how many graphs were captured
ONE_BY_ONE = """
import json, sys
import fastdiss_cli
device, path, *sentences = sys.argv[1:]
gpu, cpu = (fastdiss_cli.load(path, name, "float32") for name in (device, "cpu"))

def answers(translator):
    options = {"steps": 5, "length_beam": 2, "noise_beam": 2}
    return [translator.generate([sentence], **options)[0] for sentence in sentences]

for _ in range(3):
    replayed = answers(gpu)
model = gpu.loaded.model
graphs, model.graphs = model.graphs, None
differ = [sum(a != b for a, b in zip(answers(other), replayed)) for other in (gpu, cpu)]
print(json.dumps([*differ, graphs.captured if graphs else 0]))
"""


def one_by_one(device: str, checkpoint: Path, sentences: list[str]) -> list[int]:
    words = [sys.executable, "-c", ONE_BY_ONE, device, str(checkpoint), *sentences]
    done = subprocess.run(words, capture_output=True, text=True, env=GPU_ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_the_gpu_is_compared_with_runs(data_bin: Path, tmp_path: Path) -> None:
    """On a CPU, so that breakage is not first noticed on a GPU."""
    assert run_process(*command(data_bin, tmp_path, max_update=2)).returncode == 0
    checkpoint = tmp_path / "checkpoint_last.safetensors"
    assert one_by_one("cpu", checkpoint, ["drei", "vier fünf"]) == [0, 0, 0]


@pytest.fixture(scope="module")
def trained(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a training on the GPU that was interrupted and resumed."""
    folder = tmp_path_factory.mktemp("gpu")
    for updates in (150, 300):
        words = command(data_bin, folder, max_update=updates, max_tokens=2000)
        words += ["--device=cuda", "--accept-changes"]
        done = run_process(*words, environment=GPU_ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    return folder


@needs_gpu
def test_a_training_goes_on_and_learns(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(losses) == 300
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@needs_gpu
def test_replayed_and_launched_and_on_a_cpu_the_answers_are_the_same(
    trained: Path, corpus: Path
) -> None:
    sentences = (corpus / "test.de").read_text().splitlines()
    checkpoint = trained / "checkpoint_best.safetensors"
    launched, on_cpu, graphs = one_by_one("cuda", checkpoint, sentences)
    assert graphs > 0
    assert max(launched, on_cpu) <= SIZES["test"] // 10  # near ties are rounded either way


@needs_gpu
@pytest.mark.parametrize(
    ("arch", "options"), [("difformer_tiny", ["--early-exit"]), ("transformer_tiny", [])]
)
def test_bfloat16_and_compiled(
    arch: str, options: list[str], data_bin: Path, tmp_path: Path
) -> None:
    words = command(data_bin, tmp_path, arch, dtype="bfloat16", compile="true")
    done = run_process(*words, "--device=cuda", environment=GPU_ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    words = ["generate", data_bin, "--path", tmp_path, "--dtype=bfloat16", *options]
    done = run_process(*words, environment=GPU_ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nH-") + done.stdout.startswith("H-") == SIZES["test"]
