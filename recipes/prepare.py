"""Make the text of a recipe from its official archives or from a local copy of them.

    python recipes/prepare.py CORPUS TEXT [--from FOLDER] [--cut]

Writes TEXT/{train,valid,test}.{source,target}, and TEXT/prepared.json: the sha256 of what was read
and written. What is there and right is kept; what is damaged or unfinished is made again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from corpora import CORPORA, Corpus, Part, lines
from originals import Originals, digest
from readers import Row

from fastdiss_cli import logs
from fastdiss_cli.errors import FastdissError

SPLITS = ("train", "valid", "test")
RECORD = "prepared.json"
_WORD = re.compile(r"\w+|[^\w\s]")  # close to what the usual tokenizers count


def prepare(name: str, text: Path, local: Path | None, cut: bool) -> None:
    """Make the text of a corpus, unless it is there.

    Args:
        name: of the corpus in `CORPORA`.
        text: the folder to write.
        local: the folder with a copy of the originals; None: download them.
        cut: the copy is a part of the corpus: its numbers of pairs are not verified.

    Raises:
        FastdissError: what was read is not what it should be.
    """
    record = _read_record(name, text)
    if record and record["cut"] and not cut:
        raise FastdissError(
            f"{text} was made of a part of {name}: give --cut again, or another folder"
        )
    if record and all(_is_right(text / file, facts) for file, facts in record["text"].items()):
        logs.info(f"{text} is complete: {_counts(record)}")
        return
    unfinished = text / "unfinished"
    if not record and not unfinished.exists() and text.exists():
        for path in sorted(text.iterdir()):
            if path.name != "originals":
                raise FastdissError(f"{path} was not made here: give a new or an empty folder")
    shutil.rmtree(unfinished, ignore_errors=True)
    members, written = unfinished / "members", unfinished / "text"
    for folder in (members, written):
        folder.mkdir(parents=True)
    known = record["originals"] if record else {}
    originals = Originals(local, text / "originals", members, known)
    try:
        _write_splits(CORPORA[name], originals, written, cut)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    made = {path.name: _facts(path) for path in sorted(written.iterdir())}
    without = [split for split in SPLITS if not any(file.split(".")[0] == split for file in made)]
    if without:
        shutil.rmtree(unfinished)
        raise FastdissError(f"{local} gives no pairs for {' and '.join(without)}: it is too small")
    for file in made:
        os.replace(written / file, text / file)
    record = {"corpus": name, "cut": cut, "originals": originals.sha256, "text": made}
    whole = unfinished / RECORD
    whole.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(whole, text / RECORD)
    shutil.rmtree(unfinished)
    logs.info(f"wrote {text}: {_counts(record)}")


def _write_splits(corpus: Corpus, originals: Originals, folder: Path, cut: bool) -> None:
    """Write the files of all splits into a folder."""
    parts = {split: _parts(corpus, split, originals) for split in corpus.splits}
    halve = "test" not in parts
    if cut and originals.local and not (halve or originals.have(parts["test"])):
        logs.warn("the copy has no test set: the second half of valid takes its place")
        del parts["test"]
        halve = True
    with Text(folder, (*corpus.sides, "refs.tsv"), corpus.lowercase) as text:
        for number, row in enumerate(_clean(corpus, _rows(parts["train"], originals, cut)), 1):
            held_out = corpus.every and number % corpus.every == 0
            text.add("valid" if held_out else "train", row)
        if "valid" in parts:
            rows = list(_rows(parts["valid"], originals, cut))
            first = (len(rows) + 1) // 2 if halve else len(rows)
            for number, row in enumerate(rows):
                text.add("valid" if number < first else "test", row)
        for row in _rows(parts.get("test", ()), originals, cut):
            text.add("test", row)


def _parts(corpus: Corpus, split: str, originals: Originals) -> tuple[Part, ...]:
    """Return the parts of a split; in a local copy they may be one of plain text."""
    published = corpus.splits[split]
    plain = Part(corpus.plain.get(split, ()), lines, sum(part.pairs for part in published))
    return (plain,) if plain.files and originals.have((plain,)) else published


def _rows(parts: tuple[Part, ...], originals: Originals, cut: bool) -> Iterator[Row]:
    """Yield what is published, and verify how many pairs there are."""
    for part in parts:
        count = 0
        for row in part.rows(*originals.files(part)):
            count += 1
            yield row
        if count != part.pairs and (not count or (part.pairs and not cut)):
            raise FastdissError(
                f"{part.files[0]} has {count:,} pairs, and should have {part.pairs:,}: the copy is "
                "not whole (--cut takes it as it is)"
            )


def _clean(corpus: Corpus, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the pairs that are of fit length, and say how many were not."""
    if not corpus.longest:
        yield from rows
        return
    total = kept = 0
    for row in rows:
        total += 1
        shorter, longer = sorted(len(_WORD.findall(side)) for side in row[:2])
        if shorter and longer <= corpus.longest and longer <= corpus.ratio * shorter:
            kept += 1
            yield row
    logs.info(
        f"train: left out {total - kept:,} of {total:,} pairs (a side without words, of more than "
        f"{corpus.longest}, or of more than {corpus.ratio} times those of the other side)"
    )


