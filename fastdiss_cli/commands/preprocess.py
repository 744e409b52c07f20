"""fastdiss preprocess: text -> binarized dataset."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack
from glob import escape
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiss_cli import logs
from fastdiss_cli.commands.options import choice
from fastdiss_cli.data.sentencepiece import MODEL_TYPES, train_tokenizer
from fastdiss_cli.data.text import FORMATS, ParallelText
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.data.tokenizer_file import load_tokenizer
from fastdiss_cli.errors import FastdissError

if TYPE_CHECKING:
    import numpy as np

    from fastdiss_cli.data.dataset import SideInfo

TEXT = {"rich_help_panel": "Text"}
TOKENIZER = {"rich_help_panel": "Tokenizer"}
_DATASET_FILE = re.compile(
    r"manifest\.json|tokenizer\.(src|tgt)|(train|(valid|test)\d*)\.(src|tgt)\.(bin|idx)"
)


def preprocess(
    context: typer.Context,
    destdir: Annotated[Path, typer.Option(help="The folder to create.")] = Path("data-bin"),
    source_lang: Annotated[
        str, typer.Option("--source-lang", "-s", help="Extension or key of the sources.", **TEXT)
    ] = "src",
    target_lang: Annotated[
        str, typer.Option("--target-lang", "-t", help="Extension or key of the targets.", **TEXT)
    ] = "trg",
    trainpref: Annotated[
        str | None,
        typer.Option(help="Training text: PREF.src and PREF.trg, or one file.", **TEXT),
    ] = None,
    validpref: Annotated[
        str | None, typer.Option(help="Validation text; comma-separated if several.", **TEXT)
    ] = None,
    testpref: Annotated[
        str | None, typer.Option(help="Test text; comma-separated if several.", **TEXT)
    ] = None,
    format: Annotated[
        str,
        choice(FORMATS, "{}; text is parallel files. Each also as .gz.", TEXT),
    ] = "text",
    vocab_size: Annotated[
        int,
        typer.Option(
            min=1,
            max=10_000_000,
            help="Maximum vocabulary size of the trained tokenizer.",
            **TOKENIZER,
        ),
    ] = 8000,
    model_type: Annotated[str, choice(MODEL_TYPES, "{} (SentencePiece).", TOKENIZER)] = "unigram",
    joined: Annotated[
        bool,
        typer.Option("--joined/--separate", help="One tokenizer for both sides.", **TOKENIZER),
    ] = True,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[,TGT-FILE]",
            help="Use this SentencePiece model, or dict.LANG.txt of fairseq, instead of training.",
            **TOKENIZER,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte of the dataset afterwards.")
    ] = False,
) -> None:
    """Make a binarized dataset from text.

    Without text, --verify checks an existing dataset.
    """
    from fastdiss_cli.data.files import replace_folder
    from fastdiss_cli.data.opening import open_dataset

    def given(name: str) -> bool:
        return "DEFAULT" not in context.get_parameter_source(name).name

    def warn_of_idle(*names: str, because: str) -> None:
        for name in filter(given, names):
            flag = {"joined": "joined/--separate"}.get(name, name.replace("_", "-"))
            logs.warn(f"--{flag} has no effect: {because}")

    for flag, names in (
        ("--trainpref", trainpref),
        ("--validpref", validpref),
        ("--testpref", testpref),
        ("--tokenizer", tokenizer),
    ):
        if names is not None and not all(names.split(",")):
            raise typer.BadParameter(f"{flag} {names!r}: a name is empty")
    prefixes = _splits(trainpref, validpref, testpref)
    if format != "tsv" and source_lang == target_lang:
        what = "file" if format == "text" else "field"
        raise typer.BadParameter(f"-s and -t are both {source_lang}: they name the same {what}")
    if not prefixes and not verify:
        raise typer.BadParameter("give --trainpref, --validpref or --testpref (or --verify)")
    if not prefixes:
        making = "tokenizer", "vocab_size", "model_type", "joined", "format", "workers"
        warn_of_idle(*making, because="without text, --verify only checks a dataset")
    else:
        if trainpref is None and tokenizer is None:
            raise typer.BadParameter("without --trainpref a --tokenizer is needed")
        if tokenizer is not None and tokenizer.count(",") > 1:
            raise typer.BadParameter("--tokenizer takes one model, or two separated by a comma")
        if tokenizer:
            because = "--tokenizer is already trained"
            warn_of_idle("vocab_size", "model_type", "joined", because=because)
        try:
            texts = {
                split: ParallelText(prefix, source_lang, target_lang, format)
                for split, prefix in prefixes.items()
            }
        except FastdissError as error:
            if "," not in (trainpref or ""):
                raise
            raise typer.BadParameter(
                f"{error}; --trainpref takes one name, the others several"
            ) from None
        _check_destination(destdir, prefixes)
        counts = {split: text.count() for split, text in texts.items()}
        made_with: dict[str, object] = {"prefixes": prefixes, "format": format}
        if tokenizer is not None:
            made_with["tokenizer"] = tokenizer
        else:
            made_with |= {"model_type": model_type, "vocab_size": vocab_size}
        if destdir.exists() and any(destdir.iterdir()):
            logs.warn(f"{destdir} already exists, and will be replaced")
        final = destdir.resolve()  # so that a link stays one, and "." has a name
        _warn_of_leftovers(final)
        temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
        try:
            temporary.mkdir(parents=True)  # fails if a run on another host has the same pid
            try:
                tokenizers = _tokenizers(texts, counts, tokenizer, joined, model_type, vocab_size)
                _write(
                    temporary,
                    texts,
                    counts,
                    tokenizers,
                    languages=(source_lang, target_lang),
                    made_with=made_with,
                    workers=workers,
                )
                replace_folder(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise FastdissError(f"{destdir}: cannot write the dataset: {error.strerror}") from None
        except BrokenExecutor:
            raise FastdissError(
                "a worker process was killed, probably out of memory: use fewer --workers"
            ) from None
        logs.info(f"wrote {destdir}")
    if verify:
        languages = [
            language if given(name) else None
            for name, language in (("source_lang", source_lang), ("target_lang", target_lang))
        ]
        dataset = open_dataset(destdir, *languages, verify=True)
        pairs = sum(len(sides["src"]) for sides in dataset.splits.values())
        logs.info(f"{destdir}: {logs.counted(pairs, 'sentence pair')} intact")


def _splits(train: str | None, valid: str | None, test: str | None) -> dict[str, str]:
    """Name the splits as fairseq does: test, test1, test2 for three test prefixes."""
    splits = {"train": train} if train else {}
    for name, prefixes in (("valid", valid), ("test", test)):
        for i, prefix in enumerate(prefixes.split(",") if prefixes else []):
            splits[f"{name}{i or ''}"] = prefix
    return splits


def _check_destination(destdir: Path, prefixes: Collection[str]) -> None:
    """Refuse to replace anything but a dataset, or splits that are not made again."""
    if destdir.exists() and not destdir.is_dir():
        raise FastdissError(f"--destdir {destdir} is a file")
    names = sorted(path.name for path in destdir.iterdir()) if destdir.exists() else []
    is_dataset = "manifest.json" in names
    foreign = [name for name in names if not (is_dataset and _DATASET_FILE.fullmatch(name))]
    if foreign:
        raise FastdissError(
            f"--destdir {destdir} holds other files ({foreign[0]}); "
            "give a new folder or empty it first"
        )
    splits = {name.split(".")[0] for name in names if name.endswith(".bin")}
    if lost := sorted(splits - set(prefixes)):
        raise FastdissError(
            f"--destdir {destdir} holds a dataset whose {' and '.join(lost)} would be lost: give "
            "the text of all splits again, or a new folder"
        )


def _warn_of_leftovers(final: Path) -> None:
    """Warn of the leftovers of killed runs, which may also belong to one that is running."""
    for pattern in (f".{escape(final.name)}.tmp-*", f"{escape(final.name)}.old-*"):
        for path in final.parent.glob(pattern):
            logs.warn(f"found {path}: remove it, unless another preprocess is running")


def _tokenizers(
    texts: dict[str, ParallelText],
    counts: dict[str, int],
    given: str | None,
    joined: bool,
    model_type: str,
    vocab_size: int,
) -> tuple[Tokenizer, Tokenizer]:
    """Load or train the tokenizers of source and target; a joined one serves as both."""
    if given is not None:
        paths = [Path(name) for name in given.split(",")]
        return load_tokenizer(paths[0]), load_tokenizer(paths[-1])
    text, pairs = texts["train"], counts["train"]
    logs.info(f"training {'one' if joined else 'a source and a target'} {model_type} tokenizer ...")
    if joined:
        both = chain.from_iterable(text.pairs())
        tokenizer = train_tokenizer(both, model_type, vocab_size, 2 * pairs)
        return tokenizer, tokenizer
    src, tgt = (
        train_tokenizer(map(itemgetter(side), text.pairs()), model_type, vocab_size, pairs)
        for side in (0, 1)
    )
    return src, tgt


def _write(
    folder: Path,
    texts: dict[str, ParallelText],
    counts: dict[str, int],
    tokenizers: tuple[Tokenizer, Tokenizer],
    *,
    languages: tuple[str, str],
    made_with: dict[str, object],
    workers: int,
) -> None:
    """Write a dataset into a folder: tokenizers, sentences, and their manifest."""
    from fastdiss_cli.data.binarized import Manifest
    from fastdiss_cli.data.dataset import token_dtype

    src, tgt = tokenizers
    sizes = dict.fromkeys(f"{tokenizer.vocab_size:,}" for tokenizer in tokenizers)
    logs.info(f"vocabulary: {' and '.join(sizes)} ids")
    for side, tokenizer in (("src", src), ("tgt", tgt)):
        (folder / f"tokenizer.{side}").write_bytes(tokenizer.model)
    dtype = token_dtype(max(src.vocab_size, tgt.vocab_size))
    splits = {
        split: _binarize(split, text, counts[split], tokenizers, dtype, folder, workers)
        for split, text in texts.items()
    }
    source, target = languages
    Manifest(
        source=source,
        target=target,
        joined=src.hash == tgt.hash,
        dtype=dtype.name,
        tokenizers={"src": src.hash, "tgt": tgt.hash},
        vocab_sizes={"src": src.vocab_size, "tgt": tgt.vocab_size},
        sentences=counts,
        splits=splits,
        made_with=made_with,
    ).write(folder)


def _binarize(
    split: str,
    text: ParallelText,
    pairs: int,
    tokenizers: tuple[Tokenizer, Tokenizer],
    dtype: np.dtype,
    folder: Path,
    workers: int,
) -> dict[str, SideInfo]:
    """Encode a split of ``pairs`` pairs into a folder; return the facts of each side."""
    from fastdiss_cli.data.dataset import TokenWriter
    from fastdiss_cli.data.encoding import CHUNK, available_cores, encode_blocks

    src, tgt = tokenizers
    sentences = empty = first_empty = broken = 0
    with ExitStack() as stack:
        stems = [folder / f"{split}.{side}" for side in ("src", "tgt")]
        writers = [stack.enter_context(TokenWriter(stem, dtype)) for stem in stems]
        bar = stack.enter_context(logs.progress(split, pairs))
        workers = workers or available_cores()
        for block in encode_blocks(text.blocks(CHUNK), (src.model, tgt.model), dtype, workers):
            for side, writer in enumerate(writers):
                counts = block.unknown[side], block.altered[side]
                writer.add(block.sizes[side], block.tokens[side], *counts)
            sentences += len(block.sizes[0])
            empty += len(block.empty)
            first_empty = first_empty or min(block.empty, default=0)
            broken += block.broken
            bar.advance(len(block.sizes[0]))
        infos = [writer.finish() for writer in writers]
    if sentences != pairs:
        raise FastdissError(f"{text.paths[0]} changed during the run: run preprocess again")
    _report(split, pairs, infos, src.lossless and tgt.lossless)
    if broken:
        broken_pairs = logs.counted(broken, "pair")
        logs.warn(f"{split}: {broken_pairs} with a line break in a field: replaced by a blank")
    if empty:
        first = f"the first in line {first_empty} of {' and '.join(map(str, text.paths))}"
        logs.warn(f"{split}: {logs.counted(empty, 'pair')} with an empty side ({first}): kept")
    return dict(zip(("src", "tgt"), infos, strict=True))


def _report(split: str, sentences: int, infos: Iterable[SideInfo], lossless: bool) -> None:
    src, tgt = infos
    logs.info(
        f"{split}: {logs.counted(sentences, 'pair')}, "
        f"{src.tokens:,} source and {tgt.tokens:,} target tokens "
        f"(longest {src.longest:,} and {tgt.longest:,}; "
        f"unknown {src.unknown:,} and {tgt.unknown:,})"
    )
    if src.altered or tgt.altered:
        blank = "U+2581, SentencePiece's blank, is in them and becomes a real blank"
        changed = "the tokenizer does not know, or changes, part of them"
        logs.warn(
            f"{split}: decoding changes {logs.counted(src.altered, 'source')} and "
            f"{logs.counted(tgt.altered, 'target')}: {blank if lossless else changed}"
        )
