"""Several processes: they fail, stop and end together, and generate what a single one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import one_line_error, run_cli, run_ranks
from runs import (
    assert_same,
    blind,
    command,
    failing,
    metrics,
    newest,
    read_only,
    signalled_in_batch,
    signalled_in_validation,
    start,
)

from fastdiss_cli import device
from fastdiss_cli.decoding.generation import SequenceGenerator
from fastdiss_cli.device import pick_dtype
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError

FULL = {
    "validate_interval_updates": 4, "save_interval_updates": 2, "log_interval": 3,
    "max_tokens": 120,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the result of two undisturbed processes."""
    folder = tmp_path_factory.mktemp("whole")
    for done in run_ranks(2, *command(data_bin, folder, **FULL)):
        assert done.returncode == 0, done.stderr
    return folder


# training


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("memory", "rank 1: out of memory in update 3, in a batch of "),
        ("bug", "ValueError: no such thing (runs.py:"),
    ],
)
def test_a_failure_on_one_rank_is_reported_once_and_ends_all(
    data_bin: Path, tmp_path: Path, how: str, message: str
) -> None:
    wound = partial(failing, on=1, update=3, how=how)
    first, second = run_ranks(2, *command(data_bin, tmp_path, **FULL), prepare=wound)
    assert message in one_line_error(first)
    assert (second.returncode, second.stderr) == (1, "")
    assert newest(tmp_path).progress.update == 2


def test_ranks_that_begin_at_different_updates_do_not_begin(data_bin: Path, tmp_path: Path) -> None:
    few = command(data_bin, tmp_path, **FULL | {"max_update": 2})
    assert [done.returncode for done in run_ranks(2, *few)] == [0, 0]
    more = command(data_bin, tmp_path, **FULL)
    first, second = run_ranks(2, *more, prepare=blind)
    assert "resumes after update 2 and one after 0: it must" in one_line_error(first)
    assert (second.returncode, second.stderr) == (1, "")


def test_a_non_finite_loss_on_one_rank_skips_the_update_on_all(
    data_bin: Path, tmp_path: Path
) -> None:
    wound = partial(failing, on=1, update=3, how="nan")
    for done in run_ranks(2, *command(data_bin, tmp_path, **FULL), prepare=wound):
        assert done.returncode == 0, done.stderr
    assert newest(tmp_path).progress.skipped == 1
    assert [line.get("skipped") for line in metrics(tmp_path) if line["split"] == "train"][-1] == 1


def test_ranks_agree_on_a_save_that_fails(data_bin: Path, tmp_path: Path) -> None:
    """Only the first rank writes; the other must know what is on the disk as well as it does."""
    wound, still = partial(read_only, saves=(2,)), {"lr": 1e-12, "ema_decay": 0}
    options = FULL | still
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    for done in run_ranks(2, *command(data_bin, whole, **options)):
        assert done.returncode == 0, done.stderr
    first, second = run_ranks(2, *command(data_bin, hurt, **options), prepare=wound)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert first.stderr.count("warning") == 1 and "Read-only file system" in first.stderr
    # the first saved one of equals: not that of update 4
    assert newest(hurt).progress.best_update == 8 and newest(whole).progress.best_update == 4
    assert [line["loss"] for line in metrics(hurt)] == [line["loss"] for line in metrics(whole)]


def test_a_last_save_that_fails_ends_all_with_one_line(data_bin: Path, tmp_path: Path) -> None:
    more = command(data_bin, tmp_path, max_update=2)
    first, second = run_ranks(2, *more, prepare=partial(read_only, saves=(1,)))
    one_line_error(first, "Read-only file system")
    assert (second.returncode, second.stderr) == (1, "")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "number"), [("loss", signal.SIGINT), ("bleu", signal.SIGUSR1)])
def test_a_signal_to_any_rank_interrupts_validation(
    data_bin: Path, tmp_path: Path, whole: Path, what: str, number: int
) -> None:
    """It stops between two batches; the validation is done again, and nothing is lost."""
    more = command(data_bin, tmp_path, **FULL)
    wound = partial(signalled_in_validation, on=1, what=what, numbers=(number,))
    stopped = run_ranks(2, *more, prepare=wound)
    assert [done.returncode for done in stopped] == [128 + number] * 2, stopped[0].stderr
    assert f"stopped by signal {number} after update 4; saved" in stopped[0].stderr
    assert "Traceback" not in stopped[0].stderr + stopped[1].stderr
    progress = newest(tmp_path).progress
    assert (progress.update, progress.validation_due, progress.best) == (4, True, None)
    for done in run_ranks(2, *more):
        assert done.returncode == 0, done.stderr
    assert_same(whole, tmp_path)


