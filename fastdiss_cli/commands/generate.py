"""fastdiss generate: checkpoint + dataset or raw text -> hypotheses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiss_cli import logs
from fastdiss_cli.commands.decoding_flags import (
    FLAGS,
    check_usage,
    decoding_options,
    selection,
    step_options,
    warn_of_self_cond,
)
from fastdiss_cli.commands.options import Device, SourceLang, TargetLang, UserModule, choice
from fastdiss_cli.config import DTYPES
from fastdiss_cli.errors import FastdissError

if TYPE_CHECKING:
    from fastdiss_cli.checkpoints.loading import Loaded
    from fastdiss_cli.decoding.generation import Run, SequenceGenerator
    from fastdiss_cli.decoding.report import Summary
    from fastdiss_cli.decoding.translation import Input, Output

INPUT = {"rich_help_panel": "Input and output"}
SAMPLING = {"rich_help_panel": "Sampling (diffusion models)"}
BEAM = {"rich_help_panel": "Beam search (autoregressive models)"}
SELECTION = {"rich_help_panel": "Choosing among candidates"}
MACHINE = {"rich_help_panel": "Machine"}
WAIT_FOR_INPUT = timedelta(days=365)


def generate(
    data: Annotated[
        Path | None,
        typer.Argument(help="The folder that `fastdiss preprocess` wrote, or fairseq's data-bin."),
    ] = None,
    path: Annotated[
        Path,
        typer.Option(metavar="CHECKPOINT", help="As written by `fastdiss train`; or its folder."),
    ] = Path("checkpoints"),
    gen_subset: Annotated[
        str | None, typer.Option(help="The split to generate. (default: test)", **INPUT)
    ] = None,
    source_lang: SourceLang = None,
    target_lang: TargetLang = None,
    input: Annotated[
        str | None,
        typer.Option(metavar="FILE|-", help="Raw text instead of a dataset; - is stdin.", **INPUT),
    ] = None,
    buffer_size: Annotated[
        int,
        typer.Option(
            min=0,
            max=10**9,
            help="Sentences decoded together, at most; 0: 4096, of stdin those that wait.",
            **INPUT,
        ),
    ] = 0,
    ref: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="References for BLEU instead of the dataset's; .tsv has alternatives. Repeatable.",
            **INPUT,
        ),
    ] = None,
    results_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write files there, not to stdout. (default for several step counts or "
            "--diagnose: generate/ beside the checkpoint)",
            **INPUT,
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Write only the text of the hypotheses, one line per input line.",
            **INPUT,
        ),
    ] = False,
    history: Annotated[
        bool, typer.Option("--print-history", help="Show every step of sampling.", **INPUT)
    ] = False,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="Compare stale and fresh self-conditioning by step, and measure losses by time.",
            **INPUT,
        ),
    ] = False,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Denoising steps; each is one NFE. (default: 5)",
            **SAMPLING,
        ),
    ] = None,
    solver: Annotated[
        str | None,
        choice(("ddpm", "ddim", "dpm-solver++"), "{}. (default: ddpm)", SAMPLING, checked=False),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Scale of the noise that ddpm adds in a step, 0 to 1. (default: 0.25)", **SAMPLING
        ),
    ] = None,
    time_grid: Annotated[
        str | None,
        choice(("uniform", "quadratic", "log-snr"), "{}. (default: log-snr)", SAMPLING),
    ] = None,
    clamp: Annotated[
        str | None,
        choice(
            ("raw", "nearest", "expected"),
            "What the solver uses as z_0: {} embedding. (default: expected)",
            SAMPLING,
        ),
    ] = None,
    self_cond: Annotated[
        str | None,
        choice(
            ("reuse", "none", "recompute", "gold"),
            "{}; recompute takes 2 NFE a step. (default: reuse)",
            SAMPLING,
        ),
    ] = None,
    length_beam: Annotated[
        int | None, typer.Option(help="Target lengths tried. (default: 1)", **SAMPLING)
    ] = None,
    noise_beam: Annotated[
        int | None,
        typer.Option(help="Noise draws for each length. (default: 1)", **SAMPLING),
    ] = None,
    early_exit: Annotated[
        bool,
        typer.Option(
            "--early-exit",
            help="Stop a sentence when two steps give the same tokens, each more likely than not; "
            "NFE is then a mean.",
            **SAMPLING,
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the noise. (default: 1)", **SAMPLING),
    ] = None,
    beam: Annotated[int | None, typer.Option(help="1: greedy search. (default: 5)", **BEAM)] = None,
    lenpen: Annotated[
        float | None, typer.Option(help="Length penalty. (default: 1)", **BEAM)
    ] = None,
    max_len_a: Annotated[
        float | None,
        typer.Option(help="Longest answer: a x source + b. (default: 0)", **BEAM),
    ] = None,
    max_len_b: Annotated[
        int | None, typer.Option(help="See --max-len-a. (default: 200)", **BEAM)
    ] = None,
    min_len: Annotated[
        int | None, typer.Option(help="Shortest answer, in tokens. (default: 1)", **BEAM)
    ] = None,
    select: Annotated[
        str | None,
        choice(
            ("score", "mbr", "rerank"),
            "{}. (default: mbr; score after beam search; rerank with --rerank-path)",
            SELECTION,
        ),
    ] = None,
    mbr_metric: Annotated[
        str | None, choice(("bleu", "chrf"), "{}. (default: bleu)", SELECTION)
    ] = None,
    mbr_weights: Annotated[
        str | None,
        choice(
            ("length", "equal"),
            "{}: candidates count by the probability of their length, or alike. (default: length)",
            SELECTION,
        ),
    ] = None,
    rerank_path: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="The transformer that reranks.", **SELECTION),
    ] = None,
    nbest: Annotated[
        int,
        typer.Option(
            min=1,
            help="Candidates written, the chosen one first, then by score.",
            **SELECTION,
        ),
    ] = 1,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Padded source tokens per batch, counting all candidates. "
            "(default: 8000; on a CPU 2000)",
            **MACHINE,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, choice(DTYPES, "{} (autocast).", MACHINE)] = "auto",
    user_module: UserModule = None,
) -> None:
    """Translate a split of a dataset, or raw text.

    With several step counts: one file each, and a table of quality and speed by step count.
    """
    given = {k: v for k, v in locals().items() if v is not None and v is not False}
    step_counts = step_options(steps)
    check_usage(given)

    import torch

    from fastdiss_cli.checkpoints.folder import best_of
    from fastdiss_cli.checkpoints.loading import load_model
    from fastdiss_cli.decoding.generation import Run, SequenceGenerator, default_max_tokens
    from fastdiss_cli.decoding.output import confidence_legend
    from fastdiss_cli.decoding.report import Summary
    from fastdiss_cli.decoding.systems import read_all_references
    from fastdiss_cli.decoding.translation import keep_all, open_outputs, translate
    from fastdiss_cli.device import dtype_name, keep_freed_memory, pick_device, pick_dtype
    from fastdiss_cli.distributed import Processes
    from fastdiss_cli.signals import Stop, stop_on_signal

    keep_freed_memory()
    path = best_of(path)
    # whoever writes to stdin may keep all ranks waiting
    patience = WAIT_FOR_INPUT if input == "-" else None
    processes, stop = Processes(pick_device(device), patience), Stop()
    if input not in (None, "-") and not Path(input).exists():
        raise FastdissError(f"--input {input}: no such file")
    if diagnose and processes.world_size > 1:
        raise typer.BadParameter("--diagnose needs a single process: run it without torchrun")
    torch_device, torch_dtype = processes.device, pick_dtype(dtype, processes.device)
    load = partial(load_model, device=torch_device, user_module=user_module, dtype=torch_dtype)
    loaded = load(path)
    model, arch = loaded.model, loaded.arch.name
    options = {name: given[name] for name in FLAGS if name in given}
    runs = [Run(decoding_options(model, arch, options | count)) for count in step_counts]
    most = runs[0].options.candidates
    if nbest > most:
        more = "--length-beam or --noise-beam" if hasattr(runs[0].options, "steps") else "--beam"
        raise typer.BadParameter(
            f"--nbest {nbest}: a sentence has {most} candidate{'s' * (most > 1)}; raise {more}"
        )
    choose, shown = selection(given, loaded, most, load)
    if torch_dtype != torch.float32:
        shown = {"dtype": dtype_name(torch_dtype), **shown}
    max_tokens = max_tokens or default_max_tokens(torch_device)
    generator = SequenceGenerator(model, choose, max_tokens, torch_dtype)
    corpus, name, what = _open_input(given, loaded)
    warn_of_self_cond(self_cond, model)
    given_references = read_all_references(ref, corpus.total) if ref else None
    folder = results_path
    if folder is None and (len(runs) > 1 or diagnose):
        folder = path.parent / "generate"
    if history and folder is None and logs.wants_colour():
        logs.info(confidence_legend())
    opened = open_outputs(runs, folder, name) if processes.rank == 0 else nullcontext([])
    with processes, opened as outputs:
        count = f"{logs.counted(corpus.total, 'sentence')} of " if corpus.total is not None else ""
        logs.info(
            f"{path} ({arch}): {count}{what} on {torch_device}, {dtype_name(torch_dtype)}"
            + (" (end with Ctrl-D)" if input == "-" and logs.stdin_is_terminal() else "")
        )
        with stop_on_signal(stop, "finishing this batch"):
            done = translate(
                generator,
                (loaded.src, loaded.tgt),
                corpus,
                runs,
                outputs,
                references=given_references,
                gold=self_cond == "gold",
                plain=plain,
                processes=processes,
                stop=stop,
            )
            if done.signal:
                kept = keep_all(outputs)
                where = f"in {kept}" if kept else "written"
                of = f" of {corpus.total:,}" if corpus.total else ""
                logs.info(
                    f"stopped by signal {done.signal}; sentences {where}: {done.sentences:,}{of}"
                )
            elif processes.rank == 0:
                if given_references and len(given_references) != done.sentences:
                    raise FastdissError(
                        f"--ref has {logs.counted(len(given_references), 'line')}, but the input "
                        f"has {logs.counted(done.sentences, 'sentence')}"
                    )
                scored = zip(runs, done.bleus, strict=True)
                summaries = [Summary(run, *bleu.result()) for run, bleu in scored]
                lines = [summary.line(name, arch, **shown) for summary in summaries]
                _conclude(outputs, summaries, lines, plain)
        signal = done.signal or (diagnose and stop.signal)
        if diagnose and not signal:  # a signal ends it: all that was decoded is in its files
            _diagnose(generator, runs, outputs, corpus)
    if signal:
        raise SystemExit(128 + signal)


def _open_input(given: dict[str, Any], loaded: Loaded) -> tuple[Input, str, str]:
    """Return the text to translate, its name in file names, and its name in the log.

    Args:
        given: the flags.
        loaded: the model that will translate it.
    """
    from fastdiss_cli.data.opening import open_dataset
    from fastdiss_cli.decoding.translation import (
        WINDOW,
        check_direction,
        dataset_input,
        text_input,
        warn_of_changed_references,
    )

    if "data" not in given:
        text = given["input"]
        corpus = text_input(text, loaded.src, given["buffer_size"])
        if text == "-":
            return corpus, "input", "standard input"
        return corpus, re.sub(r"[^\w.-]+", "_", Path(text).name)[:64], text
    dataset = open_dataset(given["data"], given.get("source_lang"), given.get("target_lang"))
    check_direction(loaded.languages, dataset)
    # a diagnosis covers all sentences at once
    window = 0 if "diagnose" in given else given["buffer_size"] or WINDOW
    split = given.get("gen_subset", "test")
    corpus = dataset_input(dataset, split, loaded.src, loaded.tgt, window)
    if "ref" not in given:
        warn_of_changed_references(dataset, split)
    return corpus, split, split


def _conclude(
    outputs: Sequence[Output], summaries: Sequence[Summary], lines: Sequence[str], plain: bool
) -> None:
    """Complete the files, and show the figures and where the files are.

    Args:
        outputs: one per run.
        summaries, lines: of each run; a line ends its file.
        plain: the files hold only hypotheses.
    """
    from fastdiss_cli.decoding.report import table

    for line, output in zip(lines, outputs, strict=True):
        if output.path:
            if not plain:
                output.write(line + "\n")
            output.finish()
    figures = lines[0] if len(lines) == 1 else table(summaries)
    on_stdout = outputs[0].path or not plain
    if on_stdout:
        print(figures, flush=True)
    if not (on_stdout and logs.stdout_is_seen()):
        logs.info(figures)
    for output in outputs:
        if output.path:
            logs.info(f"wrote {output.path}")


def _diagnose(
    generator: SequenceGenerator, runs: Sequence[Run], outputs: Sequence[Output], corpus: Input
) -> None:
    """Print the diagnosis of each run and write it beside the hypotheses."""
    from fastdiss_cli.decoding.diagnosis import describe_diagnosis, diagnoses

    tables_of_runs = diagnoses(runs, generator, corpus.split)
    for run, output, tables in zip(runs, outputs, tables_of_runs, strict=True):
        print(describe_diagnosis(run.options.steps, tables))
        beside = output.path.with_suffix(".diagnosis.json")
        beside.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
        logs.info(f"wrote {beside}")
