"""The Python API: load a checkpoint, generate, score. `docs/api.md` has examples."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from typing_extensions import Unpack  # of Python 3.11; torch needs this package, too

from fastdiss_cli.checkpoints.loading import Loaded, load_model
from fastdiss_cli.config import build
from fastdiss_cli.data.text import on_one_line
from fastdiss_cli.decoding.generation import Run, SequenceGenerator, default_max_tokens
from fastdiss_cli.decoding.output import hypothesis_text
from fastdiss_cli.decoding.selection import selector, with_runners_up
from fastdiss_cli.decoding.systems import reference_streams
from fastdiss_cli.device import pick_device, pick_dtype
from fastdiss_cli.errors import FastdissError, suggest
from fastdiss_cli.models.registry import Hypothesis


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `Translator.generate`, named like the flags of the command.

    Decoding, for diffusion models:
        steps: denoising steps, each one evaluation of the network; at least 1 (5).
        length_beam, noise_beam: candidates per sentence: lengths x noise draws; at least 1 (1, 1).
        solver: ``ddpm``, ``ddim`` or ``dpm-solver++`` (ddpm).
        temperature: scale of the noise that ``ddpm`` adds in a step; 0 to 1 (0.25).
        time_grid: ``uniform``, ``quadratic`` or ``log-snr`` (log-snr).
        clamp: ``raw``, ``nearest`` or ``expected``: what the solver uses as z_0 (expected).
        self_cond: ``reuse``, ``none`` or ``recompute`` (reuse).
        early_exit: stop a sentence when two steps in a row give the same tokens, each with a
            probability above 0.5 (False).
        seed: of the noise, which also depends on the sentence itself (1).

    Decoding, for autoregressive models:
        beam: 1 is greedy search (5).
        lenpen: length penalty (1.0).
        max_len_a, max_len_b: a translation has at most a x source + b tokens (0, 200).
        min_len: minimum number of tokens (1).

    Choosing among candidates:
        select: ``score``, ``mbr`` or ``rerank`` (mbr for diffusion models, score for others).
        mbr_metric: ``bleu`` or ``chrf`` (bleu).
        mbr_weights: ``length``: candidates count by the probability of their length; ``equal``
            (length).
        reranker: the autoregressive model that ``select="rerank"`` uses.

    Machine:
        max_tokens: padded source tokens per batch, all candidates counted (8000; on a CPU 2000).
    """

    steps: int
    length_beam: int
    noise_beam: int
    solver: str
    temperature: float
    time_grid: str
    clamp: str
    self_cond: str
    early_exit: bool
    seed: int
    beam: int
    lenpen: float
    max_len_a: float
    max_len_b: int
    min_len: int
    select: str
    mbr_metric: str
    mbr_weights: str
    reranker: Translator
    max_tokens: int


if hasattr(os, "register_at_fork"):
    # OpenMP's threads do not survive a fork: a forked child that waits for them would hang
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))

_OF_ALL_MODELS = ("select", "mbr_metric", "mbr_weights", "reranker", "max_tokens")
_OBSERVING = ("history", "diagnose")  # `Decoding` fields that only record more
_NO_LIST = (str, bytes, Set, Mapping)  # iterables that are no lists of strings


@dataclass(frozen=True)
class Candidate:
    """One answer to a sentence.

    Attributes:
        text: the answer.
        score: the model's mean log-probability of a token (with ``lenpen``: the sum, divided by
            length ** lenpen); higher is better.
    """

    text: str
    score: float


@dataclass(frozen=True)
class Score:
    """A system's score by one metric; `str` gives sacreBLEU's output line.

    Attributes:
        value: 0 to 100; TER and WER may exceed 100.
        signature: sacreBLEU's signature: everything that the value depends on.
    """

    value: float
    signature: str
    line: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.line


