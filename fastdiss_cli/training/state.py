"""The state of a training run, which is created, saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiss_cli import logs
from fastdiss_cli.checkpoints.checkpoint import Checkpoint, Progress, update_of
from fastdiss_cli.checkpoints.folder import (
    BEST,
    LAST,
    best_of,
    copy_checkpoint,
    link_checkpoint,
    number_of,
    numbered,
    prune_numbered,
)
from fastdiss_cli.checkpoints.loading import load_weights, vocabulary
from fastdiss_cli.config import TrainConfig
from fastdiss_cli.data.dataset import Dataset
from fastdiss_cli.data.tokenizer import check_same
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError, OptionError
from fastdiss_cli.models.registry import Architecture, Seq2SeqModel
from fastdiss_cli.randomness import seed_everything
from fastdiss_cli.training import sharding
from fastdiss_cli.training.changes import (
    changes,
    describe_changes,
    forget_changed,
    model_changes,
    refuse_changes,
)
from fastdiss_cli.training.optimizer import EMA, make_optimizer, pack_optimizer, unpack_optimizer


class TrainState:
    """Model, optimizer, average of the weights and progress of one training run.

    Args:
        arch: the architecture.
        model_config: the options of the model, as returned by `Architecture.config`.
        config: all other options.
        dataset: the dataset, whose tokenizers determine the vocabularies.
        processes: the process group.
        begin_with: a checkpoint whose weights to start from; None: random ones.
    """

    def __init__(
        self,
        arch: Architecture,
        model_config: Any,
        config: TrainConfig,
        dataset: Dataset,
        processes: Processes,
        begin_with: Path | None = None,
    ) -> None:
        self.arch, self.config, self.dataset, self.processes = arch, config, dataset, processes
        self.model_config = model_config
        seed_everything(config.seed, "initialise")
        self.model = self._new_model()
        if begin_with is not None:
            self._begin_with(begin_with)
        if config.shard:
            sharding.shard(self.model, processes)
        self.optimizer = make_optimizer(self.model, config)
        self.ema = EMA(self.model, config.ema_decay) if config.ema_decay else None
        self.progress = Progress()
        self.saved: int | None = None  # the update of checkpoint_last

    def last_saved(self, folder: Path) -> str:
        """Return the end of a message that says which update is on the disk."""
        if self.saved is None:
            return "nothing has been saved"
        return f"{folder / LAST} is from update {self.saved:,}"

    @contextmanager
    def averaged(self) -> Iterator[Seq2SeqModel]:
        """Yield the model in evaluation mode, with the averaged weights in place of its own.

        A sharded model is copied as a whole to every rank: ranks decode at their own pace.
        """
        if sharding.is_sharded(self.model):
            weights = self.ema.weights if self.ema else dict(self.model.named_parameters())
            yield sharding.gather_into(self._new_model().eval(), weights, self.processes)
            return
        if self.ema:
            self.ema.swap(self.model)
        self.model.eval()
        try:
            yield self.model
        finally:
            if self.ema:
                self.ema.swap(self.model)

    def save(self, folder: Path, numbered: bool, final: bool) -> bool:
        """Write ``checkpoint_last`` and, if they are due, the best and a numbered checkpoint.

        ``checkpoint_last`` shares its bytes with no other file, so that damage to it leaves the
        others intact. A save that fails leaves the older files intact.

        Args:
            folder: the folder of the checkpoints.
            numbered: also write a numbered checkpoint, and keep ``keep_last`` of them.
            final: whether this is the last save.

        Returns:
            False if the current weights are the best, but could not be saved as such.

        Raises:
            FastdissError: the last save failed.
        """
        first, progress = self.processes.rank == 0, self.progress
        best_saved = not (first and progress.is_best)
        checkpoint = self._checkpoint()
        remedy = "keep more memory free, or choose a smaller model"
        with self.processes.attempt("saving", remedy) as attempt:
            if first:
                checkpoint.save(folder / LAST)
                self.saved = progress.update
                if progress.is_best:
                    copy_checkpoint(folder / LAST, folder / BEST)
                best_saved = True
                if numbered and self.config.keep_last:
                    name = f"checkpoint_{progress.epoch}_{progress.update}.safetensors"
                    if progress.is_best:
                        link_checkpoint(folder / BEST, folder / name)
                    else:
                        copy_checkpoint(folder / LAST, folder / name)
                    prune_numbered(folder, self.config.keep_last, progress.update)
        failed, lost = self.processes.sum(
            [float(attempt.failure is not None), float(not best_saved)]
        )
        if final:
            self.processes.fail_together(attempt, failed)
        if failed:
            logs.warn(f"{attempt.failure}; training continues until the next save")
        return not lost

    def resume(self, folder: Path, accept_changes: bool) -> None:
        """Resume from the ``checkpoint_last`` of a folder.

        Raises:
            FastdissError: see `Checkpoint.load`; or it is a release, has other tokenizers, or was
                trained with settings that differ, unless ``accept_changes`` is set.
        """
        path = folder / LAST
        checkpoint = Checkpoint.load(path)
        if checkpoint.card is not None:
            raise FastdissError(
                f"{path} is a release without optimizer state, and cannot be resumed: "
                "train into another --save-dir"
            )
        self._check_tokenizers(
            checkpoint, str(self.dataset.folder), "train into another --save-dir"
        )
        with _naming(path):
            differing = changes(
                checkpoint,
                self.arch,
                self.model_config,
                self.config,
                self.dataset.hash,
                self.processes.world_size,
            )
        if differing and not accept_changes:
            saved = {name: weight.shape for name, weight in checkpoint.group("model").items()}
            own = {name: p.shape for name, p in self.model.named_parameters()}
            refuse_changes(path, differing, fits=saved == own)
        if differing:
            logs.warn(f"resuming although {describe_changes(differing)}")
        checkpoint.tensors = sharding.divide(checkpoint.tensors, self.model)
        load_weights(self.model, checkpoint.group("model"), path)
        if self.ema:  # an average that is new in this run starts from the weights
            for name, value in (checkpoint.group("ema") or checkpoint.group("model")).items():
                self.ema.weights[name].copy_(value)
        unpack_optimizer(self.model, self.optimizer, checkpoint.group("optimizer"))
        self.progress, self.saved = checkpoint.progress, checkpoint.progress.update
        update, best = self.progress.update, update_of(folder / BEST) or 0
        scored = self.progress.best is not None
        forget_changed(self.progress, differing)
        if scored and self.progress.best is None and best:
            logs.warn(
                f"{folder / BEST} is the best before these changes: `generate` takes it until the "
                "next validation replaces it; without one, name the checkpoint"
            )
        if self.progress.best_update < update and self.progress.best is not None and not best:
            logs.warn(
                f"{folder / BEST} is missing or damaged: the next validation will be the best"
            )
            self.progress.best = None
        if self.progress.is_best and best < update and self.processes.rank == 0:
            copy_checkpoint(path, folder / BEST)  # killed in between
        logs.info(f"resuming {path} after update {update:,}")
        later = [path for path in numbered(folder) if number_of(path) > update]
        if best > update:
            later.append(folder / BEST)
        if later:
            used = f"; `generate` takes {BEST} meanwhile" if best > update else ""
            logs.warn(
                f"{', '.join(map(str, later))}: newer than {LAST}, and kept until training "
                f"replaces them{used}"
            )

    def _new_model(self) -> Seq2SeqModel:
        model = self.arch.model(self.model_config, *map(vocabulary, self.dataset.tokenizers))
        return model.to(self.processes.device)

    def _begin_with(self, path: Path) -> None:
        """Start from the weights of another training run or of a release.

        Args:
            path: the checkpoint; a folder stands for its ``checkpoint_best``.

        Raises:
            FastdissError: see `Checkpoint.load`; or it has other tokenizers or weights.
        """
        path = best_of(path)
        checkpoint = Checkpoint.load(path)
        remedy = f"preprocess with the tokenizers that {path} was trained on"
        self._check_tokenizers(checkpoint, "the dataset", remedy)
        with _naming(path):
            differing = model_changes(checkpoint, self.arch, self.model_config)
        told, advice = "", f"give --arch {checkpoint.arch}"
        if differing:
            told, advice = f"; {describe_changes(differing)}", f"{advice} and the same options"
        try:
            load_weights(self.model, checkpoint.averaged(), path)
        except FastdissError as error:
            if checkpoint.arch == self.arch.name:
                raise FastdissError(f"{error}{told}") from None
            raise FastdissError(
                f"{path} is a {checkpoint.arch}, whose weights do not fit this {self.arch.name}"
                f"{told}: {advice}"
            ) from None
        logs.info(f"starting from the weights of {path} ({checkpoint.arch}){told}")

    def _check_tokenizers(self, checkpoint: Checkpoint, where: str, remedy: str) -> None:
        own = checkpoint.tokenizer("src"), checkpoint.tokenizer("tgt")
        check_same(own, self.dataset.tokenizers, where, remedy)

    def _checkpoint(self) -> Checkpoint:
        tensors: dict[str, Tensor] = {f"model.{n}": p for n, p in self.model.named_parameters()}
        if self.ema:
            tensors |= {f"ema.{name}": p for name, p in self.ema.weights.items()}
        packed = pack_optimizer(self.model, self.optimizer)
        tensors |= {f"optimizer.{name}": value for name, value in packed.items()}
        for side, tokenizer in zip(("src", "tgt"), self.dataset.tokenizers, strict=True):
            model = bytearray(tokenizer.model)
            tensors[f"tokenizer.{side}"] = torch.frombuffer(model, dtype=torch.uint8)
        return Checkpoint(
            arch=self.arch.name,
            model_config=asdict(self.model_config),
            train_config=asdict(self.config),
            progress=self.progress,
            dataset_hash=self.dataset.hash,
            world_size=self.processes.world_size,
            tensors=sharding.gather(tensors, self.processes),
            dataset=self.dataset.summary,
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the checkpoint that an invalid option is from."""
    try:
        yield
    except OptionError as error:
        raise FastdissError(f"{path}: {error}") from None
