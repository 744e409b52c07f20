"""Training: exact resume, learning-rate schedules, averages, skipped updates, early stopping."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli
from runs import CPU, NETWORK, command, metrics, newest, start, tensors
from torch import nn

from fastdiss_cli import logs
from fastdiss_cli.checkpoints.checkpoint import Checkpoint, Progress
from fastdiss_cli.checkpoints.folder import occupied
from fastdiss_cli.checkpoints.loading import load_model
from fastdiss_cli.config import TrainConfig, build
from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.decoding.generation import SequenceGenerator
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models import layers
from fastdiss_cli.models.registry import Hypothesis, Loss, architecture
from fastdiss_cli.training import log, loop, validation
from fastdiss_cli.training.loop import Training
from fastdiss_cli.training.validation import judge


@pytest.mark.parametrize("arch", ["transformer_tiny", "difformer_tiny", "fastdiss_tiny"])
def test_resuming_is_the_same_as_never_stopping(data_bin: Path, tmp_path: Path, arch: str) -> None:
    """Dropout on, gradients accumulated, stopped in the middle of an epoch."""
    options = {"update_freq": 3, "validate_interval_updates": 5}
    start(data_bin, tmp_path / "whole", arch, **options).run()
    start(data_bin, tmp_path / "parts", arch, max_update=7, **options).run()
    resumed = start(data_bin, tmp_path / "parts", arch, **options)
    assert resumed.progress.update == 7 and resumed.progress.batch > 0
    resumed.run()
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    seven = [line for line in metrics(tmp_path / "parts") if line["update"] != 7]
    assert seven == [line for line in metrics(tmp_path / "whole") if line["update"] != 7]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["transformer_tiny", "fastdiss_tiny"])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch itself
def test_a_compiled_network_trains_the_same(
    data_bin: Path, tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch traces the network for all lengths, with a backend that runs it eagerly."""
    graphs, right = [], nn.Module.compile

    def run_as_it_is(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **how: right(self, backend=run_as_it_is, **how)
    )
    monkeypatch.setattr(layers, "dropout", nn.functional.dropout)  # as on a GPU
    for compile in (False, True):
        start(data_bin, tmp_path / str(compile), arch, compile=compile, max_update=6).run()
        assert bool(graphs) == compile
    assert len(graphs) < 12  # not one for each length, nor for each position that is decoded
    plain, compiled = (tensors(tmp_path / str(compile)) for compile in (False, True))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5)


def test_resuming_otherwise_is_refused_with_the_difference(data_bin: Path, tmp_path: Path) -> None:
    start(data_bin, tmp_path, max_update=1).run()
    with pytest.raises(FastdissError, match=r"train.seed was 1 and is now 2") as refused:
        start(data_bin, tmp_path, seed=2)
    assert "--accept-changes" in str(refused.value)
    with pytest.raises(FastdissError, match=r"was trained with different settings") as refused:
        start(data_bin, tmp_path, model={"ffn_dim": 24})  # whose weights have other shapes
    assert str(refused.value).endswith("Train into another --save-dir")
    start(data_bin, tmp_path, max_update=2).run()  # training longer changes no update


def test_options_of_what_is_off_do_not_differ(data_bin: Path, tmp_path: Path) -> None:
    """A recipe may set all options of MANS although its strength is 0."""
    change = {"mans_time": "token", "mans_start_update": 9, "scp_gap": 0.3}
    start(data_bin, tmp_path / "off", "fastdiss_tiny", max_update=1).run()
    more = {"max_update": 2, "model": change}
    assert start(data_bin, tmp_path / "off", "fastdiss_tiny", **more).run() == 0
    on = {"mans_strength": 0.5}
    start(data_bin, tmp_path / "on", "fastdiss_tiny", max_update=1, model=on).run()
    with pytest.raises(FastdissError) as refused:
        start(data_bin, tmp_path / "on", "fastdiss_tiny", model=on | change)
    assert "model.mans_time was sentence and is now token" in str(refused.value)
    assert "model.mans_start_update was 0 and is now 9" in str(refused.value)
    assert "scp_gap" not in str(refused.value)  # t' is step-matched
    with pytest.raises(
        FastdissError, match=r"settings: model.mans_strength was 0.0 and is now 0.5\."
    ):
        start(data_bin, tmp_path / "off", "fastdiss_tiny", model=on | change)


