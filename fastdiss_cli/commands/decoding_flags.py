"""Turn the flags of `generate` into decoding options and a selection, or into a usage error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastdiss_cli import logs
from fastdiss_cli.errors import OptionError

if TYPE_CHECKING:
    from fastdiss_cli.checkpoints.loading import Loaded
    from fastdiss_cli.decoding.selection import Select
    from fastdiss_cli.models.registry import Seq2SeqModel

# the decoding options that have a flag, besides `steps`, whose flag takes several counts
FLAGS = (
    "solver", "temperature", "time_grid", "clamp", "self_cond", "length_beam", "noise_beam",
    "early_exit", "seed", "beam", "lenpen", "max_len_a", "max_len_b", "min_len", "history",
    "diagnose",
)  # fmt: skip
SELECTION = ("select", "mbr_metric", "mbr_weights")


def check_usage(given: dict[str, Any]) -> None:
    """Refuse flags that contradict each other, before anything is loaded.

    Args:
        given: the flags that are set, by name, including defaults.

    Raises:
        BadParameter: flags contradict each other.
    """
    raw, diagnosed = "input" in given, "diagnose" in given
    languages = "source_lang" in given or "target_lang" in given
    uses_references = given.get("self_cond") == "gold"
    reranked = "rerank_path" in given
    for wrong, reason in (
        (not raw and "data" not in given, "give either a dataset folder or --input"),
        (raw and "data" in given, "--input needs no dataset: the checkpoint has its tokenizers"),
        ({"plain", "history"} <= given.keys(), "--plain cannot show --print-history"),
        ("plain" in given and given["nbest"] > 1, "--plain writes one answer per line: no --nbest"),
        (raw and languages, "--source-lang and --target-lang apply to a dataset, not to --input"),
        (raw and "gen_subset" in given, "--gen-subset applies to a dataset, not to --input"),
        (raw and uses_references, "--self-cond gold needs a dataset: it uses the references"),
        (raw and diagnosed, "--diagnose needs a dataset: it measures losses on the references"),
        (
            diagnosed and "early_exit" in given,
            "--diagnose compares whole runs: leave out --early-exit",
        ),
        (
            diagnosed and given["buffer_size"] > 0,
            "--diagnose covers all sentences at once: leave out --buffer-size",
        ),
    ):
        if wrong:
            raise typer.BadParameter(reason)
    from fastdiss_cli.decoding.selection import check_selection

    try:
        check_selection(*map(given.get, SELECTION), reranked)
    except OptionError as error:
        raise _wrong_usage(error) from None


def step_options(steps: str | None) -> list[dict[str, int]]:
    """Return one ``steps`` option per count in ``--steps``; None: the model's default.

    Raises:
        BadParameter: they are not distinct whole numbers of at least 1.
    """
    if steps is None:
        return [{}]
    words = [word.strip() for word in steps.split(",")]
    if not all(word.isdecimal() and len(word) < 10 and int(word) >= 1 for word in words):
        raise typer.BadParameter(f"--steps {steps}: give whole numbers of at least 1, as in 1,2,5")
    counts = list(map(int, words))
    if len(set(counts)) < len(counts):
        raise typer.BadParameter(f"--steps {steps}: a step count is given twice")
    return [{"steps": count} for count in counts]


def decoding_options(model: Seq2SeqModel, arch: str, given: dict[str, Any]) -> Any:
    """Return a model's ``Decoding`` from flags; options without a flag keep their defaults.

    Args:
        model: the model.
        arch: the name of its architecture, for the message.
        given: the values of the flags, by the name of the option.

    Raises:
        BadParameter: the model has no such option, or not with this value.
    """
    known = model.decoding_options()
    for key in given:
        if key not in known:
            flags = ", ".join(_flag(name) for name in known if name in ("steps", *FLAGS))
            raise typer.BadParameter(f"{_flag(key)} does not apply to {arch}, which has {flags}")
    try:
        options = model.Decoding(**given)
        model.check_decoding(options)
        return options
    except OptionError as error:
        raise _wrong_usage(error) from None


def selection(
    given: dict[str, Any], loaded: Loaded, candidates: int, load: Callable[[Path], Loaded]
) -> tuple[Select, dict[str, str]]:
    """Return the function that chooses among the candidates, and its options in the summary.

    Args:
        given: the flags.
        loaded: the model that makes the candidates.
        candidates: the number of candidates per sentence.
        load: loads the reranker.

    Raises:
        BadParameter: the flags do not fit this model.
        FastdissError: the reranker does not fit this model.
    """
    from fastdiss_cli.decoding.selection import MBR_METRIC, MBR_WEIGHT, selector, with_runners_up

    reranker = load(given["rerank_path"]) if "rerank_path" in given else None
    try:
        method, choose = selector(loaded, *map(given.get, SELECTION), reranker)
    except OptionError as error:
        raise _wrong_usage(error) from None
    idle = [name for name in (*SELECTION, "rerank_path") if name in given]
    if candidates == 1 and idle:
        logs.warn(f"{_flag(idle[0])} has no effect: there is one candidate")
    one_length = given.get("length_beam", 1) == 1
    if candidates > 1 and one_length and "mbr_weights" in given:
        logs.warn("--mbr-weights has no effect without --length-beam: all candidates count alike")
    if given["nbest"] > 1:
        choose = with_runners_up(choose, given["nbest"] - 1)
    shown = {"select": method} if candidates > 1 else {}
    if shown and method == "mbr":
        shown["mbr_metric"] = given.get("mbr_metric", MBR_METRIC)
        if not one_length:
            shown["mbr_weights"] = given.get("mbr_weights", MBR_WEIGHT)
    return choose, shown


def warn_of_self_cond(self_cond: str | None, model: Seq2SeqModel) -> None:
    """Warn if --self-cond has no effect, or reveals the references to the model."""
    unconditioned = not getattr(model, "self_conditioned", True)
    if self_cond == "recompute" and unconditioned:
        logs.warn(
            "--self-cond recompute has no effect: the model was trained without self-conditioning"
        )
    elif self_cond == "gold":
        revealed = "the lengths of the references" if unconditioned else "the references"
        logs.warn(f"--self-cond gold gives the model {revealed}: for diagnosis only")


def _wrong_usage(error: OptionError) -> typer.BadParameter:
    return typer.BadParameter(f"{_flag(error.option)} {error.reason}")


def _flag(option: str) -> str:
    return "--" + {"history": "print-history"}.get(option, option.replace("_", "-"))
