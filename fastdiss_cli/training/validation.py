"""Validation: the loss and sacreBLEU of a split, distributed over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sacrebleu import BLEU

from fastdiss_cli.checkpoints.checkpoint import Progress
from fastdiss_cli.config import TrainConfig
from fastdiss_cli.data.batching import TokenBatcher
from fastdiss_cli.data.dataset import Dataset
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.decoding.selection import by_score
from fastdiss_cli.device import autocast
from fastdiss_cli.distributed import Processes
from fastdiss_cli.models.registry import Seq2SeqModel
from fastdiss_cli.randomness import seed_everything
from fastdiss_cli.signals import Stop, Stopped

CHUNK = 64  # about how many sentences a rank decodes between two checks for signals


@dataclass
class Validator:
    """Validates a model with the settings of its training run.

    Attributes:
        config: the options of the training run.
        dataset, batcher: the data; the split ``valid`` is used.
        processes: the process group, which shares the work.
        stop: checked between two batches.
        dtype: float32, or bfloat16 for autocast.
        show: called with the progress, as text.
    """

    config: TrainConfig
    dataset: Dataset
    batcher: TokenBatcher
    processes: Processes
    stop: Stop
    dtype: torch.dtype
    show: Callable[[str], None]

    def decoding(self, model: Seq2SeqModel) -> Any:
        """Return a model's options for validation BLEU: one candidate, and no endless answers.

        An autoregressive model that has learnt little goes on to its limit, here twice the longest
        reference.
        """
        references = self.dataset["valid"]["tgt"]
        count = min(self.config.valid_sentences, len(references))
        longest = max((len(references[i]) for i in range(count)), default=1)
        wanted = {"steps": self.config.valid_steps, "beam": 1, "max_len_b": 2 * longest}
        known = model.decoding_options()
        return model.Decoding(**{k: v for k, v in wanted.items() if k in known})

    @torch.no_grad()
    def loss(self, model: Seq2SeqModel, update: int) -> dict[str, float]:
        """Return the mean loss per token and its parts; every call draws the same noise.

        Raises:
            Stopped: a signal came to any rank.
        """
        processes, batches = self.processes, self.batcher.epoch(0)
        sums: dict[str, float] = {}
        tokens = 0
        for number, batch in enumerate(map(self.batcher.collate, batches)):
            self.show(f"{number:,}/{len(batches):,} batches")
            seed_everything(self.config.seed, "valid", processes.rank, number)
            what = f"the validation of {len(batch.src_tokens)} sentences"
            with processes.attempt(what) as attempt:
                with autocast(processes.device, self.dtype):
                    loss = model.loss(batch.to(processes.device), update)
                means = {"loss": loss.total, **loss.parts}
                for name, mean in zip(means, torch.stack([*means.values()]).tolist(), strict=True):
                    sums[name] = sums.get(name, 0.0) + mean * batch.num_tgt_tokens
                tokens += batch.num_tgt_tokens
            if signal := processes.agree(attempt, self.stop):
                raise Stopped(signal)
        *totals, tokens_everywhere = processes.sum([*sums.values(), tokens])
        return {name: total / tokens_everywhere for name, total in zip(sums, totals, strict=True)}

    def bleu(self, model: Seq2SeqModel) -> float:
        """Return sacreBLEU of the first ``valid_sentences`` sentences; see `decoding`.

        Raises:
            Stopped: a signal came to any rank.
        """
        config, ranks, split = self.config, self.processes.world_size, self.dataset["valid"]
        count = min(config.valid_sentences, len(split["src"]))
        run = Run(self.decoding(model))
        text = self.dataset.tgt_tokenizer.decode
        hypotheses: list[str] = []
        for first in range(0, count, CHUNK * ranks):
            self.show(f"{first:,}/{count:,} sentences")
            end = min(first + CHUNK * ranks, count)
            sources = [split["src"][i].tolist() for i in range(first, end)]
            # at most about one batch per rank
            max_tokens = min(config.max_tokens, CHUNK * max(map(len, sources)))
            generator = SequenceGenerator(model, by_score, max_tokens, self.dtype)
            if signal := generator.decode_together(
                sources, [run], self.processes, self.stop, first
            ):
                raise Stopped(signal)
            hypotheses += [text(h.tokens) for h in run.answers]
        references = [text(split["tgt"][i].tolist()) for i in range(count)]
        # effective order: texts of fewer than four words have no 4-grams to count; force: no
        # advice to stderr on text that looks tokenized
        metric = BLEU(effective_order=True, force=True)
        return metric.corpus_score(hypotheses, [references]).score


def judge(progress: Progress, figures: dict[str, float]) -> None:
    """Record whether a validation is the best so far: by BLEU, or by loss if there is no BLEU.

    Ties in BLEU are broken by the lower loss.
    """
    loss, by_bleu = figures["loss"], "bleu" in figures
    score = figures["bleu"] if by_bleu else -loss
    best, best_loss = progress.best, progress.best_loss
    tied = score == best and best_loss is not None
    better = best is None or score > best or (tied and loss < best_loss)
    if better and math.isfinite(loss) and math.isfinite(score):
        progress.best, progress.best_loss, progress.best_is_bleu = score, loss, by_bleu
        progress.best_update, progress.bad_validations = progress.update, 0
    else:
        progress.bad_validations += 1
