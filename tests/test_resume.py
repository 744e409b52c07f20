"""Exact resume: a killed or stopped run gives, byte for byte, the same as an uninterrupted one."""

from __future__ import annotations

import re
import signal
from functools import partial
from pathlib import Path

import pytest
from conftest import Ranks, one_line_error, run_cli, run_ranks, write_pairs
from runs import NETWORK, assert_same, command, metrics, newest, signalled, start

from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.errors import FastdissError

# dropout is on; the log's lines, the saves, the validations and the epochs all end elsewhere
HARD = {
    "update_freq": 2, "max_tokens": 150, "dtype": "bfloat16", "log_interval": 4,
    "save_interval_updates": 3, "validate_interval_updates": 2, "patience": 4, "max_update": 99,
    "lr": 3.0,  # so high that the loss rises: bad validations
}  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2])
def unbroken(
    request: pytest.FixtureRequest, data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """Return a number of processes, and the result of an undisturbed training with them."""
    folder = tmp_path_factory.mktemp("unbroken")
    for done in run_ranks(request.param, *command(data_bin, folder, **HARD)):
        assert done.returncode == 0, done.stderr
    progress = newest(folder).progress
    assert progress.bad_validations == HARD["patience"] and progress.update == 10
    assert "dropout" not in NETWORK
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_broken_training_goes_on_as_if_unbroken(
    data_bin: Path, tmp_path: Path, unbroken: tuple[int, Path], number: int
) -> None:
    """Accumulation, bfloat16, mid-epoch, mid-line of the log, with bad validations counted."""
    count, whole = unbroken
    wound = partial(signalled, on=count - 1, update=7, number=number)
    broken = Ranks(count, *command(data_bin, tmp_path, **HARD), prepare=wound).results()
    if number == signal.SIGTERM:
        assert [done.returncode for done in broken] == [128 + number] * count
        assert newest(tmp_path).progress.update == 7
    else:
        assert [done.returncode for done in broken] == [1, -number][-count:]
        if count > 1:
            one_line_error(broken[0], "another process has ended")
        assert newest(tmp_path).progress.update == 6
    assert newest(tmp_path).progress.bad_validations == 2
    assert newest(tmp_path).progress.batch > 0
    for done in run_ranks(count, *command(data_bin, tmp_path, **HARD)):
        assert done.returncode == 0, done.stderr
    assert_same(whole, tmp_path)


def test_a_validation_that_a_kill_undid_is_logged_once(data_bin: Path, tmp_path: Path) -> None:
    """Stopped before a validation; the resumed run was killed between its log line and its save."""
    training = start(data_bin, tmp_path, max_update=1)
    training.stop.signal = signal.SIGTERM
    training._try_largest_batch = lambda: 0
    assert training.run() == signal.SIGTERM
    training = start(data_bin, tmp_path, max_update=1)
    assert training.progress.validation_due
    training._save = lambda **_: True
    assert training.run() == 0
    assert [line["split"] for line in metrics(tmp_path)] == ["train", "valid"]
    assert start(data_bin, tmp_path, max_update=1).run() == 0
    assert [line["split"] for line in metrics(tmp_path)] == ["train", "valid"]


def other_data(data_bin: Path, folder: Path) -> Path:
    """Return another corpus with the same tokenizer."""
    write_pairs(folder / "other", 50, seed=7)
    done = run_cli(
        "preprocess", "-s", "de", "-t", "en", "--destdir", folder / "bin",
        "--trainpref", folder / "other", "--validpref", folder / "other",
        "--tokenizer", data_bin / "tokenizer.src",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "train.seed was 1 and is now 2"),
        ({"max_tokens": 400}, "train.max_tokens was 500 and is now 400"),
        ({"update_freq": 2}, "train.update_freq was 1 and is now 2"),
        ({"lr": 1e-3}, "train.lr was 0.0005 and is now 0.001"),
        ({"ema_decay": 0.9}, "train.ema_decay was 0.9999 and is now 0.9"),
        ({"dtype": "bfloat16"}, "train.dtype was float32 and is now bfloat16"),
        ({"data": True}, "dataset was "),
        ({"processes": 2}, "processes was 1 and is now 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changes_the_result_is_refused_or_accepted(
    data_bin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    message: str,
) -> None:
    given = set(change)
    start(data_bin, tmp_path / "c", max_update=1).run()
    if change.pop("data", None):
        before = BinarizedDataset(data_bin).hash
        data_bin = other_data(data_bin, tmp_path)
        message += f"{before[:16]} and is now {BinarizedDataset(data_bin).hash[:16]}"
    if processes := change.pop("processes", None):
        monkeypatch.setenv("WORLD_SIZE", str(processes))  # no group is made: nothing is run
    with pytest.raises(FastdissError) as refused:
        start(data_bin, tmp_path / "c", **change)
    assert message in str(refused.value) and "--accept-changes" in str(refused.value)
    assert "\n" not in str(refused.value)
    capsys.readouterr()
    resumed = start(data_bin, tmp_path / "c", **change, max_update=2, accept_changes=True)
    assert message in capsys.readouterr().err
    assert resumed.progress.update == 1
    others = bool({"data", "processes", "seed", "max_tokens"} & given)
    assert (resumed.progress.epoch, resumed.progress.batch) == ((2, 0) if others else (1, 1))
    if not processes:
        assert resumed.run() == 0


def test_what_changes_no_result_is_not_asked_about(data_bin: Path, tmp_path: Path) -> None:
    start(data_bin, tmp_path, max_update=1).run()
    more = {"max_update": 2, "max_epoch": 9, "patience": 5, "keep_last": 0, "log_interval": 7}
    more |= {"save_interval_updates": 7, "validate_interval_updates": 1, "max_skipped": 3}
    assert start(data_bin, tmp_path, **more).run() == 0
    with pytest.raises(FastdissError, match="lr_scheduler was inverse_sqrt and is now cosine"):
        start(data_bin, tmp_path, lr_scheduler="cosine")


def test_options_that_a_checkpoint_does_not_know_have_their_defaults(
    data_bin: Path, tmp_path: Path
) -> None:
    start(data_bin, tmp_path, max_update=1).run()
    old = newest(tmp_path)
    del old.model_config["length_loss"], old.model_config["source_copy"], old.train_config["dtype"]
    old.save(tmp_path / "checkpoint_last.safetensors")
    with pytest.raises(FastdissError) as refused:  # the family has 0, its sizes 1
        start(data_bin, tmp_path)
    message = str(refused.value)
    assert "settings: model.source_copy was 0.0 and is now 1.0; train.dtype was auto" in message


def test_an_option_of_a_newer_version_is_told_with_its_file(data_bin: Path, tmp_path: Path) -> None:
    start(data_bin, tmp_path, max_update=1).run()
    newer = newest(tmp_path)
    newer.model_config["invented"] = 1
    path = tmp_path / "checkpoint_last.safetensors"
    newer.save(path)
    told = f"{path}: model.invented is not an option of this version"
    with pytest.raises(FastdissError, match=re.escape(told)):
        start(data_bin, tmp_path)
    with pytest.raises(FastdissError, match=re.escape(told)):
        start(data_bin, tmp_path / "next", begin_with=path)


def test_a_cosine_knows_its_end(data_bin: Path, tmp_path: Path) -> None:
    start(data_bin, tmp_path, lr_scheduler="cosine", max_update=1).run()
    with pytest.raises(FastdissError, match="max_update was 1 and is now 2"):
        start(data_bin, tmp_path, lr_scheduler="cosine", max_update=2)