def test_damage_to_the_last_checkpoint_spares_the_others(data_bin: Path, tmp_path: Path) -> None:
    start(data_bin, tmp_path, max_update=2, keep_last=3, save_interval_updates=1).run()
    last, best = (tmp_path / f"checkpoint_{name}.safetensors" for name in ("last", "best"))
    (numbered,) = tmp_path.glob("checkpoint_*_2.safetensors")
    assert last.read_bytes() == best.read_bytes() == numbered.read_bytes()
    assert last.stat().st_nlink == 1 and best.samefile(numbered)


def test_of_another_architecture_the_options_of_both_are_compared(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"noise_factor": 3.0, "max_length_offset": 9}
    start(data_bin, tmp_path, "difformer_tiny", max_update=1, model=changed).run()
    with pytest.raises(
        FastdissError,
        match=r"arch was difformer_tiny and is now fastdiss_tiny; "
        r"model\.noise_factor was 3\.0 and is now 4\.0; model\.self_cond_rate was 0\.5",
    ):
        start(data_bin, tmp_path, "fastdiss_tiny")
    more = {"begin_with": tmp_path, "max_update": 1}
    more["model"] = {"scp_gap": 0.1, "max_length_offset": 9}
    start(data_bin, tmp_path / "second", "fastdiss_tiny", **more)
    told = capsys.readouterr().err
    assert "(difformer_tiny); model.noise_factor was 3.0 and is now 4.0; model.self_cond" in told
    assert "gap" not in told
    start(data_bin, tmp_path / "third", "difformer_tiny", max_update=1).run()
    with pytest.raises(FastdissError) as refused:
        start(data_bin, tmp_path / "third", "transformer_tiny", seed=3)
    message = str(refused.value)
    changed = "arch was difformer_tiny and is now transformer_tiny; train.seed was 1 and is now 3"
    assert f"settings: {changed}. Train" in message
    with pytest.raises(FastdissError, match=r"and \d+ more \(a forgotten --config\?\)"):
        more = {"seed": 3, "lr": 1, "max_tokens": 9, "update_freq": 2, "warmup_updates": 7}
        start(data_bin, tmp_path / "third", "difformer_tiny", **more)


