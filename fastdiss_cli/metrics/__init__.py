"""The metrics of `score`, by name. To add one, write a class and register it here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric

from fastdiss_cli.errors import FastdissError, OptionError, suggest
from fastdiss_cli.metrics.diversity import Distinct, Diversity, SelfBLEU, SentenceDistinct
from fastdiss_cli.metrics.rates import SER, WER, Repetition
from fastdiss_cli.metrics.similarity import ROUGES, BERTScore

if TYPE_CHECKING:
    from sacrebleu.significance import Result


def bleu(tokenize: str = "13a", lowercase: bool = False) -> BLEU:
    """Return sacreBLEU's BLEU.

    Args:
        tokenize: the name of a tokenizer that sacreBLEU knows.
        lowercase: lower-case both sides.

    Raises:
        OptionError: sacreBLEU has no such tokenizer.
        FastdissError: the tokenizer needs a package or a model that is missing.
    """
    if tokenize not in BLEU.TOKENIZERS:
        known = f"{', '.join(BLEU.TOKENIZERS)}, not {tokenize!r}"
        raise OptionError("tokenize", f"must be one of {known}{suggest(tokenize, BLEU.TOKENIZERS)}")
    try:
        # forced: no advice on tokenized text, which belongs to sacreBLEU's own command line
        return BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
    except OSError as error:
        reason = f"its model cannot be downloaded ({error})"
    except (RuntimeError, ImportError) as error:  # a missing package
        reason = " ".join(str(error).split())
    raise FastdissError(f"--tokenize {tokenize}: {reason}")


# a sum over sentences, with sacreBLEU's interface
METRICS: dict[str, Callable[..., Metric]] = {
    "bleu": bleu,
    "chrf": CHRF,
    "ter": TER,
    **ROUGES,
    "bertscore": BERTScore,
    "wer": WER,
    "ser": SER,
    "repetition": Repetition,
}
LOWER_IS_BETTER = {"ter", "wer", "ser", "repetition"}
# computed from a system's own answers
DIVERSITY: dict[str, Callable[[], Diversity]] = {
    "distinct1": lambda: Distinct(1),
    "distinct2": lambda: Distinct(2),
    "sentence-distinct": SentenceDistinct,
    "self-bleu": SelfBLEU,
}


def prepare(metric: Metric, streams: Sequence[Sequence[str | None]]) -> None:
    """Read the references once for all systems, which are then scored against ``None``.

    As sacreBLEU's own metrics do if they are made with ``references``.

    Args:
        metric: one of `METRICS`.
        streams: sacreBLEU's reference streams.
    """
    metric._ref_cache = metric._cache_references(streams)


class Tested(NamedTuple):
    """A paired test by one metric.

    Attributes:
        results: one per system, the baseline first, with ``score``; ``p_value``, 1 if the score
            equals the baseline's, None for the baseline itself; and, of the bootstrap, ``mean``
            and ``ci``, half the width of the 95 % interval.
    """

    name: str
    signature: str
    results: list[Result]


def paired_test(
    systems: Sequence[Sequence[str]],
    streams: Sequence[Sequence[str | None]] | None,
    metrics: dict[str, Metric],
    test: str = "bs",
) -> list[Tested]:
    """Compare systems with the first one, on the same sentences.

    Args:
        systems: the hypotheses of each; the first is the baseline.
        streams: sacreBLEU's reference streams; None: those that the metrics went through `prepare`
            with.
        metrics: by name, as in `METRICS`.
        test: ``bs`` (paired bootstrap, Koehn 2004) or ``ar`` (approximate randomisation).
    """
    seed = os.environ.get("SACREBLEU_SEED", "none")
    if seed.lower() != "none" and not seed.isdecimal():
        raise FastdissError(f"SACREBLEU_SEED is {seed!r}, not a number: correct it, or unset it")
    from sacrebleu.significance import PairedTest  # numpy is slow to import

    named = [(str(number), hypotheses) for number, hypotheses in enumerate(systems)]
    signatures, scores = PairedTest(named, metrics, streams, test_type=test)()
    for baseline, *others in (scores[name] for name in signatures):
        for result in others:
            if result.score == baseline.score:
                # sacreBLEU would report a significant difference
                result.p_value = 1.0
    return [Tested(name, str(signature), scores[name]) for name, signature in signatures.items()]