def test_a_second_signal_stops_at_once(data_bin: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    wound = partial(signalled_in_validation, on=0, what="loss", numbers=numbers)
    (done,) = run_ranks(1, *command(data_bin, tmp_path, **FULL), prepare=wound)
    assert done.returncode == 128 + signal.SIGINT and "Traceback" not in done.stderr
    assert newest(tmp_path).progress.update == 2  # nothing is saved on the way out


def test_ranks_know_the_tokens_of_an_update_without_asking(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    rounds = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        training = start(data_bin, tmp_path, "difformer_tiny", update_freq=3)
        rounds.append([training._next_batches() for _ in range(3)])
    for (ours, tokens), (theirs, same) in zip(*rounds, strict=True):
        assert len(ours) == len(theirs) == 3
        assert tokens == same == sum(map(training.batcher.num_tgt_tokens, ours + theirs))


def test_ranks_draw_different_noise(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    draws = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        training = start(data_bin, tmp_path, "difformer_tiny", update_freq=2)
        monkeypatch.setattr(training.processes, "world_size", 1)  # nobody answers
        right = training.model.loss

        def loss(batch, update, right=right):
            draws.append(torch.initial_seed())
            return right(batch, update)

        training.model.loss = loss
        batches, _ = training._next_batches()
        assert len(batches) == 2
        training._update(batches, 100, rate=1e-4)
        training._update(batches, 100, rate=1e-4)
    assert len(draws) == len(set(draws)) == 8  # each rank, update and micro-batch its own


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FastdissError, match=r"1 GPU.*--nproc-per-node 1.*LOCAL_RANK=0"):
        Processes(torch.device("cuda"))


def test_only_errors_of_the_transport_mean_a_lost_peer() -> None:
    ranks = Processes(torch.device("cpu"))
    ended = "another process has ended"
    with pytest.raises(FastdissError, match=ended), ranks.reporting_lost_peers():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="device-side assert"), ranks.reporting_lost_peers():
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_a_cpu_that_emulates_bfloat16_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    for flags, dtype, told in (
        ("avx2 avx512f", "bfloat16", True), ("avx2", "auto", False),
        ("avx512_bf16", "bfloat16", False), ("asimd bf16", "bfloat16", False),
    ):  # fmt: skip
        (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags} sse\n")
        pick_dtype(dtype, torch.device("cpu"))
        assert ("no instructions for bfloat16" in capsys.readouterr().err) == told


def test_no_gpu_emulates_bfloat16_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    gpu = torch.device("cuda")
    assert pick_dtype("auto", gpu) == torch.float32
    assert pick_dtype("bfloat16", gpu) == torch.bfloat16


@pytest.mark.slow
def test_a_rank_that_dies_under_torchrun_ends_the_others(data_bin: Path, tmp_path: Path) -> None:
    """Real torchrun: one line from the survivor, no traceback of ours, within a minute."""
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--log-dir", tmp_path / "log", "--redirects", "3", "-m", "fastdiss_cli",
        *command(data_bin, tmp_path / "c", max_update=100_000, valid_sentences=0),
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, launch)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = tmp_path / "c" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    victim = next(pid for pid in children(process.pid) if rank_of(pid) == "1")
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait(timeout=120) == 1
    assert time.monotonic() - killed < 60
    (output,) = (tmp_path / "log").glob("*/attempt_0/0/stderr.log")
    lines = output.read_text().splitlines()
    assert "Traceback" not in output.read_text()
    (line,) = [line for line in lines if line.startswith("fastdiss: error: ")]
    assert "rank 0 of 2: another process has ended" in line and lines[-1] == line