def test_a_new_run_begins_with_the_weights_of_another(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(data_bin, tmp_path / "first", ema_decay=0.5).run()
    load = Checkpoint.load(tmp_path / "first" / "checkpoint_best.safetensors")
    more = {"begin_with": tmp_path / "first", "lr": 1e-12, "max_update": 1}
    more["model"] = {"scp_gap": 0.1, "dropout": 0.2}
    new = start(data_bin, tmp_path / "second", **more)
    told = capsys.readouterr().err
    assert "(fastdiss_tiny); model.dropout was 0.1 and is now 0.2" in told and "gap" not in told
    assert new.progress.update == 0 and not new.state.optimizer.state
    for name, weight in new.model.named_parameters():  # the averaged ones, in the average too
        assert torch.equal(weight, load.averaged()[name])
        assert torch.equal(new.state.ema.weights[name], weight)
    new.run()
    before = tensors(tmp_path / "second")
    start(data_bin, tmp_path / "first", ema_decay=0.5, max_update=14).run()
    capsys.readouterr()
    resumed = start(data_bin, tmp_path / "second", **more)  # the same command goes on
    assert resumed.progress.update == 1
    assert f"{tmp_path / 'first'} is not read again" in capsys.readouterr().err
    assert torch.equal(resumed.model.latent_out.weight, before["model.latent_out.weight"])


def test_weights_that_do_not_fit_are_refused_with_the_options(
    data_bin: Path, tmp_path: Path
) -> None:
    start(data_bin, tmp_path, "difformer_tiny", max_update=1).run()
    more = {"begin_with": tmp_path, "model": {"ffn_dim": 24}}
    changed = f"; model.ffn_dim was {NETWORK['ffn_dim']} and is now 24"
    with pytest.raises(FastdissError, match=r"the weights do not fit the model: .*" + changed):
        start(data_bin, tmp_path / "same", "difformer_tiny", **more)
    with pytest.raises(FastdissError) as refused:
        start(data_bin, tmp_path / "other", "fastdiss_tiny", **more)
    assert "is a difformer_tiny, whose weights do not fit this fastdiss_tiny" in str(refused.value)
    assert changed in str(refused.value)
    assert str(refused.value).endswith(": give --arch difformer_tiny and the same options")


def test_a_new_run_refuses_weights_for_other_tokens(
    data_bin: Path, corpus: Path, tmp_path: Path
) -> None:
    start(data_bin, tmp_path / "first", max_update=1).run()
    other = tmp_path / "other"
    run_cli("preprocess", "-s", "de", "-t", "en", "--destdir", other, "--model-type", "word",
            "--trainpref", corpus / "train")  # fmt: skip
    with pytest.raises(FastdissError, match=r"the source tokenizer of the dataset .* is not"):
        start(other, tmp_path / "second", begin_with=tmp_path / "first")
    with pytest.raises(FastdissError, match=r"the source tokenizer of .*other .* is not"):
        start(other, tmp_path / "first", accept_changes=True)


def test_a_signal_saves_and_a_second_run_goes_on(data_bin: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fastdiss_cli", "train", str(data_bin), "--arch", "difformer_tiny",
        "--save-dir", str(tmp_path), "--max-update", "100000", "--max-tokens", "500",
        *(f"--set=model.{key}={value}" for key, value in NETWORK.items()),
        "--set=train.log_interval=1", "--set=train.valid_sentences=0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    update = Checkpoint.load(tmp_path / "checkpoint_last.safetensors").progress.update
    assert update >= metrics(tmp_path)[-1]["update"] > 0
    more = run_cli(*command[3:], "--max-update", str(update + 1))
    assert more.returncode == 0, more.stderr
    assert f"after update {update:,}" in more.stderr


def test_a_stop_where_a_validation_is_due_does_not_lose_it(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the very last update and resumed, as if nothing had happened."""
    start(data_bin, tmp_path / "whole", max_update=4).run()
    stopped = start(data_bin, tmp_path / "parts", max_update=4)
    right = stopped._update

    def signalled(*work):
        if stopped.progress.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return right(*work)

    monkeypatch.setattr(stopped, "_update", signalled)
    assert stopped.run() == signal.SIGTERM
    assert not (tmp_path / "parts" / "checkpoint_best.safetensors").exists()
    resumed = start(data_bin, tmp_path / "parts", max_update=4)
    assert resumed.progress.update == 4 and resumed.progress.validation_due
    assert resumed.run() == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert (tmp_path / "parts" / "checkpoint_best.safetensors").exists()


def test_an_epoch_is_named_when_it_ends(data_bin: Path, tmp_path: Path) -> None:
    options = {"max_epoch": 2, "max_update": 1000, "validate_interval_updates": 0, "keep_last": 9}
    training = start(data_bin, tmp_path, **options)
    training.run()
    per_epoch = training.progress.update // 2
    names = {path.name for path in tmp_path.glob("checkpoint_*_*.safetensors")}
    assert names == {
        f"checkpoint_1_{per_epoch}.safetensors",
        f"checkpoint_2_{2 * per_epoch}.safetensors",
    }


def test_resuming_with_fewer_batches_an_epoch_goes_on_in_the_next(
    data_bin: Path, tmp_path: Path
) -> None:
    start(data_bin, tmp_path, max_tokens=60, max_update=20).run()
    dataset = BinarizedDataset(data_bin)
    config = build(
        TrainConfig, {"max_tokens": 100_000, "max_update": 22, "valid_sentences": 0}, "train"
    )
    arch = architecture("fastdiss_tiny")
    network = arch.config(dict(NETWORK, latent_dim=8))
    training = Training(
        arch, network, config, dataset, tmp_path, Processes(CPU), accept_changes=True
    )
    assert training.run() == 0 and training.progress.epoch == 3


@pytest.mark.parametrize("arch", ["transformer_tiny", "difformer_tiny", "fastdiss_tiny"])
def test_bfloat16_gives_every_weight_a_gradient(data_bin: Path, tmp_path: Path, arch: str) -> None:
    training = start(data_bin, tmp_path, arch, dtype="bfloat16")
    training._update(*training._next_batches(), rate=1e-4)
    missing = [n for n, p in training.model.named_parameters() if p.grad is None]
    # without self-conditioning in this batch nothing is missing either: zeros are an input too
    assert not missing


def test_two_processes_train_on_all_sentences(data_bin: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
            "-m", "fastdiss_cli", "train", str(data_bin), "--arch", "fastdiss_tiny",
            "--save-dir", str(tmp_path), "--max-epoch", "1", "--max-tokens", "500",
            "--set=train.log_interval=1", "--set=train.valid_sentences=5",
            *(f"--set=model.{key}={value}" for key, value in NETWORK.items()),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Checkpoint.load(tmp_path / "checkpoint_last.safetensors").world_size == 2
    lines = metrics(tmp_path)
    assert lines[-1]["split"] == "valid" and math.isfinite(lines[-1]["loss"])
    updates = [line["update"] for line in lines if line["split"] == "train"]
    assert updates == list(range(1, len(updates) + 1))  # one log for both ranks


def test_updates_with_a_non_finite_gradient_are_skipped_and_bounded(
    data_bin: Path, tmp_path: Path
) -> None:
    training = start(data_bin, tmp_path, "transformer_tiny", max_skipped=3)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    right = training.model.loss

    def wrong(batch, update):
        return Loss(right(batch, update).total * math.nan)

    training.model.loss = wrong
    with pytest.raises(FastdissError, match="3 updates in a row"):
        training.run()
    assert training.progress.skipped == 3
    assert all(torch.equal(before[name], p) for name, p in training.model.named_parameters())


def test_training_stops_when_validation_gets_no_better(data_bin: Path, tmp_path: Path) -> None:
    options = {
        "max_update": 1000, "patience": 2, "lr": 1e-12, "validate_interval_updates": 2,
        "valid_sentences": 0, "ema_decay": 0,
    }  # fmt: skip
    done = run_cli(*command(data_bin, tmp_path, **options))
    progress = newest(tmp_path).progress
    assert progress.bad_validations == 2 and progress.update < 50
    assert f"done after update {progress.update} (2 validations without a new best)" in done.stderr


def test_an_option_without_effect_is_told(data_bin: Path, tmp_path: Path) -> None:
    words = command(data_bin, tmp_path, max_update=1)
    done = run_cli(*words, "--set=model.scp_gap=0.1", "--set=model.scp_grid=log-snr")
    assert done.returncode == 0
    assert "model.scp_gap has no effect while model.scp_offset is step-matched" in done.stderr
    assert "scp_grid" not in done.stderr
    words = command(data_bin, tmp_path / "a", max_update=1, valid_sentences=0, valid_steps=3)
    done = run_cli(*words)
    assert "train.valid_steps has no effect while train.valid_sentences is 0" in done.stderr
    recipe = tmp_path / "all.yaml"
    recipe.write_text(run_cli("models", "fastdiss_tiny").stdout)
    words = command(data_bin, tmp_path / "c", max_update=1)
    assert "no effect" not in run_cli(*words, "--config", recipe).stderr
    words = command(data_bin, tmp_path / "b", "transformer_tiny", max_update=1)
    done = run_cli(*words, "--valid-steps", "9")
    assert "train.valid_steps has no effect: transformer_tiny decodes without steps" in done.stderr


def test_low_disk_space_is_reported_before_training(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output: list[str] = []
    monkeypatch.setattr(logs, "warn", output.append)
    weights = 4 * start(data_bin, tmp_path / "a").model.num_parameters()
    for copies, message in ((11.9, True), (12.1, False)):  # weights, average, moments, three times
        space = SimpleNamespace(free=copies * weights)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, space=space: space)
        output.clear()
        start(data_bin, tmp_path / str(copies))
        assert ("three checkpoints of" in " ".join(output)) == message


def test_the_best_of_equal_bleu_has_the_lower_loss() -> None:
    def is_best(bleu: float, loss: float, **before: float) -> bool:
        progress = Progress(update=7, **before)
        judge(progress, {"loss": loss, "bleu": bleu})
        assert progress.bad_validations == (progress.best_update != 7)
        return progress.best_update == 7

    before = {"best": 20.0, "best_loss": 3.0}
    assert is_best(20.0, 2.9, **before) and is_best(20.1, 4.0, **before)
    assert not is_best(20.0, 3.0, **before) and not is_best(19.9, 1.0, **before)
    assert is_best(0.0, 9.0) and not is_best(math.nan, 1.0)


def test_the_loss_of_a_validation_is_a_mean_over_tokens(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(data_bin, tmp_path, max_tokens=60)
    batcher = training.validator.batcher
    batches = [batcher.collate(numbers) for numbers in batcher.epoch(0)]
    sizes = [batch.num_tgt_tokens for batch in batches]
    assert len(set(sizes)) > 1
    monkeypatch.setattr(
        training.model, "loss", lambda batch, update: Loss(torch.tensor(1.0 / batch.num_tgt_tokens))
    )
    training.validator.show = lambda far: None
    figures = training.validator.loss(training.model, 1)
    assert figures["loss"] == pytest.approx(len(sizes) / sum(sizes))


def test_the_end_of_the_last_epoch_is_foreseen(data_bin: Path, tmp_path: Path) -> None:
    training = start(data_bin, tmp_path, max_update=1000, max_epoch=2, update_freq=2)
    rounds = [len(training.batcher.rounds(epoch)) for epoch in (1, 2)]
    training.run()
    assert training.bar.total == training.progress.update == sum(-(-n // 2) for n in rounds)
    assert start(data_bin, tmp_path / "c", max_update=3).expected_end() == 3


def test_the_speed_of_training_leaves_out_validations(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    update, validate = loop.Training._update, loop.Training._validate

    def slow(method: Any, seconds: float) -> Any:
        def wrapped(*args: Any) -> Any:
            now[0] += seconds
            return method(*args)

        return wrapped

    monkeypatch.setattr(loop.Training, "_update", slow(update, 1))
    monkeypatch.setattr(loop.Training, "_validate", slow(validate, 100))
    start(data_bin, tmp_path, max_update=4, validate_interval_updates=1).run()
    lines = metrics(tmp_path, without=())
    assert [line["split"] for line in lines] == ["train", "valid"] * 4
    assert [line["seconds"] for line in lines[::2]] == [1.0] * 4


def test_a_validation_says_how_far_it_is(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(logs, "PLAIN_EVERY", 0.0)
    start(data_bin, tmp_path, max_update=1).run()
    output = capsys.readouterr().err
    assert "validating 0/" in output and " batches\n" in output
    assert "validating 0/4 sentences\n" in output


def test_validation_bleu_of_answers_under_four_words(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no 4-grams, which would make BLEU 0 for any answers."""
    training = start(data_bin, tmp_path)
    short = training.dataset.tgt_tokenizer.encode("nine two")

    def answer(self, sources, runs, *_):
        runs[0].best = [Hypothesis(short[:-1], 0.0, [], 1) for _ in sources]
        return 0

    monkeypatch.setattr(SequenceGenerator, "decode_together", answer)
    pairs = {side: [np.array(short)] * 4 for side in ("src", "tgt")}
    monkeypatch.setattr(training.dataset, "splits", {"valid": pairs})
    training.validator.show = lambda far: None
    assert training.validator.bleu(training.model) == pytest.approx(100)


def test_validation_bleu_leaves_a_batch_for_each_process(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tokens a batch may hold."""
    training = start(data_bin, tmp_path, max_tokens=100_000, valid_sentences=1000)
    sizes: list[tuple[int, int]] = []

    def answer(self, sources, runs, *_):
        sizes.append((self.max_tokens, max(map(len, sources))))
        runs[0].best = [Hypothesis([], 0.0, [], 1) for _ in sources]
        return 0

    monkeypatch.setattr(SequenceGenerator, "decode_together", answer)
    training.validator.show = lambda far: None
    training.validator.bleu(training.model)
    assert sizes and all(size == validation.CHUNK * longest for size, longest in sizes)


def test_an_untrained_transformer_does_not_go_on_and_on_in_validation(
    data_bin: Path, tmp_path: Path
) -> None:
    training = start(data_bin, tmp_path, "transformer_tiny", valid_sentences=3)
    longest = max(map(len, list(training.dataset["valid"]["tgt"])[:3]))
    with torch.no_grad():  # it never ends an answer by itself
        training.model.output.weight[training.model.tgt.eos].fill_(0)
        training.model.output.weight[5:].add_(9)
    lengths = []
    right = training.model.decode

    def decode(*given):
        found = right(*given)
        lengths.extend(len(h.tokens) for (h,) in found)
        return found

    training.model.decode = decode
    training.validator.show = lambda far: None
    training.validator.bleu(training.model.eval())
    assert lengths == [2 * longest] * 3


@pytest.mark.parametrize("change", [{"valid_sentences": 3}, {"valid_steps": 2}])
def test_another_validation_starts_anew(
    data_bin: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    options = {"validate_interval_updates": 2, "max_update": 4, "max_epoch": 99}
    start(data_bin, tmp_path, **options).run()
    again = start(data_bin, tmp_path, **options | {"max_update": 6})
    assert again.progress.best is not None
    other = start(data_bin, tmp_path, **options | change | {"max_update": 6}, accept_changes=True)
    assert other.progress.best is None and other.progress.bad_validations == 0
    other.run()
    assert other.progress.best_update == 6


def test_another_measure_of_validation_starts_anew(data_bin: Path, tmp_path: Path) -> None:
    """A loss is not compared with a BLEU."""
    options = {"validate_interval_updates": 2, "patience": 3, "max_update": 4}
    start(data_bin, tmp_path, valid_sentences=4, **options).run()
    changed = {"max_update": 8, "valid_sentences": 0, "accept_changes": True}
    by_loss = start(data_bin, tmp_path, **options | changed)
    assert by_loss.progress.best is None
    by_loss.run()
    assert by_loss.progress.best < 0 and by_loss.progress.best_update > 4


def test_a_best_loss_of_other_options_is_forgotten(data_bin: Path, tmp_path: Path) -> None:
    """So is the position in batches of other sizes, even if the architecture differs, too."""
    options = {"valid_sentences": 0, "validate_interval_updates": 2, "max_epoch": 99}
    start(data_bin, tmp_path, "difformer_tiny", **options, max_update=5).run()
    options |= {"max_update": 8, "accept_changes": True}
    same = start(data_bin, tmp_path, "difformer_tiny", **options, lr=1e-5).progress
    assert same.best is not None and same.batch > 0
    other = start(data_bin, tmp_path, "fastdiss_tiny", **options, max_tokens=300).progress
    assert other.best is None and (other.epoch, other.batch) == (same.epoch + 1, 0)


def test_an_average_that_is_switched_on_begins_with_the_weights(
    data_bin: Path, tmp_path: Path
) -> None:
    trained = start(data_bin, tmp_path, max_update=4, ema_decay=0.0)
    trained.run()
    resumed = start(data_bin, tmp_path, ema_decay=0.9, accept_changes=True)
    for name, p in trained.model.named_parameters():
        assert torch.equal(resumed.state.ema.weights[name], p)


def test_tensorboard_shows_what_the_log_has(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    last, aside = tmp_path / "checkpoint_last.safetensors", tmp_path / "aside"
    start(data_bin, tmp_path, max_update=4, tensorboard=True).run()
    shutil.copy(last, aside)
    start(data_bin, tmp_path, max_update=6, tensorboard=True).run()
    shutil.copy(aside, last)  # two updates were not saved, and are done again
    start(data_bin, tmp_path, max_update=9, tensorboard=True).run()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [line for line in metrics(tmp_path) if line["split"] == "train"]
    losses = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    assert [step for step, _ in losses] == [line["update"] for line in lines] == [*range(1, 10)]
    assert [loss for _, loss in losses] == pytest.approx([line["loss"] for line in lines])
    assert {"valid/bleu", "valid/loss", "train/lr"} <= set(shown.Tags()["scalars"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(FastdissError, match=r"pip install 'fastdiss\[tensorboard\]'"):
        start(data_bin, tmp_path / "other", tensorboard=True)


def test_skipped_updates_are_counted_in_the_log(data_bin: Path, tmp_path: Path) -> None:
    training = start(data_bin, tmp_path, max_update=6, log_interval=3)
    right = training.model.loss

    def wrong(batch, update):
        loss = right(batch, update)
        return Loss(loss.total * math.nan, loss.parts) if update == 2 else loss

    training.model.loss = wrong
    training.run()
    logged = [line for line in metrics(tmp_path) if line["split"] == "train"]
    assert [line["skipped"] for line in logged] == [1, 1]


def test_checkpoints_are_kept_and_named_as_configured(data_bin: Path, tmp_path: Path) -> None:
    start(data_bin, tmp_path, validate_interval_updates=3, keep_last=2).run()
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) == 4
    assert "checkpoint_best.safetensors" in names and "checkpoint_last.safetensors" in names
    assert {name.split("_")[-1] for name in names} > {"12.safetensors", "9.safetensors"}


def test_sentences_that_are_too_long_are_left_out_with_a_report(
    data_bin: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    training = start(data_bin, tmp_path, max_positions=20)
    output = capfd.readouterr().err
    assert f"{training.batcher.left_out} of 200" in output and "max_positions = 20" in output


def test_a_checkpoint_is_complete_in_itself(data_bin: Path, tmp_path: Path) -> None:
    training = start(data_bin, tmp_path, max_update=3)
    training.run()
    loaded = load_model(tmp_path / "checkpoint_last.safetensors", CPU)
    assert loaded.languages == ("de", "en") and loaded.arch.name == "fastdiss_tiny"
    assert loaded.src.decode(loaded.src.encode("drei vier")) == "drei vier"
    assert loaded.src.hash == loaded.tgt.hash and loaded.dtype == torch.float32
    for name, p in loaded.model.named_parameters():  # generate uses the averaged weights
        assert torch.equal(p, training.state.ema.weights[name])


@pytest.mark.parametrize("wrong", ["flip", "truncate", "garbage", "other safetensors"])
def test_a_damaged_checkpoint_is_refused(data_bin: Path, tmp_path: Path, wrong: str) -> None:
    start(data_bin, tmp_path, max_update=1).run()
    path = tmp_path / "checkpoint_last.safetensors"
    content = bytearray(path.read_bytes())
    if wrong == "flip":
        content[-100] ^= 1
    elif wrong == "truncate":
        del content[-100:]
    elif wrong == "garbage":
        content = bytearray(b"not a checkpoint")
    else:
        from safetensors.torch import save

        content = bytearray(save({"x": torch.zeros(1)}))
    path.write_bytes(content)
    with pytest.raises(FastdissError, match=str(path)):
        Checkpoint.load(path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(data_bin, tmp_path, max_update=1)
    training.run()
    path = tmp_path / "checkpoint_last.safetensors"
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiss_cli.checkpoints.checkpoint.save_file", full)
    with pytest.raises(FastdissError, match="No space left on device"):
        training._save(final=True)
    assert path.read_bytes() == before


def test_what_validation_would_refuse_is_refused_before_the_first_update(
    data_bin: Path, tmp_path: Path
) -> None:
    with pytest.raises(FastdissError, match="valid_steps must be at most 10000,"):
        start(data_bin, tmp_path, valid_steps=100_001)
    with pytest.raises(FastdissError, match="latent_dim must be at least 2"):
        architecture("difformer_tiny").config({"latent_dim": 1})


def test_checkpoints_do_not_go_into_a_dataset(data_bin: Path) -> None:
    with pytest.raises(FastdissError, match=f"--save-dir {data_bin} is a dataset"):
        start(data_bin, data_bin, max_update=2)


def test_checkpoints_of_another_training_are_not_replaced(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(data_bin, tmp_path, max_update=4, keep_last=1).run()
    (numbered,) = tmp_path.glob("checkpoint_*_4.safetensors")
    best, last = (tmp_path / f"checkpoint_{name}.safetensors" for name in ("best", "last"))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    last.unlink()
    with pytest.raises(FastdissError, match=r"checkpoint_best\.safetensors of another"):
        start(data_bin, tmp_path, max_update=2)
    best.unlink()
    with pytest.raises(FastdissError, match=f"{numbered.name} of another training"):
        start(data_bin, tmp_path, max_update=2)
    numbered.unlink()
    for name in ("metrics.old.jsonl", "metrics.old1.jsonl"):
        capsys.readouterr()
        start(data_bin, tmp_path, max_update=2).run()
        assert f"is renamed to {tmp_path / name}" in capsys.readouterr().err
        for path in tmp_path.glob("checkpoint_*"):
            path.unlink()
    assert (tmp_path / "metrics.old.jsonl").read_bytes() == before
    assert {line["update"] for line in metrics(tmp_path)} == {1, 2}


def test_a_training_that_is_set_back_keeps_what_was_later(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    often = {"keep_last": 9, "validate_interval_updates": 2}
    start(data_bin, tmp_path, max_update=6, **often).run()
    (early,) = tmp_path.glob("checkpoint_*_2.safetensors")
    (later,) = tmp_path.glob("checkpoint_*_6.safetensors")
    shutil.copyfile(early, tmp_path / "checkpoint_last.safetensors")
    best = tmp_path / "checkpoint_best.safetensors"
    best.unlink()  # it may share its bytes with the numbered one
    shutil.copyfile(later, best)
    capsys.readouterr()
    training = start(data_bin, tmp_path, max_update=4, **often | {"keep_last": 1})
    assert training.progress.is_best and best.read_bytes() == later.read_bytes()
    training.run()
    told = f"{later}, {best}: newer than checkpoint_last.safetensors, and kept until training"
    assert told in capsys.readouterr().err
    assert later.exists() and not early.exists()


def test_a_best_checkpoint_that_is_lost_is_not_named(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here later weights are worse: without the warning, none would ever be saved as the best."""
    often = {"keep_last": 0, "validate_interval_updates": 2}
    training = start(data_bin, tmp_path, max_update=2, **often)
    training.run()
    training.progress.best = 101.0
    training.progress.best_update = 1
    training.state.save(tmp_path, numbered=False, final=True)
    best = tmp_path / "checkpoint_best.safetensors"
    best.unlink()
    start(data_bin, tmp_path, max_update=4, **often).run()
    assert f"{best} is missing or damaged: the next validation will be" in capsys.readouterr().err
    assert best.exists()


def test_a_best_checkpoint_of_other_settings_is_told(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(data_bin, tmp_path, max_update=1).run()
    capsys.readouterr()
    start(data_bin, tmp_path, max_update=2, valid_steps=3, accept_changes=True)
    told = "checkpoint_best.safetensors is the best before these changes: `generate` takes it"
    assert told in capsys.readouterr().err


def test_a_log_that_was_killed_before_a_save_is_of_the_same_training(
    data_bin: Path, tmp_path: Path
) -> None:
    start(data_bin, tmp_path, max_update=2, log_interval=5).run()
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"update": 5, "epoch": 1, "split": "train"}) + "\n")
    start(data_bin, tmp_path, max_update=3, log_interval=5).run()
    assert not [*tmp_path.glob("metrics.old*")]


@pytest.mark.parametrize("last", [4, 9])
def test_a_signal_saves_no_weights_that_may_be_broken(
    data_bin: Path, tmp_path: Path, last: int
) -> None:
    """It waits for an update that is not skipped; here none comes, or the training ends with it."""
    start(data_bin, tmp_path, max_update=2).run()
    before = (tmp_path / "checkpoint_last.safetensors").read_bytes()
    training = start(data_bin, tmp_path, max_update=last, max_skipped=3)
    right = training.model.loss

    def wrong(batch, update):
        training.stop.signal = signal.SIGTERM if update >= 4 else 0
        return Loss(right(batch, update).total * math.nan)

    training.model.loss = wrong
    if last == 4:
        assert training.run() == signal.SIGTERM
    else:
        with pytest.raises(FastdissError, match=r"3 updates in a row .* is from update 2"):
            training.run()
    assert training.state.saved == 2
    assert (tmp_path / "checkpoint_last.safetensors").read_bytes() == before


def test_one_training_at_a_time_in_a_folder(data_bin: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fastdiss_cli", "train", str(data_bin), "--arch", "difformer_tiny",
        "--save-dir", str(tmp_path / "c"), "--max-update", "100000",
    ]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert any("go to" in line for line in first.stderr)  # it is at work
        second = run_cli(*command[3:-1], "1")
        assert second.returncode == 1
        assert "another training is running there" in second.stderr
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert first.returncode == 143
    assert not (tmp_path / "c" / ".lock").exists()
    again = run_cli(*command[3:-1], "1")
    assert again.returncode == 0, again.stderr


def test_a_lock_that_its_holder_removes_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, the training before ends."""
    lock, ended = fcntl.lockf, []

    def late(*args: object) -> None:
        if not ended:
            ended.append(True)
            (tmp_path / ".lock").unlink()
        lock(*args)

    monkeypatch.setattr(fcntl, "lockf", late)
    with occupied(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_sentences_beyond_the_size_of_a_batch_are_reported(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = BinarizedDataset(data_bin)["train"]
    count = int((np.maximum(sides["src"].sizes, sides["tgt"].sizes) > 30).sum())
    start(data_bin, tmp_path, max_tokens=30)
    message = f"train: {count} sentence pairs longer than --max-tokens = 30"
    assert count and message in capsys.readouterr().err
    start(data_bin, tmp_path / "wide", max_tokens=100)
    assert "longer than" not in capsys.readouterr().err