@dataclass(repr=False, eq=False)
class Translator:
    """A loaded model with its tokenizers.

    Pickling it keeps only the arguments of `load`: the other process loads the file again.
    """

    loaded: Loaded
    arguments: tuple[Path, str | torch.device, str | torch.dtype, Path | None]  # those of `load`

    def __reduce__(self) -> tuple[Callable[..., Translator], tuple[Any, ...]]:
        return load, self.arguments

    def __repr__(self) -> str:
        source, target = self.loaded.languages
        return f"<Translator {self.loaded.arch.name}, {source or '?'} to {target or '?'}>"

    def generate(self, sentences: Iterable[str], **options: Unpack[GenerateOptions]) -> list[str]:
        """Translate sentences.

        Args:
            sentences: raw text, one sentence each; a line break at its end does not count.
            **options: flags of ``fastdiss generate``, such as ``steps=5, noise_beam=3``:
                ``help(fastdiss_cli.api.GenerateOptions)`` lists them.

        Returns:
            One translation per sentence, in order.

        Raises:
            FastdissError: an option is unknown, not one of this model's, or out of range; or
                memory ran out.
        """
        chosen = self._decode(sentences, options, others=False)
        return [hypothesis_text(best, self.loaded.tgt) for best in chosen]

    def candidates(
        self, sentences: Iterable[str], **options: Unpack[GenerateOptions]
    ) -> list[list[Candidate]]:
        """Return all candidates of each sentence: the chosen one, then the others by score.

        Arguments and errors are those of `generate`.
        """
        tgt = self.loaded.tgt
        return [
            [Candidate(hypothesis_text(h, tgt), h.score) for h in (best, *best.runners_up)]
            for best in self._decode(sentences, options, others=True)
        ]

    def _decode(
        self, sentences: Iterable[str], options: GenerateOptions, others: bool
    ) -> list[Hypothesis]:
        """Return the chosen hypothesis of each sentence; ``others`` become its `runners_up`."""
        sentences = _strings(sentences, "sentences")
        model = self.loaded.model
        # accept numpy scalars
        decoding = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
        max_tokens = decoding.pop("max_tokens", default_max_tokens(model.device))
        if type(max_tokens) is not int or max_tokens < 1:
            raise FastdissError(f"max_tokens must be a whole number above 0, not {max_tokens!r}")
        reranker = decoding.pop("reranker", None)
        if not isinstance(reranker, (Translator, type(None))):
            raise FastdissError("reranker must be what fastdiss_cli.load returns")
        how = [decoding.pop(name, None) for name in ("select", "mbr_metric", "mbr_weights")]
        _, select = selector(self.loaded, *how, reranker and reranker.loaded)
        known = [n for n in (*model.decoding_options(), *_OF_ALL_MODELS) if n not in _OBSERVING]
        for name in decoding:
            if name not in known:
                raise FastdissError(
                    f"this model has no option {name!r}"
                    f"{suggest(name, known) or '; its options are ' + ', '.join(known)}"
                )
        if decoding.get("self_cond") == "gold":
            raise FastdissError("self_cond='gold' needs references: use `fastdiss generate DATA`")
        run = Run(build(model.Decoding, decoding))
        model.check_decoding(run.options)
        if sentences:
            # as `generate` and `preprocess` read a line, such as one of an open file
            lines = [on_one_line(s.removesuffix("\n").removesuffix("\r")) for s in sentences]
            sources = [self.loaded.src.encode_source(line) for line in lines]
            if others:
                select = with_runners_up(select, run.options.candidates - 1)
            SequenceGenerator(model, select, max_tokens, self.loaded.dtype).decode(sources, [run])
        return run.answers


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    user_module: str | Path | None = None,
) -> Translator:
    """Load a checkpoint; no other file is needed.

    No global state of this process is changed (signal handlers, torch's random generators,
    environment variables), and any thread may call it. (A thread that draws from torch's generator
    meanwhile gets different numbers.)

    Args:
        path: as written by ``fastdiss train`` or ``fastdiss export``; a folder stands for its
            ``checkpoint_best``.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 on GPUs that support it.
        user_module: the Python file that registers the checkpoint's architecture, if it is yours.

    Raises:
        FastdissError: no such checkpoint, device or type; or the file is damaged.
    """
    for name, given in (("path", path), ("user_module", user_module or "")):
        if not isinstance(given, (str, Path)):
            raise FastdissError(f"{name}: give a string or a Path, not {type(given).__name__}")
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    # absolute, as a pickled translator may be loaded in another working directory
    file = Path(path).absolute()
    module = None if user_module is None else Path(user_module).absolute()
    loaded = load_model(Path(path), torch_device, module, torch_dtype)
    return Translator(loaded, (file, device, dtype, module))


def score(
    hypotheses: Iterable[str],
    references: Iterable[str] | Iterable[Iterable[str]],
    metrics: Iterable[str] = ("bleu", "chrf", "ter"),
) -> dict[str, Score]:
    """Score translations with sacreBLEU.

    Args:
        hypotheses: one per sentence.
        references: one per sentence, or a list of alternatives for each.
        metrics: keys of `metrics.METRICS`: bleu, chrf, ter, rouge1, wer, ...

    Returns:
        The score of each metric, by its name.

    Raises:
        FastdissError: a metric is unknown, or the numbers of sentences differ.
    """
    from fastdiss_cli.metrics import METRICS

    hypotheses = _strings(hypotheses, "hypotheses")
    metrics = _strings(metrics, "metrics")
    if isinstance(references, _NO_LIST) or not np.iterable(references):
        raise FastdissError(f"references: give a list of strings, not {type(references).__name__}")
    alternatives = [
        _strings([r] if isinstance(r, str) else r, f"references of sentence {i}")
        for i, r in enumerate(references)
    ]
    if not all(alternatives):
        raise FastdissError("every sentence needs a reference")
    for i, row in enumerate(alternatives):
        if len(row) > 1 and not all(map(str.strip, row)):
            raise FastdissError(f"references of sentence {i}: one of several is empty")
    if not hypotheses or len(hypotheses) != len(alternatives):
        raise FastdissError(
            f"{len(hypotheses):,} hypotheses but {len(alternatives):,} references: "
            "give one of each per sentence, and at least one sentence"
        )
    streams = reference_streams(alternatives)
    scores = {}
    for name in metrics:
        if name not in METRICS:
            raise FastdissError(
                f"no metric {name!r}"
                f"{suggest(name, METRICS) or '; the metrics are ' + ', '.join(METRICS)}"
            )
        metric = METRICS[name]()
        result = metric.corpus_score(hypotheses, streams)
        signature = metric.get_signature().format()
        scores[name] = Score(result.score, signature, result.format(signature=signature))
    return scores


def _strings(values: Iterable[str], what: str) -> list[str]:
    """Return the values as a list, or raise a FastdissError if they are not strings."""
    if isinstance(values, _NO_LIST) or not np.iterable(values):
        raise FastdissError(f"{what}: give a list of strings, not {type(values).__name__}")
    values = list(values)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise FastdissError(f"{what}: item {i} is {type(value).__name__}, not a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise FastdissError(f"{what}: item {i} contains a lone surrogate") from None
    return values
