"""Decode a list of sentences: batches by length, one encoder pass for all runs."""
# B batch, S source length

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastdiss_cli.data.batching import batches_by_tokens, pad
from fastdiss_cli.decoding.selection import Select
from fastdiss_cli.device import autocast, out_of_memory
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Hypothesis, Seq2SeqModel
from fastdiss_cli.randomness import counter_seed
from fastdiss_cli.signals import Stop

Done = Callable[[int], None]  # called with the number of newly finished sentences


def default_max_tokens(device: torch.device) -> int:
    """Return a fast padded batch size; on a CPU, activations must stay in its cache."""
    return 2000 if device.type == "cpu" else 8000


@dataclass
class Run:
    """One decoding configuration (such as one step count), its answers and their cost.

    Attributes:
        options: the model's `Decoding`.
        best: the chosen hypothesis of each sentence, in the given order; None if another rank
            decodes it, or if a signal came first.
        seconds: time spent, including the encoder.
        nfe: decoder evaluations, summed over sentences.
        sentences: the number of decoded sentences.
        empty: the number of empty ones among them, which cost nothing.
    """

    options: Any
    best: list[Hypothesis | None] = field(default_factory=list)
    seconds: float = 0.0
    nfe: int = 0
    sentences: int = 0
    empty: int = 0

    @property
    def answers(self) -> list[Hypothesis]:
        """The chosen hypotheses, where all sentences were decoded."""
        assert None not in self.best
        return self.best  # type: ignore[return-value]


@dataclass
class SequenceGenerator:
    """A model and the settings that it decodes with.

    Attributes:
        model: the model, in evaluation mode.
        select: chooses among the candidates.
        max_tokens: the largest padded size of a batch, counting all candidates.
        dtype: float32, or bfloat16 for autocast.
    """

    model: Seq2SeqModel
    select: Select
    max_tokens: int
    dtype: torch.dtype = torch.float32

    @torch.inference_mode()
    def decode(
        self,
        sources: Sequence[Sequence[int]],
        runs: Sequence[Run],
        first: int = 0,
        gold: Sequence[Sequence[int]] | None = None,
        done: Done = lambda sentences: None,
        should_stop: Callable[[], int] = lambda: 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Decode sentences once per run, and store the answers in ``runs``.

        Args:
            sources: token ids, including eos; the answer to an empty sentence is empty.
            runs: `Run.best` is replaced, the costs are accumulated.
            first: the number of the first sentence in the corpus, for messages.
            gold: the references, for options that diagnose with them.
            done: called after each batch.
            should_stop: called after each batch; if true, the remaining sentences stay None in
                `Run.best`.
            share: (r, n): decode only the r-th of every n batches; other sentences stay None.

        Raises:
            FastdissError: memory ran out.
        """
        lengths = np.array([len(tokens) for tokens in sources])
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > 1]
        empty = np.flatnonzero(lengths <= 1)[share[0] :: share[1]]
        widest = max(run.options.candidates for run in runs)
        for run in runs:
            run.best = [None] * len(sources)
            for i in empty:  # eos alone: there is nothing to translate
                run.best[i] = Hypothesis([], 0.0, [], nfe=0)
                run.sentences += 1
                run.empty += 1
        done(len(empty))
        batches = batches_by_tokens(order, lengths, max(self.max_tokens // widest, 1))
        for rows in batches[share[0] :: share[1]]:
            try:
                self._decode_batch(rows, sources, runs, gold)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                longest, remedy = int(lengths[rows].max()), f"--max-tokens (now {self.max_tokens})"
                batch = f"a batch of {len(rows)} sentences of at most {longest} source tokens"
                if len(rows) == 1:
                    remedy = "the number of candidates, or split it"
                    number = first + rows[0]
                    batch = f"sentence {number} (from 0), which has {longest} source tokens"
                raise FastdissError(
                    f"out of memory decoding {batch}, {widest} candidates each: lower {remedy}"
                ) from None
            done(len(rows))
            if should_stop():
                break

    def _decode_batch(
        self,
        rows: np.ndarray,
        sources: Sequence[Sequence[int]],
        runs: Sequence[Run],
        gold: Sequence[Sequence[int]] | None,
    ) -> None:
        model = self.model
        device = model.device
        batch = [sources[i] for i in rows]
        answers = None if gold is None else [gold[i] for i in rows]
        # seeded by its own tokens: the answer does not depend on a source's place in the corpus
        seeds = torch.tensor([counter_seed("source", *source) for source in batch]).to(device)
        start = time.perf_counter()
        with autocast(device, self.dtype):
            memory = model.encode(*(x.to(device) for x in pad(batch, model.src.pad)))
            if device.type == "cuda" and len(runs) > 1:  # its time is charged to every run
                torch.cuda.synchronize(device)
            encoding = time.perf_counter() - start
            for run in runs:
                start = time.perf_counter()
                candidates = model.decode(memory, seeds, run.options, answers)
                if not all(row and not any(math.isnan(h.score) for h in row) for row in candidates):
                    raise FastdissError(
                        "the model's output is not finite: its training has diverged"
                    )
                chosen = self.select(batch, candidates)
                run.seconds += encoding + time.perf_counter() - start
                run.nfe += sum(h.nfe for h in chosen)
                run.sentences += len(chosen)
                for i, hypothesis in zip(rows, chosen, strict=True):
                    run.best[i] = hypothesis

    def decode_together(
        self,
        sources: Sequence[Sequence[int]],
        runs: Sequence[Run],
        processes: Processes,
        stop: Stop,
        first: int = 0,
        gold: Sequence[Sequence[int]] | None = None,
        done: Done = lambda sentences: None,
    ) -> int:
        """Decode this rank's share of the batches and collect the answers of all ranks.

        The batches, and so the answers, are bit for bit those of a single process.

        Args:
            sources, runs, first, gold, done: as in `decode`, the same on all ranks. The seconds of
                a run are those of its slowest rank.
            processes: the process group.
            stop: after a signal, this rank finishes its current batch only; the rest stays None.

        Returns:
            The signal that any rank received, or 0.

        Raises:
            CommonError: memory ran out on a rank.
        """
        own, before = [Run(run.options) for run in runs], runs[-1].sentences
        share = processes.rank, processes.world_size
        with processes.attempt("decoding") as attempt:
            self.decode(sources, own, first, gold, done, lambda: stop.signal, share)
        signal = processes.agree(attempt, stop)
        for run, parts in zip(runs, zip(*processes.gather([own]), strict=True), strict=True):
            answers = zip(*(part.best for part in parts), strict=True)
            run.best = [next(filter(None, found), None) for found in answers]
            run.seconds += max(part.seconds for part in parts)
            run.nfe += sum(part.nfe for part in parts)
            run.sentences += sum(part.sentences for part in parts)
            run.empty += sum(part.empty for part in parts)
        everywhere = runs[-1].sentences - before
        done(everywhere - own[-1].sentences)
        return signal
