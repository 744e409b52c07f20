"""The training loop."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiss_cli import logs
from fastdiss_cli.config import TrainConfig
from fastdiss_cli.data.batching import Batch, TokenBatcher
from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.device import autocast, pick_dtype
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Architecture
from fastdiss_cli.randomness import seed_everything
from fastdiss_cli.training.checkpoint import (
    Checkpoint,
    Progress,
    copy_checkpoint,
    load_weights,
    pack_optimizer,
    prune_numbered,
    unpack_optimizer,
    vocabulary,
)
from fastdiss_cli.training.distributed import Processes
from fastdiss_cli.training.metrics import MetricsFile, Window
from fastdiss_cli.training.optimizer import EMA, learning_rate, make_optimizer
from fastdiss_cli.training.validation import better, validation_bleu, validation_loss


@dataclass
class Stop:
    """Set by the first SIGINT or SIGTERM: finish the update, save, and leave."""

    signal: int = 0


class Training:
    """One training run: model, optimizer, average and progress, resumed where they were left.

    Args:
        arch: the architecture.
        model_overrides: options of the model that differ from the architecture's.
        config: everything else.
        dataset: with splits ``train`` and, for validation, ``valid``.
        save_dir: where the checkpoints and ``metrics.jsonl`` are.
        processes: this process among the others.
        accept_changes: resume although something differs that changes the result.
    """

    def __init__(
        self,
        arch: Architecture,
        model_overrides: dict[str, Any],
        config: TrainConfig,
        dataset: BinarizedDataset,
        save_dir: Path,
        processes: Processes,
        accept_changes: bool = False,
    ) -> None:
        self.arch, self.dataset, self.save_dir, self.processes = arch, dataset, save_dir, processes
        self.device = processes.device
        self.dtype = pick_dtype(config.dtype, self.device)
        resolved = str(self.dtype).removeprefix("torch.")  # what `auto` means differs by machine
        self.config = config = dataclasses.replace(config, dtype=resolved)
        self.model_config = arch.config(model_overrides)
        seed_everything(config.seed, "initialise")
        tokenizers = (dataset.src_tokenizer, dataset.tgt_tokenizer)
        self.model = arch.family(self.model_config, *map(vocabulary, tokenizers)).to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.ema = EMA(self.model, config.ema_decay) if config.ema_decay else None
        self.progress = Progress()
        self.batcher = self._batcher("train")
        self.valid_batcher = self._batcher("valid") if "valid" in dataset.splits else None
        self._schedule: tuple[int, list[Any]] | None = None
        self._resume(accept_changes)
        self.metrics = MetricsFile(
            save_dir / "metrics.jsonl", self.progress.update, processes.rank == 0
        )
        if config.compile:
            self.model.encoder.compile(dynamic=True)
            self.model.decoder.compile(dynamic=True)

    def run(self) -> int:
        """Train until a limit is reached, validating and saving on the way.

        Returns:
            0, or the number of the signal that stopped the training early (with all saved).
        """
        config, progress = self.config, self.progress
        window = Window()
        with (
            stop_on_signal() as stop,
            logs.progress("training", config.max_update, progress.update) as bar,
        ):
            if progress.validation_due:
                self._validate_and_save()
            while not self._finished():
                micro_batches = self._next_batches()
                tokens = sum(batch.num_tgt_tokens for batch in micro_batches)
                # one message tells the ranks the size of the update and whether to stop after it
                all_tokens, signals = self.processes.sum([tokens, stop.signal])
                figures = self._update(micro_batches, all_tokens)
                window.add(figures, all_tokens)
                bar.advance(loss=f"{window.loss:.3f}", **{"tok/s": f"{window.speed:,.0f}"})
                if progress.update % config.log_interval == 0:
                    self._record({"split": "train", **window.summary()})
                    window = Window()

                progress.validation_due = self._validation_is_due()
                if signals:
                    self._save()
                    return stop.signal or signal.SIGTERM
                if progress.validation_due:
                    self._validate_and_save()
                    window.restart_clock()
                elif progress.update % config.save_interval_updates == 0:
                    self._save()
        return 0

    def _next_batches(self) -> list[Batch]:
        """Return this rank's batches of the next update."""
        progress = self.progress
        if self._epoch_is_done():
            progress.epoch, progress.batch = progress.epoch + 1, 0
        schedule = self._epoch_batches()
        chosen = schedule[progress.batch : progress.batch + self.config.update_freq]
        progress.batch += len(chosen)
        return [self.batcher.collate(sentences) for sentences in chosen]

    def _epoch_is_done(self) -> bool:
        return self.progress.batch >= len(self._epoch_batches())

    def _epoch_batches(self) -> list[Any]:
        """This rank's batches of the present epoch, computed once an epoch."""
        if self._schedule is None or self._schedule[0] != self.progress.epoch:
            self._schedule = self.progress.epoch, self.batcher.epoch(self.progress.epoch)
        return self._schedule[1]

    def _finished(self) -> bool:
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
        return regular or self._finished()

    def _update(self, micro_batches: list[Batch], all_tokens: float) -> dict[str, float]:
        """Do one optimizer update over micro-batches that hold ``all_tokens`` over all ranks."""
        config, progress = self.config, self.progress
        update = progress.update + 1
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for micro_step, batch in enumerate(micro_batches):
            seed_everything(config.seed, "train", update, self.processes.rank, micro_step)
            with autocast(self.device, self.dtype):
                loss = self.model.loss(batch.to(self.device), update)
            share = batch.num_tgt_tokens / all_tokens
            (loss.total * share).backward()
            for name, value in {"loss": loss.total, **loss.parts}.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        self.processes.sum_gradients(self.model.parameters())

        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), config.clip_norm or math.inf
        )
        rate = learning_rate(update, config)
        if torch.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model, update)
            progress.skipped_in_a_row = 0
        else:
            self._skip()
        progress.update = update
        means = self.processes.sum(torch.stack([*sums.values()]).tolist())
        figures = dict(zip(sums, means, strict=True))
        return {**figures, "grad_norm": float(grad_norm), "lr": rate, "skipped": progress.skipped}

    def _skip(self) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        logs.warn(f"update {progress.update + 1}: gradient is not finite; skipped")
        if progress.skipped_in_a_row >= self.config.max_skipped:
            raise FastdissError(
                f"the gradients of {progress.skipped_in_a_row} updates in a row were not finite: "
                "lower --lr, lengthen --warmup-updates or use --dtype float32; "
                f"the last checkpoint in {self.save_dir} is intact"
            )

    def _validate_and_save(self) -> None:
        if self.valid_batcher is not None:
            self._validate(self.valid_batcher)
        self.progress.validation_due = False
        self._save(numbered=True)

    def _validate(self, batcher: TokenBatcher) -> None:
        """Score the averaged weights on the validation split."""
        config, progress = self.config, self.progress
        if self.ema:
            self.ema.swap(self.model)
        self.model.eval()
        figures = validation_loss(
            self.model, batcher, config, self.processes, progress.update, self.dtype
        )
        score = -figures["loss"]
        if config.valid_sentences:
            score = validation_bleu(self.model, self.dataset, config, self.processes, self.dtype)
            figures["bleu"] = score
        if self.ema:
            self.ema.swap(self.model)
        if better(score, progress.best):
            progress.best, progress.best_update = score, progress.update
            progress.bad_validations = 0
        else:
            progress.bad_validations += 1
        self._record({"split": "valid", **figures})
        logs.info(
            f"epoch {progress.epoch}  update {progress.update:,}  "
            + "  ".join(f"valid {name} {value:.3f}" for name, value in figures.items())
            + ("  (best)" if progress.best_update == progress.update else "")
        )

    def _batcher(self, split: str) -> TokenBatcher:
        files, dataset = self.dataset[split], self.dataset
        batcher = TokenBatcher(
            files["src"],
            files["tgt"],
            dataset.src_tokenizer.pad,
            dataset.tgt_tokenizer.pad,
            self.config.max_tokens,
            self.config.max_positions,
            self.config.seed,
            self.processes.rank,
            self.processes.world_size,
        )
        if batcher.left_out:
            logs.warn(
                f"{split}: {batcher.left_out:,} of {len(files['src']):,} sentence pairs are longer "
                f"than train.max_positions = {self.config.max_positions} tokens and are left out"
            )
        return batcher

    def _record(self, figures: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        self.metrics.write(
            {"update": self.progress.update, "epoch": self.progress.epoch, **figures}
        )

    def _save(self, numbered: bool = False) -> None:
        """Write ``checkpoint_last``, and its other names where they are due."""
        if self.processes.rank == 0:
            last = self.save_dir / "checkpoint_last.safetensors"
            self._checkpoint().save(last)
            progress, keep = self.progress, self.config.keep_last
            if progress.is_best:
                copy_checkpoint(last, self.save_dir / "checkpoint_best.safetensors")
            if numbered and keep:
                name = f"checkpoint_{progress.epoch}_{progress.update}.safetensors"
                copy_checkpoint(last, self.save_dir / name)
                prune_numbered(self.save_dir, keep)
        self.processes.barrier()

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        if self.ema:
            tensors |= {f"ema.{name}": p for name, p in self.ema.weights.items()}
        packed = pack_optimizer(self.model, self.optimizer)
        tensors |= {f"optimizer.{name}": value for name, value in packed.items()}
        for side in ("src", "tgt"):
            model = getattr(self.dataset, f"{side}_tokenizer").model
            tensors[f"tokenizer.{side}"] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
        return Checkpoint(
            self.arch.name,
            asdict(self.model_config),
            asdict(self.config),
            self.progress,
            self.dataset.manifest.hash,
            self.processes.world_size,
            tensors,
        )

    def _resume(self, accept_changes: bool) -> None:
        path = self.save_dir / "checkpoint_last.safetensors"
        if not path.exists():
            self.save_dir.mkdir(parents=True, exist_ok=True)
            return
        checkpoint = Checkpoint.load(path)
        changes = self._changes(checkpoint)
        if changes and not accept_changes:
            raise FastdissError(
                f"{path} was trained otherwise: {'; '.join(changes)}. Train into another "
                "--save-dir, or resume all the same with --accept-changes"
            )
        load_weights(self.model, checkpoint.group("model"), path)
        if self.ema and checkpoint.group("ema"):
            for name, value in checkpoint.group("ema").items():
                self.ema.weights[name].copy_(value)
        unpack_optimizer(self.model, self.optimizer, checkpoint.group("optimizer"))
        self.progress = checkpoint.progress
        if self.progress.is_best and self.processes.rank == 0:  # a kill may have come in between
            copy_checkpoint(path, self.save_dir / "checkpoint_best.safetensors")
        logs.info(f"resuming {path} after update {self.progress.update:,}")

    def _changes(self, checkpoint: Checkpoint) -> list[str]:
        """Name what differs between a checkpoint and this run and would change the result."""
        may_differ = {
            "max_update", "max_epoch", "patience", "keep_last", "log_interval",
            "save_interval_updates", "max_skipped", "compile",
        }  # fmt: skip
        if self.config.lr_scheduler == "cosine":
            may_differ.discard("max_update")
        now = {
            "arch": self.arch.name,
            "dataset": self.dataset.manifest.hash[:16],
            "processes": self.processes.world_size,
            **{f"model.{k}": v for k, v in asdict(self.model_config).items()},
            **{f"train.{k}": v for k, v in asdict(self.config).items() if k not in may_differ},
        }
        before = {
            "arch": checkpoint.arch,
            "dataset": checkpoint.dataset_hash[:16],
            "processes": checkpoint.world_size,
            **{f"model.{k}": v for k, v in checkpoint.model_config.items()},
            **{f"train.{k}": v for k, v in checkpoint.train_config.items()},
        }
        return [
            f"{key} was {before.get(key)} and is now {value}"
            for key, value in now.items()
            if json.dumps(before.get(key)) != json.dumps(value)
        ]


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM: the first asks to stop, a second stops at once."""
    stop = Stop()

    def handle(number: int, _: Any) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number
        logs.info("stopping after this update (again to stop at once)")

    caught = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in caught]
    try:
        yield stop
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)