def test_a_weight_that_no_rank_has_a_gradient_for_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Zeros would let AdamW decay it, unlike in one process. The other rank is simulated."""
    both, other, none = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    both.grad = torch.full((2,), 3.0)
    theirs = torch.tensor([1.0, 1.0, 5.0, 5.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.add_(theirs))
    processes = Processes(torch.device("cpu"))
    processes.world_size = 2
    assert processes.sum_gradients([both, other, none], failed=False) == 1  # the other rank
    assert both.grad.tolist() == [4, 4] and other.grad.tolist() == [5, 5] and none.grad is None


@pytest.mark.parametrize(("error", "code"), [("FastdissError('no')", 1), ("SystemExit(143)", 143)])
def test_a_rank_that_fails_alone_is_not_aborted_by_torchs_threads(error: str, code: int) -> None:
    """Neither the interpreter's shutdown (here an abort) nor torchrun's signal stops the line."""
    script = f"""
import atexit, os, signal, sys, torch
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError
atexit.register(os.abort)
try:
    with Processes(torch.device("cpu")) as processes:
        processes.world_size = 2
        raise {error}
except FastdissError as error:
    os.kill(os.getpid(), signal.SIGTERM)
    print("error:", error)
    sys.exit(1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout == ("error: no\n" if code == 1 else "")


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str | None:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)


# generating


