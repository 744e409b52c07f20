"""The training loop."""

from __future__ import annotations

import json
import math
import signal
import time
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
        self.arch, self.config, self.dataset = arch, config, dataset
        self.save_dir, self.processes = save_dir, processes
        self.device = processes.device
        self.dtype = pick_dtype(config.dtype, self.device)
        self.model_config = arch.config(model_overrides)
        seed_everything(config.seed, "initialise")
        tokenizers = (dataset.src_tokenizer, dataset.tgt_tokenizer)
        self.model = arch.family(self.model_config, *map(vocabulary, tokenizers)).to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.ema = EMA(self.model, config.ema_decay) if config.ema_decay else None
        self.progress = Progress()
        self.batcher = self._batcher("train")
        self.valid_batcher = self._batcher("valid") if "valid" in dataset.splits else None
        self._resume(accept_changes)
        if config.compile:
            self.model.encoder.compile(dynamic=True)
            self.model.decoder.compile(dynamic=True)

    def run(self) -> None:
        """Train until a limit is reached, validating and saving on the way."""
        config, progress, processes = self.config, self.progress, self.processes
        window = Window()
        with (
            stop_on_signal() as stop,
            logs.progress("training", config.max_update, progress.update) as bar,
        ):
            while not self._finished():
                micro_batches, epoch_ends = self._next_batches()
                tokens = sum(batch.num_tgt_tokens for batch in micro_batches)
                # one message tells the ranks the size of the update and whether to stop after it
                all_tokens, stopping = processes.sum([tokens, float(stop.signal > 0)])
                figures = self._update(micro_batches, all_tokens)
                window.add(figures, all_tokens)
                bar.advance(
                    loss=f"{window.mean('loss'):.3f}", **{"tok/s": f"{window.speed():,.0f}"}
                )

                if progress.update % config.log_interval == 0:
                    self._record({"split": "train", **window.summary()})
                    window = Window()
                interval = config.validate_interval_updates
                validate = progress.update % interval == 0 if interval else epoch_ends
                validate |= self._finished() and progress.update > 0
                if validate and not stopping:
                    self._validate()
                    window.restart_clock()
                if validate or stopping or progress.update % config.save_interval_updates == 0:
                    self._save(numbered=validate and not stopping)
                if stopping:
                    break
        if stop.signal:
            logs.info(f"stopped by signal {stop.signal} after update {progress.update}; saved")
            raise SystemExit(128 + stop.signal)

    def _next_batches(self) -> tuple[list[Batch], bool]:
        """Return this rank's batches of the next update, and whether they end the epoch."""
        progress = self.progress
        schedule = self._epoch_batches(progress.epoch)
        end = min(progress.batch + self.config.update_freq, len(schedule))
        chosen = schedule[progress.batch : end]
        progress.batch = end
        epoch_ends = end == len(schedule)
        if epoch_ends:
            progress.epoch, progress.batch = progress.epoch + 1, 0
        return [self.batcher.collate(sentences) for sentences in chosen], epoch_ends

    def _update(self, micro_batches: list[Batch], all_tokens: float) -> dict[str, float]:
        """Do one optimizer update over micro-batches that hold ``all_tokens`` over all ranks."""
        config, progress = self.config, self.progress
        update = progress.update + 1
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for micro_step, batch in enumerate(micro_batches):
            seed_everything(config.seed, "train", update, self.processes.rank, micro_step)
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
            ):
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
        means = self.processes.sum([float(value) for value in sums.values()])
        return {
            **dict(zip(sums, means, strict=True)),
            "grad_norm": float(grad_norm),
            "lr": rate,
        }

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

    def _validate(self) -> None:
        if self.valid_batcher is None:
            return
        config, progress = self.config, self.progress
        if self.ema:
            self.ema.swap(self.model)
        self.model.eval()
        figures = validation_loss(
            self.model, self.valid_batcher, config, self.processes, progress.update, self.dtype
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

    def _finished(self) -> bool:
        config, progress = self.config, self.progress
        return (
            progress.update >= config.max_update
            or (config.max_epoch > 0 and progress.epoch > config.max_epoch)
            or (config.patience > 0 and progress.bad_validations >= config.patience)
        )

    def _epoch_batches(self, epoch: int) -> list[Any]:
        """The batches of an epoch, computed once an epoch."""
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._schedule = epoch, self.batcher.epoch(epoch)
        return self._schedule

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
        if self.processes.rank == 0:
            line = {"update": self.progress.update, "epoch": self.progress.epoch, **figures}
            with open(self.save_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _save(self, numbered: bool) -> None:
        """Write ``checkpoint_last``, and its other names where they are due."""
        if self.processes.rank == 0:
            last = self.save_dir / "checkpoint_last.safetensors"
            self._checkpoint().save(last)
            progress, keep = self.progress, self.config.keep_last
            if progress.best is not None and progress.best_update == progress.update:
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
        _drop_later_metrics(self.save_dir / "metrics.jsonl", self.progress.update)
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


class Window:
    """Means and speed over the updates since the last line of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.updates, self.tokens = 0, 0.0
        self.seconds, self._since = 0.0, time.monotonic()

    def add(self, figures: dict[str, float], tokens: float) -> None:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.updates, self.tokens = self.updates + 1, self.tokens + tokens

    def restart_clock(self) -> None:
        """Do not count the time since the last update."""
        self._since = time.monotonic()

    def mean(self, name: str) -> float:
        return self.sums[name] / self.updates

    def speed(self) -> float:
        """Return target tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        means = {name: self.mean(name) for name in self.sums}
        return {**means, "tokens_per_second": self.speed(), "seconds": self.seconds}


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


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast type of ``--dtype``; ``auto`` is bfloat16 on GPUs that have it."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def _drop_later_metrics(path: Path, update: int) -> None:
    """Remove the lines of updates that a resumed run will do again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= update
        ]
        path.write_text("".join(kept), encoding="utf-8")
