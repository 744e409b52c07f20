"""Faults in training: full disks, too little memory, non-finite losses."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Ranks, one_line_error, run_cli
from networks import make_model
from runs import assert_same, command, full_disk, metrics, newest, start, tensors

from fastdiss_cli.checkpoints import checkpoint
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.decoding.selection import by_score
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.difformer import Difformer
from fastdiss_cli.models.registry import Hypothesis, Loss
from fastdiss_cli.training import validation


def failing_saves(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Make the saves of these numbers run out of disk space, after half the file."""
    right, count = checkpoint.save_file, [0]

    def save_file(tensors: object, path: Path, metadata: object) -> None:
        count[0] += 1
        if count[0] not in calls:
            return right(tensors, path, metadata)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_file)


# saves


def test_a_periodic_save_that_fails_warns_and_training_goes_on(
    data_bin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = {"save_interval_updates": 2, "max_update": 7, "validate_interval_updates": 100}
    start(data_bin, tmp_path / "whole", **options).run()
    capfd.readouterr()
    failing_saves(monkeypatch, {2})
    training = start(data_bin, tmp_path / "hurt", **options)
    saved, right = [], training._save

    def watched(**how: bool) -> bool:
        done = right(**how)
        saved.append(newest(tmp_path / "hurt").progress.update)
        return done

    monkeypatch.setattr(training, "_save", watched)
    assert training.run() == 0
    assert saved == [2, 2, 6, 7]  # the older one is intact, and the next save tries again
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert "checkpoint_last" in warning and "No space left on device" in warning
    assert_same(tmp_path / "whole", tmp_path / "hurt")
    assert not list((tmp_path / "hurt").glob(".*"))


def test_a_last_save_that_fails_is_an_error(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_interval_updates": 2, "max_update": 5, "validate_interval_updates": 100}
    failing_saves(monkeypatch, {3})
    message = one_line_error(run_cli(*command(data_bin, tmp_path, **options)))
    assert "checkpoint_last" in message and "No space left on device" in message
    assert newest(tmp_path).progress.update == 4


def test_a_best_checkpoint_that_was_not_saved_is_not_the_best(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a later one, better than all that are on the disk, would not be kept."""
    scores = iter([1.0, 3.0, 2.0, 1.5])
    monkeypatch.setattr(validation.Validator, "bleu", lambda *_: next(scores))
    failing_saves(monkeypatch, {2})
    training = start(data_bin, tmp_path, validate_interval_updates=2, max_update=8)
    training.run()
    assert (training.progress.best, training.progress.best_update) == (2.0, 6)
    best = checkpoint.Checkpoint.load(tmp_path / "checkpoint_best.safetensors").progress
    assert (best.best, best.update) == (2.0, 6)


def test_a_numbered_checkpoint_that_fails_does_not_forget_the_best(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 2.0])
    monkeypatch.setattr(validation.Validator, "bleu", lambda *_: next(scores))
    (tmp_path / "checkpoint_1_2.safetensors" / "in the way").mkdir(parents=True)
    training = start(data_bin, tmp_path, validate_interval_updates=2, max_update=4, keep_last=9)
    assert training.run() == 0
    assert (training.progress.best, training.progress.best_update) == (3.0, 2)
    best = checkpoint.Checkpoint.load(tmp_path / "checkpoint_best.safetensors").progress
    assert (best.best, best.update) == (3.0, 2)


def test_a_disk_that_is_really_full(data_bin: Path, tmp_path: Path) -> None:
    """The limit on a file's size is reached in the middle of a write."""
    assert run_cli(*command(data_bin, tmp_path, max_update=1)).returncode == 0
    before = tensors(tmp_path)
    more = command(data_bin, tmp_path, max_update=2)
    (done,) = Ranks(1, *more, prepare=partial(full_disk, size=50_000)).results()
    one_line_error(done, "checkpoint_last.safetensors", "cannot write")
    after = tensors(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob(".*"))


def test_a_log_that_cannot_be_written_is_written_later(
    data_bin: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start(data_bin, tmp_path / "whole", max_update=6).run()
    capfd.readouterr()
    training = start(data_bin, tmp_path / "hurt", max_update=6)
    right, path, kept = training.metrics.write, training.metrics.path, tmp_path / "kept"

    def write(figures: dict[str, float]) -> None:
        if figures["update"] == 2:
            path.rename(kept)
            path.mkdir()
        elif figures["update"] == 4:
            path.rmdir()
            kept.rename(path)
        right(figures)

    training.metrics.write = write
    assert training.run() == 0
    assert metrics(tmp_path / "hurt") == metrics(tmp_path / "whole")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 2 and all(f"{path}: cannot write: Is a dir" in w for w in warnings)


def test_a_half_written_line_of_the_log_is_taken_back(data_bin: Path, tmp_path: Path) -> None:
    more = command(data_bin, tmp_path, max_update=9, save_interval_updates=100, valid_sentences=0)
    (done,) = Ranks(1, *more, prepare=partial(full_disk, size=300)).results()
    one_line_error(done, "checkpoint_last")  # the last save finds the disk still full
    assert "metrics.jsonl: cannot write: File too large" in done.stderr
    assert [line["update"] for line in metrics(tmp_path)] == [1]


# memory


def real_failure() -> RuntimeError:
    """Ask torch's allocator for more than any address space holds, and return the error."""
    with pytest.raises(RuntimeError) as failure:
        torch.empty(1 << 58)
    return RuntimeError(str(failure.value))


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    real_failure(),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY, ids=["cuda", "cpu", "windows", "python"])
def test_training_without_memory_names_the_batch_and_the_way_out(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    right, shapes = Difformer.loss, []

    def loss(self, batch, update):
        if update == 3:
            shapes.append((*batch.src_tokens.shape, batch.tgt_tokens.shape[1]))
            raise error
        return right(self, batch, update)

    monkeypatch.setattr(Difformer, "loss", loss)
    more = command(data_bin, tmp_path, save_interval_updates=1)
    message = one_line_error(run_cli(*more))
    B, S, T = shapes[0]
    assert (
        f"out of memory in update 3, in a batch of {B} sentences padded to {S} source x {T} "
        in message
    )
    assert "lower --max-tokens (now 500)" in message and "raise --update-freq" in message
    assert newest(tmp_path).progress.update == 2


SEED, LARGEST = 3, 198  # and the positions of the largest batch of the first epoch


def test_the_largest_batch_is_tried_first(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, sizes = Difformer.loss, []

    def loss(self, batch, update):
        assert (self.training and torch.is_grad_enabled()) or not self.training
        if self.training:
            sizes.append(batch.src_tokens.numel() + batch.tgt_tokens.numel())
        return right(self, batch, update)

    monkeypatch.setattr(Difformer, "loss", loss)
    start(data_bin, tmp_path, max_tokens=100, max_epoch=1, max_update=100, seed=SEED).run()
    assert len(sizes) > 10
    assert sizes[0] == max(sizes) == LARGEST and sizes[0] in sizes[1:]
    assert sizes[1] < sizes[0]  # the first batch of the epoch is another


def test_memory_runs_out_before_the_first_update(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Difformer.loss

    def loss(self, batch, update):
        if batch.src_tokens.numel() + batch.tgt_tokens.numel() == LARGEST:
            raise MEMORY[0]
        return right(self, batch, update)

    monkeypatch.setattr(Difformer, "loss", loss)
    more = command(data_bin, tmp_path, max_tokens=100, seed=SEED)
    one_line_error(run_cli(*more), "in update 1,")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("arch", ["transformer_tiny", "fastdiss_tiny"])
def test_trying_the_largest_batch_changes_no_result(
    data_bin: Path, tmp_path: Path, arch: str
) -> None:
    start(data_bin, tmp_path / "with", arch).run()
    without = start(data_bin, tmp_path / "without", arch)
    without._try_largest_batch = lambda: 0
    without.run()
    assert_same(tmp_path / "with", tmp_path / "without")
    training = start(data_bin, tmp_path / "alone", arch)
    before = {n: t.detach().clone() for n, t in training.model.state_dict().items()}
    training._try_largest_batch()
    assert all(torch.equal(t, before[n]) for n, t in training.model.state_dict().items())
    assert not training.state.optimizer.state
    assert all(p.grad is None for p in training.model.parameters())


def test_generating_without_memory_names_the_batch(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(data_bin, tmp_path, max_update=1).run()
    path = tmp_path / "checkpoint_last.safetensors"

    def decode(*_: object) -> None:
        raise MEMORY[0]

    monkeypatch.setattr(Difformer, "decode", decode)
    message = one_line_error(run_cli("generate", data_bin, "--path", path, "--max-tokens", "100"))
    assert "out of memory decoding a batch of" in message and "--max-tokens (now 100)" in message


def test_validation_without_memory_is_reported_too(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Difformer.loss

    def loss(self, batch, update):
        if not self.training:
            raise MEMORY[1]
        return right(self, batch, update)

    monkeypatch.setattr(Difformer, "loss", loss)
    one_line_error(run_cli(*command(data_bin, tmp_path)), "out of memory in the validation of")


def test_a_bug_in_a_loss_is_one_line_with_its_place(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_: object) -> None:
        raise ValueError("no\nsuch thing")

    monkeypatch.setattr(Difformer, "loss", loss)
    message = one_line_error(run_cli(*command(data_bin, tmp_path)))
    assert "ValueError: no such thing (test_faults.py:" in message and "update 1" in message
    monkeypatch.setenv("FASTDISS_TRACEBACK", "1")
    done = run_cli(*command(data_bin, tmp_path))
    assert done.returncode == 1 and 'raise ValueError("no' in done.stderr


def test_the_place_of_a_bug_is_not_in_torch(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Difformer, "loss", lambda *_: torch.nn.Linear(3, 4)(torch.zeros(2, 5)))
    assert "cannot be multiplied (2x5 and 3x4) (test_faults.py:" in one_line_error(
        run_cli(*command(data_bin, tmp_path))
    )


# numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_skips_the_update_despite_a_finite_gradient(
    data_bin: Path, tmp_path: Path, value: float
) -> None:
    training = start(data_bin, tmp_path, max_update=3, ema_decay=0.5, validate_interval_updates=99)
    right, kept = training.model.loss, []

    def wrong(batch, update):
        loss = right(batch, update)
        if update == 2:
            kept.append([p.detach().clone() for p in training.model.parameters()])
            return Loss(loss.total + value, loss.parts)  # adding a constant changes no gradient
        if update == 3:
            kept.append([p.detach().clone() for p in training.model.parameters()])
        return loss

    training.model.loss = wrong
    training.validator = None
    training.run()
    before, after = kept
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (training.progress.skipped, training.progress.skipped_in_a_row) == (1, 0)
    lines = metrics(tmp_path)
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert "loss" not in lines[1] and lines[2]["skipped"] == 1


def test_a_non_finite_validation_loss_is_null_in_the_log(data_bin: Path, tmp_path: Path) -> None:
    training = start(data_bin, tmp_path, max_update=3, validate_interval_updates=1)
    right = training.model.loss

    def wrong(batch, update):
        loss = right(batch, update)
        broken = update == 2 and not training.model.training
        return Loss(loss.total + math.inf, loss.parts) if broken else loss

    training.model.loss = wrong
    training.run()
    valid = [line["loss"] for line in metrics(tmp_path) if line["split"] == "valid"]
    assert valid[1] is None and None not in (valid[0], valid[2])
    assert run_cli("plot", tmp_path, "-o", tmp_path / "curves.svg").returncode == 0


def test_weights_that_may_be_broken_take_the_place_of_no_checkpoint(
    data_bin: Path, tmp_path: Path
) -> None:
    """Saves, validations and signals wait for the next update that is not skipped."""
    often = {"save_interval_updates": 1, "validate_interval_updates": 2, "keep_last": 9}

    def run(folder: Path, stop_after: int = 0) -> list[int]:
        """Return, before each update, the newest one that is saved."""
        training = start(data_bin, folder, max_update=9, max_skipped=4, **often)
        right, saved = training.model.loss, []

        def wrong(batch, update):
            loss = right(batch, update)
            if not training.model.training:
                return loss
            saved.append(newest(folder).progress.update if update > 1 else 0)
            if update == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            skipped = update in (3, 4) or update > 6
            return Loss(loss.total * math.nan, loss.parts) if skipped else loss

        training.model.loss = wrong
        training._try_largest_batch = lambda: 0
        training.run()
        return saved

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole) == [0, 1, 2, 2, 2, 5, 6, 6, 6]
    validated = [line["update"] for line in metrics(whole) if line["split"] == "valid"]
    assert validated == [2, 5, 6, 9]  # at the end there is no later one
    assert newest(whole).progress.update == 9
    assert run(parts, stop_after=3) == [0, 1, 2, 2, 2]
    assert newest(parts).progress.update == 5  # nothing is lost
    assert run(parts) == [5, 6, 6, 6]
    assert_same(whole, parts)


def test_what_ends_diverged_takes_the_place_of_no_checkpoint(
    data_bin: Path, tmp_path: Path
) -> None:
    """Without validation, training goes on until an update is not skipped or too many are."""
    often = {"save_interval_updates": 1, "validate_interval_updates": 99}
    for folder, validated in ((tmp_path / "a", True), (tmp_path / "b", False)):
        training = start(data_bin, folder, max_update=4, max_skipped=4, **often)
        right = training.model.loss
        training.model.loss = lambda batch, update, right=right: Loss(
            right(batch, update).total * (math.nan if update > 2 else 1)
        )
        training._try_largest_batch = lambda: 0
        if not validated:
            training.validator = None
        with pytest.raises(FastdissError, match=r"finite: lower --lr.* is from update 2$"):
            training.run()
        assert newest(folder).progress.update == 2


def test_a_save_and_the_end_wait_for_an_update_that_is_not_skipped(
    data_bin: Path, tmp_path: Path
) -> None:
    training = start(data_bin, tmp_path, max_update=5, save_interval_updates=2)
    right, saved, before = training.model.loss, training.state.save, []
    training.model.loss = lambda batch, update: Loss(
        right(batch, update).total * (math.nan if update in (2, 5) else 1)
    )
    training.state.save = lambda *given: before.append(training.progress.update) or saved(*given)
    training.validator = None
    training._try_largest_batch = lambda: 0
    assert training.run() == 0
    assert before == [3, 4, 6] and newest(tmp_path).progress.update == 6


def test_a_model_that_has_diverged_gives_no_answers() -> None:
    for family in ("transformer", "fastdiss"):
        model = make_model(family)
        for p in model.parameters():
            p.data.fill_(math.nan)
        runs = [Run(model.Decoding())]
        with pytest.raises(FastdissError, match="the model's output is not finite"):
            SequenceGenerator(model, by_score, 100).decode([[5, 6, 2]], runs)
    model = make_model("fastdiss")  # and if it is a single candidate
    one, other = (Hypothesis([5], score, [score], 1) for score in (-1.0, math.nan))
    model.decode = lambda *_: [[one, other]]
    with pytest.raises(FastdissError, match="the model's output is not finite"):
        SequenceGenerator(model, by_score, 100).decode([[5, 6, 2]], [Run(model.Decoding())])


def test_training_continues_without_a_working_stderr(data_bin: Path, tmp_path: Path) -> None:
    """stderr is a full disk, or a pipe whose reader is gone."""
    read, closed = os.pipe()
    os.close(read)
    for name, log in (("full", os.open("/dev/full", os.O_WRONLY)), ("closed", closed)):
        words = map(str, command(data_bin, tmp_path / name, max_update=3))
        done = subprocess.run([sys.executable, "-m", "fastdiss_cli", *words], stderr=log)
        os.close(log)
        assert done.returncode == 0
        assert newest(tmp_path / name).progress.update == 3


def test_non_finite_losses_are_bounded(data_bin: Path, tmp_path: Path) -> None:
    training = start(data_bin, tmp_path, max_skipped=3)
    right = training.model.loss
    training.model.loss = lambda *of: Loss(right(*of).total + math.inf)
    with pytest.raises(FastdissError, match="3 updates in a row"):
        training.run()
