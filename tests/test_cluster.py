"""Several machines: the SLURM script, with two processes on loopback in place of a cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_ranks
from runs import assert_same, command, newest

SCRIPT = Path(__file__).parent.parent / "recipes" / "slurm" / "train.sbatch"
STAND_INS = {
    "torchrun": f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
    # two machines of one process each; like the real one it forwards signals to what it started
    "srun": """#!/usr/bin/env bash
tasks=() code=0
for machine in 0 1; do
    "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do
    until wait "$task" || ! kill -0 "$task" 2> /dev/null; do :; done
    wait "$task" || code=$?
done
exit "$code"
""",
    "scontrol": '#!/bin/sh\n[ "$1" = show ] && echo localhost && exit\necho "$@" >> "$CALLS"\n',
}


class Cluster:
    """A folder with stand-ins for what the script calls.

    Attributes:
        job: the number of its jobs.
        calls: the file that records the calls to the scheduler.
    """

    def __init__(self, folder: Path) -> None:
        self.calls, self._bin = folder / "calls", folder / "bin"
        self._bin.mkdir()
        for name, content in STAND_INS.items():
            (self._bin / name).write_text(content)
            (self._bin / name).chmod(0o755)
        self.job = next(number for number in range(os.getpid() % 9000, 10_000) if is_free(number))

    def submit(self, *args: str | Path) -> subprocess.Popen[str]:
        """Start the script with the options of `train`, as sbatch would."""
        env = {
            **os.environ, "PATH": f"{self._bin}:{os.environ['PATH']}", "CALLS": str(self.calls),
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,localhost",
            "SLURM_JOB_ID": str(self.job),
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, args)],
            env=env, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def is_free(job: int) -> bool:
    """Return whether the port is free that the script uses for a job of this number."""
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", 20_000 + job)) != 0


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.slow
def test_two_machines_leave_what_one_leaves(
    data_bin: Path, tmp_path: Path, cluster: Cluster
) -> None:
    options = {"max_update": 6, "validate_interval_updates": 4, "max_tokens": 120}
    for done in run_ranks(2, *command(data_bin, tmp_path / "one", **options)):
        assert done.returncode == 0, done.stderr
    job = cluster.submit(*command(data_bin, tmp_path / "two", **options)[1:])
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert_same(tmp_path / "one", tmp_path / "two")
    assert not cluster.calls.exists()


@pytest.mark.slow
def test_before_the_time_limit_it_saves_and_goes_back_into_the_queue(
    data_bin: Path, tmp_path: Path, cluster: Cluster
) -> None:
    more = {"max_update": 100_000, "valid_sentences": 0, "save_interval_updates": 100_000}
    job = cluster.submit(*command(data_bin, tmp_path / "c", **more)[1:])
    log = tmp_path / "c" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert cluster.calls.read_text() == f"requeue {cluster.job}\n"
    update = newest(tmp_path / "c").progress.update
    assert f"stopped by signal {signal.SIGTERM} after update {update:,}; saved" in output