class Text:
    """The files of all splits while they are written: a file for each column.

    Args:
        folder: where.
        columns: endings of the files; a split whose rows are shorter has fewer files.
        lowercase: write everything in lower case.
    """

    def __init__(self, folder: Path, columns: tuple[str, ...], lowercase: bool) -> None:
        self.folder, self.columns, self.lowercase = folder, columns, lowercase
        self._files: dict[str, IO[str]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Text:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, split: str, row: Row) -> None:
        for column, side in zip(self.columns, row, strict=False):
            name = f"{split}.{column}"
            if name not in self._files:
                self._files[name] = self._open.enter_context(
                    open(self.folder / name, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
                )
            self._files[name].write((side.lower() if self.lowercase else side) + "\n")


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        count = sum(1 for _ in file)
    return {"lines": count, "bytes": path.stat().st_size, "sha256": digest(path, "sha256")}


def _is_right(path: Path, facts: dict[str, Any]) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == facts["bytes"]
        and digest(path, "sha256") == facts["sha256"]
    )


def _read_record(name: str, text: Path) -> dict[str, Any] | None:
    path = text / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        corpus, _, _ = record["corpus"], record["originals"].items(), record["text"].items()
        record["cut"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FastdissError(f"{path} is damaged: remove {text}, then run this again") from None
    if corpus != name:
        raise FastdissError(f"{text} holds {corpus}: give another folder for {name}")
    return record


def _counts(record: dict[str, Any]) -> str:
    counts = {}
    for file, facts in record["text"].items():
        counts[file.split(".")[0]] = facts["lines"]
    return ", ".join(f"{split} {counts[split]:,}" for split in SPLITS) + " pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("corpus", choices=sorted(CORPORA))
    parser.add_argument("text", type=Path, help="the folder to write")
    parser.add_argument(
        "--from", dest="local", type=Path, help="a folder with the archives or their files"
    )
    parser.add_argument(
        "--cut", action="store_true", help="the copy is a part of the corpus: do not verify counts"
    )
    given = parser.parse_args()
    if given.cut and given.local is None:
        parser.error("--cut needs --from: what is downloaded is whole")
    try:
        if given.local is not None and not given.local.is_dir():
            raise FastdissError(f"--from {given.local}: no such folder")
        prepare(given.corpus, given.text, given.local, given.cut)
    except FastdissError as error:
        logs.error(str(error))
        sys.exit(1)
    except OSError as error:
        logs.error(f"{error.filename or given.text}: {error.strerror or error}")
        sys.exit(1)
    except KeyboardInterrupt:
        logs.error("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
