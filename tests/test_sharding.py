"""Sharding: each rank holds its part, and learns the same as ranks that hold everything."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import one_line_error, run_cli, run_ranks
from runs import (
    assert_same,
    command,
    failing,
    metrics,
    newest,
    signalled,
    start,
    tensors,
)
from torch import nn

from fastdiss_cli.checkpoints.folder import BEST
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.layers import Layer, NetworkConfig
from fastdiss_cli.training.sharding import shard

# dropout and accumulation are on; saves and validations end elsewhere
SHARDED = {
    "shard": True, "update_freq": 2, "max_tokens": 150, "max_update": 6, "ema_decay": 0.9,
    "save_interval_updates": 3, "validate_interval_updates": 4,
}  # fmt: skip
WHOLE = SHARDED | {"shard": False}
# each rank makes its first pass or does not; its target embeddings are divided unevenly
COIN = {"arch": "difformer_tiny", "max_update": 4, "valid_sentences": 0}

divides = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 cannot shard on a CPU"
)


@pytest.fixture(scope="module")
def sharded(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the result of two undisturbed, sharded processes."""
    folder = tmp_path_factory.mktemp("sharded")
    train(data_bin, folder, prepare=partial(weighed, folder=folder), **SHARDED)
    return folder


@pytest.fixture(scope="module")
def whole(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the result of the same two processes if each holds everything."""
    folder = tmp_path_factory.mktemp("whole")
    train(data_bin, folder, **WHOLE)
    return folder


def train(data_bin: Path, folder: Path, *, prepare=None, **options: object) -> str:
    """Train with two processes to the end; return the messages of the first one."""
    first, second = run_ranks(2, *command(data_bin, folder, **options), prepare=prepare)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "Warning" not in first.stderr + second.stderr
    return first.stderr


def assert_close(one: Path, other: Path) -> None:
    """Compare two trainings that summed in different orders.

    Weights are left out: Adam takes full steps even for gradients that are pure rounding errors,
    like those of the keys' biases. Its moments are compared instead.
    """
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.shape, tensor.dtype) == (b[name].shape, b[name].dtype), name
        if "/exp_avg" in name:
            torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-7, msg=name)
    for line, like in zip(metrics(one), metrics(other), strict=True):
        assert line.pop("split") == like.pop("split")
        assert line == pytest.approx(like, rel=1e-5)


def weighed(rank: int, folder: Path) -> None:
    """Make a rank record, after each update, how many numbers it has in memory."""
    from fastdiss_cli.training.loop import Training

    right = Training._update

    def update(self, *given):
        done = right(self, *given)
        kinds = {
            "weights": self.model.parameters(),
            "gradients": [p.grad for p in self.model.parameters()],
            "moments": [state["exp_avg"] for state in self.state.optimizer.state.values()],
            "average": self.state.ema.weights.values(),
        }
        held = {}
        for kind, own in kinds.items():
            storages = {s.data_ptr(): s for s in (t.to_local().untyped_storage() for t in own)}
            held[kind] = sum(s.nbytes() // 4 for s in storages.values())
        (folder / f"held{rank}.json").write_text(json.dumps(held))
        return done

    Training._update = update


@divides
def test_a_rank_holds_its_part_only(sharded: Path) -> None:
    first, second = (json.loads((sharded / f"held{rank}.json").read_text()) for rank in (0, 1))
    whole = sum(t.numel() for name, t in tensors(sharded).items() if name.startswith("model."))
    for kind in ("weights", "gradients", "moments", "average"):
        assert whole <= first[kind] + second[kind] < 1.02 * whole, kind  # what is odd has padding
        assert max(first[kind], second[kind]) < 0.52 * whole, kind


@divides
def test_sharded_is_unsharded(sharded: Path, whole: Path) -> None:
    assert_close(sharded, whole)


@divides
def test_ranks_need_not_make_the_same_passes(data_bin: Path, tmp_path: Path) -> None:
    """A non-finite loss on one of them skips the update on all."""
    wound = partial(failing, on=1, update=3, how="nan")
    for name, options in (("sharded", SHARDED), ("whole", WHOLE)):
        output = train(data_bin, tmp_path / name, prepare=wound, **options | COIN)
        assert "update 3: loss or gradient is not finite; skipped" in output
        assert newest(tmp_path / name).progress.skipped == 1
    assert_close(tmp_path / "sharded", tmp_path / "whole")


@divides
def test_a_broken_training_goes_on_as_if_unbroken(
    data_bin: Path, tmp_path: Path, sharded: Path
) -> None:
    """It is asked to stop, resumes, is killed, and resumes."""
    more = command(data_bin, tmp_path, **SHARDED)
    asked = run_ranks(2, *more, prepare=partial(signalled, on=1, update=2))
    assert [done.returncode for done in asked] == [143, 143], asked[0].stderr
    assert newest(tmp_path).progress.update == 2
    wound = partial(signalled, on=1, update=5, number=signal.SIGKILL)
    first, _ = run_ranks(2, *more, prepare=wound)
    one_line_error(first, "rank 0: another process has ended")
    assert newest(tmp_path).progress.update == 4
    train(data_bin, tmp_path, **SHARDED)
    assert_same(sharded, tmp_path)


@divides
def test_a_checkpoint_generates(data_bin: Path, sharded: Path) -> None:
    done = run_cli("generate", data_bin, "--path", sharded / BEST, "--device=cpu")
    assert done.returncode == 0 and " 20 sentences in " in done.stdout, done.stderr


@divides
def test_a_training_goes_on_sharded_or_not(
    data_bin: Path, tmp_path: Path, sharded: Path, whole: Path
) -> None:
    for before, options in ((sharded, WHOLE), (whole, SHARDED)):
        folder = tmp_path / before.name
        shutil.copytree(before, folder)
        assert "resuming" in train(data_bin, folder, **options | {"max_update": 7})
        assert newest(folder).progress.update == 7
    one, other = (tmp_path / before.name for before in (sharded, whole))
    assert_close(one, other)
    with pytest.raises(FastdissError, match="processes was 2 and is now 1"):
        start(data_bin, other, **WHOLE)
    alone = start(data_bin, other, **WHOLE | {"max_update": 8}, accept_changes=True)
    assert alone.run() == 0 and newest(other).progress.update == 8


@divides
def test_memory_that_runs_out_in_the_middle_of_a_pass(data_bin: Path, tmp_path: Path) -> None:
    """The others wait for a part of the gradient, and notice the rank that is gone."""
    first, second = run_ranks(2, *command(data_bin, tmp_path, **SHARDED), prepare=no_memory)
    one_line_error(first, "rank 0: another process has ended")
    one_line_error(second, "rank 1: out of memory in update 3, in a batch of ", "--max-tokens")


def no_memory(rank: int) -> None:
    from fastdiss_cli.models.fastdiss import FastDiSS
    from fastdiss_cli.models.layers import Decoder

    right_loss, right, updates = FastDiSS.loss, Decoder.forward, []

    def loss(self, batch, update):
        updates.append(update)
        return right_loss(self, batch, update)

    def forward(self, *given, **more):
        if rank == 1 and self.training and updates[-1] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(self, *given, **more)

    FastDiSS.loss, Decoder.forward = loss, forward


def test_one_process_has_nothing_to_divide(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, divided in (("sharded", True), ("whole", False)):
        training = start(data_bin, tmp_path / folder, max_update=2, shard=divided)
        assert training.run() == 0
    assert "train.shard has no effect in a single process" in capsys.readouterr().err
    assert_same(tmp_path / "sharded", tmp_path / "whole")


def test_what_cannot_be_sharded_is_refused(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = command(data_bin, tmp_path, shard=True, compile=True)
    one_line_error(run_cli(*refused), "--set train.shard must be false with compile", code=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes = Processes(torch.device("cpu"))
    with pytest.raises(FastdissError, match="this model has none"):
        shard(nn.Linear(2, 2), processes)
    layer = Layer(NetworkConfig(), cross=False)
    layer.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(FastdissError, match="cannot divide scale, which is a scalar"):
        shard(layer, processes)
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)  # as in torch 2.6
    with pytest.raises(FastdissError, match="on a CPU needs a newer torch than "):
        shard(layer, processes)
