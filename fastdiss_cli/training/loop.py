"""The training loop."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiss_cli import logs
from fastdiss_cli.checkpoints.folder import (
    LAST,
    refuse_others,
    warn_of_little_space,
)
from fastdiss_cli.config import TrainConfig
from fastdiss_cli.data.dataset import Dataset
from fastdiss_cli.device import dtype_name, pick_dtype
from fastdiss_cli.distributed import CommonError, Processes
from fastdiss_cli.models.registry import Architecture
from fastdiss_cli.randomness import seed_everything
from fastdiss_cli.signals import Stop, Stopped, elected, stop_on_signal
from fastdiss_cli.training.batches import make_batcher
from fastdiss_cli.training.gradient import (
    add_gradient,
    describe_batch,
    sum_and_clip,
    update_attempt,
)
from fastdiss_cli.training.log import Events, MetricsFile, Window
from fastdiss_cli.training.optimizer import learning_rate
from fastdiss_cli.training.state import TrainState
from fastdiss_cli.training.validation import Validator, judge


class Training:
    """One training run: model, optimizer, average and progress, resumed if there is a checkpoint.

    Args:
        arch: the architecture.
        model_config: the options of the model, as returned by `Architecture.config`.
        config: all other options.
        dataset: with the splits ``train`` and, for validation, ``valid``.
        save_dir: the folder of the checkpoints and of ``metrics.jsonl``.
        processes: the process group.
        accept_changes: resume even if settings differ that affect the result.
        begin_with: a checkpoint whose weights a new run starts from; ignored when resuming.
    """

    def __init__(
        self,
        arch: Architecture,
        model_config: Any,
        config: TrainConfig,
        dataset: Dataset,
        save_dir: Path,
        processes: Processes,
        accept_changes: bool = False,
        begin_with: Path | None = None,
    ) -> None:
        self.dataset, self.save_dir, self.processes = dataset, save_dir, processes
        self.dtype = pick_dtype(config.dtype, processes.device)
        # `auto` depends on the machine
        self.config = config = dataclasses.replace(config, dtype=dtype_name(self.dtype))
        resumed = (save_dir / LAST).exists()
        if not resumed:
            refuse_others(save_dir)
        weights = None if resumed else begin_with
        self.state = TrainState(arch, model_config, config, dataset, processes, weights)
        if resumed:
            self.state.resume(save_dir, accept_changes)
            if begin_with is not None:
                logs.info(f"{begin_with} is not read again: the weights are those of {LAST}")
        save_dir.mkdir(parents=True, exist_ok=True)
        self.model, self.progress = self.state.model, self.state.progress
        self.batcher = make_batcher(dataset, "train", config, processes)
        self.stop = Stop()
        self.validator = None
        if "valid" in dataset.splits:
            self.validator = Validator(
                config,
                dataset,
                make_batcher(dataset, "valid", config, processes),
                processes,
                self.stop,
                self.dtype,
                self._show_validation,
            )
            if config.valid_sentences:
                self.validator.decoding(self.model)  # fail now, not hours later
        if misfits := self.model.misfits(*self.batcher.sizes):
            logs.warn(f"train: {misfits}")
        self._schedule: tuple[int, list[list[np.ndarray]]] | None = None
        progress = self.progress
        self.metrics = MetricsFile(
            save_dir / "metrics.jsonl",
            progress.update if resumed else None,
            progress.validation_due,
            processes.rank == 0,
        )
        self.events = None
        if config.tensorboard and processes.rank == 0:
            self.events = Events(save_dir / "tensorboard", progress.update)
        self.window = Window(progress.window)
        copies = 3 + (self.state.ema is not None)  # weights, moments of AdamW, average
        warn_of_little_space(save_dir, 4 * copies * self.model.num_parameters())
        if config.compile:
            logs.info("compiling: the first updates may take minutes")
            # batches with and without padding, gradient and dropout are more variants than torch
            # allows by default
            torch._dynamo.config.cache_size_limit = 64
            self.model.encoder.compile(dynamic=True)
            self.model.decoder.compile(dynamic=True)

    def run(self) -> int:
        """Train until a limit is reached, validating and saving on the way.

        Returns:
            0, or the number of the signal that stopped the training early.
        """
        config, progress = self.config, self.progress
        starts = self.processes.gather([progress.update])
        if len(set(starts)) > 1:
            raise CommonError(
                f"--save-dir {self.save_dir}: one process resumes after update {max(starts):,} and "
                f"one after {min(starts):,}: it must be a folder that all processes share"
            )
        with (
            stop_on_signal(self.stop, "saving after this update"),
            logs.progress("training", config.max_update, progress.update) as self.bar,
        ):
            due = progress.validation_due and not self._is_suspect()
            stopped = self._validate_and_save() if due else 0
            if not (stopped or self.finished()):
                stopped = self._try_largest_batch()
                if stopped:
                    self._save_stopped()
                self.window.restart_clock()
            save_due = False
            # a training does not end with a skipped update, either: its weights may be broken
            while not stopped and (self._is_suspect() or not self.finished()):
                end = self.expected_end()
                self.bar.expect(end)
                rate = learning_rate(progress.update + 1, config, end)
                batches, tokens = self._next_batches()
                figures, signal = self._update(batches, tokens, rate)
                window = self.window
                window.add(figures, tokens)
                self.bar.advance(loss=f"{window.loss:.3f}", **{"tok/s": f"{window.speed:,.0f}"})
                if progress.update % config.log_interval == 0:
                    now = {"lr": rate, "skipped": progress.skipped}
                    self._record({"split": "train", **window.summary(), **now})
                    self.window = Window()

                progress.validation_due = progress.validation_due or self._validation_is_due()
                save_due = save_due or progress.update % config.save_interval_updates == 0
                if self._is_suspect():
                    continue  # saves, validations and signals wait for the end of the skipped ones
                stopped = signal
                if stopped:
                    self._save_stopped()
                elif progress.validation_due:
                    stopped = self._validate_and_save()
                    self.window.restart_clock()
                elif save_due:
                    self._save()
                save_due = False
        return stopped

    def _next_batches(self) -> tuple[list[np.ndarray], int]:
        """Return the sentences of this rank's next batches, and the target tokens of all ranks."""
        progress, batcher = self.progress, self.batcher
        if self._epoch_is_done():
            progress.epoch, progress.batch = progress.epoch + 1, 0
        rounds = self._epoch_rounds()[progress.batch : progress.batch + self.config.update_freq]
        progress.batch += len(rounds)
        # every rank knows the batches of the others, without communication
        tokens = sum(map(batcher.num_tgt_tokens, chain.from_iterable(rounds)))
        return [batches[batcher.rank] for batches in rounds], tokens

    def _epoch_is_done(self) -> bool:
        return self.progress.batch >= len(self._epoch_rounds())

    def _epoch_rounds(self) -> list[list[np.ndarray]]:
        """Return the batches of the current epoch, by rank; they are computed once per epoch."""
        if self._schedule is None or self._schedule[0] != self.progress.epoch:
            self._schedule = self.progress.epoch, self.batcher.rounds(self.progress.epoch)
        return self._schedule[1]

    def expected_end(self) -> int:
        """Return the expected last update; an epoch limit is extrapolated from this epoch."""
        config, progress = self.config, self.progress
        if not config.max_epoch:
            return config.max_update
        batches = len(self._epoch_rounds())
        left = -(-(batches - progress.batch) // config.update_freq)
        left += (config.max_epoch - progress.epoch) * -(-batches // config.update_freq)
        return min(config.max_update, progress.update + left)

    def finished(self) -> bool:
        """Return whether a limit is reached: of updates, of epochs, or of patience."""
        config, progress = self.config, self.progress
        epochs_done = progress.epoch - 1 + self._epoch_is_done()
        return (
            progress.update >= config.max_update
            or (config.max_epoch > 0 and epochs_done >= config.max_epoch)
            or (config.patience > 0 and progress.bad_validations >= config.patience)
        )

    def _validation_is_due(self) -> bool:
        interval = self.config.validate_interval_updates
        regular = self.progress.update % interval == 0 if interval else self._epoch_is_done()
        return regular or self.finished()

    def _is_suspect(self) -> bool:
        """Return whether the last update was not finite, so that its weights are not saved.

        Nor are they validated, except at the end of the training, to learn if they are usable.
        """
        is_judged = self.finished() and self.validator is not None
        return self.progress.skipped_in_a_row > 0 and not is_judged

    def _diverged(self, what: str) -> CommonError:
        return CommonError(
            f"{what}: lower --lr, lengthen --warmup-updates or use --dtype float32; "
            + self.state.last_saved(self.save_dir)
        )

    def _try_largest_batch(self) -> int:
        """Compute the gradient of this epoch's largest batch and discard it.

        So if batches are too large, memory runs out in the first minute and not hours later. No
        result changes, because every update seeds its own random draws.

        Returns:
            The signal that was received meanwhile, or 0.
        """
        config = self.config
        self.model.train()
        own = [batches[self.batcher.rank] for batches in self._epoch_rounds()]
        batch = self.batcher.collate(max(own, key=self.batcher.padded_size))
        with update_attempt(self.processes, config) as attempt:
            # later updates also hold Adam's moments, accumulated gradients, the all-reduce buffer
            copies = (0 if self.state.optimizer.state else 2) + (config.update_freq > 1)
            copies += self.processes.world_size > 1
            reserve = [torch.empty_like(p) for p in self.model.parameters() for _ in range(copies)]
            seed_everything(config.seed, "try", self.progress.epoch, self.processes.rank)
            update = self.progress.update + 1
            attempt.what = describe_batch(update, batch)
            add_gradient(self.model, batch, update, 1.0, self.dtype)
            del reserve
        self.state.optimizer.zero_grad(set_to_none=True)
        return self.processes.agree(attempt, self.stop)

    def _update(
        self, batches: list[np.ndarray], all_tokens: int, rate: float
    ) -> tuple[dict[str, float], int]:
        """Do one optimizer update.

        Args:
            batches: the sentences of each batch of this rank.
            all_tokens: the target tokens of the batches of all ranks.
            rate: the learning rate.

        Returns:
            The figures of the update, and the signal that any rank received, or 0.
        """
        config, progress = self.config, self.progress
        optimizer, ema = self.state.optimizer, self.state.ema
        update = progress.update + 1
        self.model.train()
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        with update_attempt(self.processes, config) as attempt:
            # collated one by one: while a GPU computes one batch, the host reads the next
            for micro_step, batch in enumerate(map(self.batcher.collate, batches)):
                seed_everything(config.seed, "train", update, self.processes.rank, micro_step)
                share = batch.num_tgt_tokens / all_tokens
                attempt.what = describe_batch(update, batch)
                losses = add_gradient(self.model, batch, update, share, self.dtype)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value
        grad_norm = sum_and_clip(self.model, config, self.processes, attempt)
        # here the host waits for the device at the latest; the signals travel with the figures
        losses = torch.stack([*sums.values()]).tolist()
        summed = self.processes.sum([*losses, *self.stop.votes])
        means, votes = summed[: len(losses)], summed[len(losses) :]
        figures = dict(zip(sums, means, strict=True)) | {"grad_norm": float(grad_norm)}
        if all(map(math.isfinite, figures.values())):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            if ema:
                ema.update(self.model, update)
            progress.skipped_in_a_row = 0
        else:
            self._skip()
        progress.update = update
        return figures, elected(votes)

    def _skip(self) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        logs.warn(f"update {progress.update + 1}: loss or gradient is not finite; skipped")
        if progress.skipped_in_a_row >= self.config.max_skipped:
            raise self._diverged(
                f"loss or gradient of {progress.skipped_in_a_row} updates in a row was not finite"
            )

    def _validate_and_save(self) -> int:
        """Validate and save; return the signal that interrupted the validation, or 0."""
        before = dataclasses.replace(self.progress)
        try:
            if self.validator is not None:
                self._validate(self.validator)
        except Stopped as stopped:  # it stays due, and a resumed run starts with it
            self._save_stopped()
            return stopped.signal
        self.progress.validation_due = False
        if not self._save(numbered=True, final=self.finished()):
            for name in ("best", "best_loss", "best_is_bleu", "best_update"):  # as on the disk
                setattr(self.progress, name, getattr(before, name))
        return 0

    def _show_validation(self, position: str) -> None:
        self.bar.advance(0, validating=position)

    def _validate(self, validator: Validator) -> None:
        """Score the averaged weights on the validation split.

        Raises:
            CommonError: the loss is not finite, and neither was the last update.
        """
        config, progress = self.config, self.progress
        # the caches of decoding grow with every position: each length would be compiled anew
        eager = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
        with self.state.averaged() as model, eager:
            figures = validator.loss(model, progress.update)
            if progress.skipped_in_a_row and not math.isfinite(figures["loss"]):
                raise self._diverged("neither the last update nor the validation loss was finite")
            if config.valid_sentences:
                figures["bleu"] = validator.bleu(model)
        judge(progress, figures)
        self._record({"split": "valid", **figures})
        logs.info(
            f"epoch {progress.epoch}  update {progress.update:,}  "
            + "  ".join(f"valid {name} {value:.3f}" for name, value in figures.items())
            + ("  (best)" if progress.is_best else "")
        )

    def _record(self, figures: dict[str, Any]) -> None:
        """Append figures, with ``split`` first, to ``metrics.jsonl``."""
        progress = self.progress
        self.metrics.write({"update": progress.update, "epoch": progress.epoch, **figures})
        if self.events:
            self.events.write(progress.update, figures)

    def _save_stopped(self) -> None:
        """Save after a signal, unless the weights may be broken: then the last file stays."""
        if not self.progress.skipped_in_a_row:
            self._save(final=True)

    def _save(self, numbered: bool = False, final: bool = False) -> bool:
        """Save, including the unfinished window of the log; see `TrainState.save`."""
        self.progress.window = self.window.state
        return self.state.save(self.save_dir, numbered, final)