@pytest.fixture(scope="module")
def trained(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert run_cli(*command(data_bin, folder, max_update=5)).returncode == 0
    return folder / "checkpoint_last.safetensors"


def without_times(text: str) -> str:
    """Return output without its summary, which has timings."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("Generate "))


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_what_one_writes(
    data_bin: Path, trained: Path, tmp_path: Path, count: int
) -> None:
    generate = ["generate", data_bin, "--path", trained, "--device=cpu", "--print-history"]
    more = ["--steps", "1,3", "--noise-beam", "2", "--buffer-size", "11", "--max-tokens", "60"]
    one = run_cli(*generate, *more, "--results-path", tmp_path / "one")
    first, *others = run_ranks(count, *generate, *more, "--results-path", tmp_path / "many")
    assert one.returncode == first.returncode == 0, first.stderr
    assert all((done.returncode, done.stdout, done.stderr) == (0, "", "") for done in others)
    for name in ("generate-test.steps1.txt", "generate-test.steps3.txt"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("one", "many")]
        assert without_times(texts[0]) == without_times(texts[1])
        assert "E-19_1\t" in texts[1]
        summaries = [text.splitlines()[-1] for text in texts]
        assert summaries[0].split(" sentences in ")[0] == summaries[1].split(" sentences in ")[0]
    assert not list((tmp_path / "many").glob(".*"))
    columns = [row.split()[:3] for row in one.stdout.splitlines()]
    assert columns == [row.split()[:3] for row in first.stdout.splitlines()]


def test_ranks_wait_for_stdin_as_long_as_it_takes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[timedelta | None] = []

    def refuse(backend: str, timeout: timedelta | None, device_id: None) -> None:
        given.append(timeout)
        raise ValueError("enough is known")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "in").write_text("drei\n")
    for text in ("-", tmp_path / "in"):
        run_cli("generate", "--path", trained, "--device=cpu", "--input", text, stdin="drei\n")
    stdin, file = given
    assert stdin.days > 30 and file is None


def test_several_processes_share_raw_text_on_stdout(trained: Path, tmp_path: Path) -> None:
    """There are more processes than batches: one of them has nothing to do."""
    (tmp_path / "in").write_text("drei\nvier fünf\nnull\n")
    generate = ["generate", "--path", trained, "--input", tmp_path / "in", "--device=cpu"]
    one = run_cli(*generate)
    first, second = run_ranks(2, *generate)
    assert first.returncode == second.returncode == 0, first.stderr
    assert without_times(first.stdout) == without_times(one.stdout) and second.stdout == ""


def test_an_invalid_line_is_reported_once(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"drei\n\xff\n")
    generate = ["generate", "--path", trained, "--input", tmp_path / "in", "--device=cpu"]
    first, second = run_ranks(2, *generate)
    one_line_error(first, "rank 0: ", "line 2", "is not valid UTF-8")
    assert (second.returncode, second.stderr) == (1, "")


@pytest.mark.parametrize("at", [1, 3])  # in the warm-up, and in earnest
def test_memory_that_runs_out_on_one_rank_of_generate(
    data_bin: Path, trained: Path, at: int
) -> None:
    generate = ["generate", data_bin, "--path", trained, "--device=cpu", "--max-tokens", "90"]
    first, second = run_ranks(2, *generate, prepare=partial(no_memory_to_decode, on=1, at=at))
    one_line_error(first, "rank 1: out of memory decoding a batch of ", "--max-tokens (now 90)")
    assert (second.returncode, second.stderr) == (1, "")


def no_memory_to_decode(rank: int, on: int, at: int) -> None:
    from fastdiss_cli.decoding import translation
    from fastdiss_cli.models.difformer import Difformer

    translation.WARM_UP = 2  # of 20 sentences
    right, calls = Difformer.decode, []

    def decode(self, memory, sentences, *more):
        calls.append(sentences)
        if rank == on and len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(self, memory, sentences, *more)

    Difformer.decode = decode


@pytest.mark.parametrize("number", [3, 6])
def test_a_signal_in_a_window_of_several_ranks_leaves_no_gap(
    data_bin: Path, trained: Path, number: int
) -> None:
    """The batches are sorted by length, so what is done by then is anywhere in the window."""
    generate = ["generate", data_bin, "--path", trained, "--device=cpu", "--max-tokens", "60"]
    whole = run_cli(*generate).stdout
    first, second = run_ranks(2, *generate, prepare=partial(first_is_signalled, number=number))
    assert (first.returncode, second.returncode, second.stdout) == (143, 143, ""), first.stderr
    assert whole.startswith(first.stdout) and len(first.stdout) < len(whole)


def first_is_signalled(rank: int, number: int) -> None:
    """Send the first rank a signal in its n-th batch; the other one goes on to its last."""
    if rank == 0:
        signalled_in_batch(rank, 0, number, (signal.SIGTERM,))


def test_a_signal_to_any_rank_ends_generate(data_bin: Path, trained: Path) -> None:
    generate = ["generate", data_bin, "--path", trained, "--device=cpu", "--buffer-size", "6"]
    whole = run_cli(*generate).stdout
    wound = partial(signalled_in_batch, on=0, number=2, signals=(signal.SIGUSR1,))
    first, second = run_ranks(2, *generate, prepare=wound)
    assert (first.returncode, second.returncode) == (138, 138), first.stderr
    assert whole.startswith(first.stdout) and first.stdout.splitlines()[-1].startswith("I-11\t")
    assert "stopped by signal 10; sentences written: 12 of 20" in first.stderr
    assert second.stdout == second.stderr == ""


def test_what_is_noticed_before_the_ranks_meet_is_told_once(data_bin: Path, trained: Path) -> None:
    generate = ["generate", data_bin, "--path", trained, "--device=cpu", "--select", "mbr"]
    first, second = run_ranks(2, *generate)
    assert "--select has no effect" in first.stderr and second.stderr == ""


def test_the_time_of_a_run_is_that_of_its_slowest_rank(data_bin: Path, trained: Path) -> None:
    generate = ["generate", data_bin, "--path", trained, "--device=cpu"]
    first, _ = run_ranks(2, *generate, prepare=slow_clock)
    assert " 20 sentences in 70.0 s, 0.286 sentences/s" in first.stdout


def slow_clock(rank: int) -> None:
    """Make decoding take 7 s per batch on the first rank and 70 s on the second."""
    right = SequenceGenerator.decode

    def decode(self, sources, runs, *more):
        right(self, sources, runs, *more)
        for run in runs:
            run.seconds = 70.0 if rank else 7.0

    SequenceGenerator.decode = decode


def test_wrong_usage_is_reported_once(data_bin: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, *command(data_bin, tmp_path / "c"), "--lr", "-1")
    assert "--lr must be above 0" in one_line_error(first, code=2)
    assert (second.returncode, second.stderr) == (2, "")


def test_half_of_torchrun_is_one_line(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(data_bin, tmp_path / "c")
    monkeypatch.setenv("RANK", "first")
    one_line_error(run_cli(*line), "RANK is 'first', not a number: use torchrun")
    monkeypatch.setenv("RANK", "1")
    one_line_error(run_cli(*line), "RANK is 1 but WORLD_SIZE is 1: start the processes")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "0")
    one_line_error(run_cli(*line), "RANK is 0 but WORLD_SIZE is 0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    one_line_error(run_cli(*line), "WORLD_SIZE is 2, but", "MASTER_ADDR", "torchrun, or unset")
