"""Small samples of the recipes' corpora, in the formats that the corpora are published in."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from conftest import ENGLISH, GERMAN

TRAIN, HELD_OUT = 48, 6  # pairs


def pairs(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Return three-digit numbers in words, in German and English."""
    numbers = [f"{n * 7 % 1000:03}" for n in range(start, start + count)]
    languages = (GERMAN, ENGLISH)
    return [tuple(" ".join(words[int(d)] for d in n) for words in languages) for n in numbers]


def column(side: int, count: int, start: int = 0) -> list[str]:
    return [pair[side] for pair in pairs(count, start)]


def text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def sgml(lines: list[str]) -> str:
    segments = [f'<seg id="{i}">{line}</seg>' for i, line in enumerate(lines, 1)]
    return text(['<refset setid="x" srclang="any">', "<doc>", "<p>", *segments, "</p>", "</doc>"])


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(content)


def tgz(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            tar.addfile(info, io.BytesIO(content.encode()))


def iwslt14(folder: Path) -> None:
    files = {}
    for side, language in enumerate(("de", "en")):
        talk = [
            "<url>http://www.ted.com/talks/x</url>",
            f"<keywords>{language}, many, words</keywords>",
            "<talkid>1</talkid>",
            f"<title>Anna B{chr(0x2019)}s Title in {language}</title>",
            f"<description>What it is about {language}</description>",
            *(f" {line.capitalize()} . " for line in column(side, TRAIN)),
        ]
        files[f"de-en/train.tags.de-en.{language}"] = text(talk)
        for i, name in enumerate(
            ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
        ):
            segments = [f" {line} &amp; so " for line in column(side, 2, 500 + 2 * i)]
            files[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = sgml(segments)
    tgz(folder / "de-en.tgz", files)


def wmt14(folder: Path) -> None:
    third = TRAIN // 3
    for i, (archive, prefix) in enumerate(
        [
            ("training-parallel-europarl-v7.tgz", "training/europarl-v7.de-en"),
            ("training-parallel-commoncrawl.tgz", "commoncrawl.de-en"),
            ("training-parallel-nc-v9.tgz", "training/news-commentary-v9.de-en"),
        ]
    ):
        tgz(
            folder / archive,
            {f"{prefix}.{x}": text(column(s, third, third * i)) for s, x in enumerate(("de", "en"))}
            | {f"{prefix.replace('de-en', 'fr-en')}.fr": "un\n"},
        )
    for side, language in enumerate(("de", "en")):
        kind = "ref" if language == "en" else "src"
        files = {
            f"newstest2013-src.{language}.sgm": sgml(column(side, HELD_OUT, 300)),
            f"newstest2014-deen-{kind}.{language}.sgm": sgml(column(side, HELD_OUT, 400)),
        }
        write(folder / "test", files)


def wmt16(folder: Path) -> None:
    half = TRAIN // 2
    languages = list(enumerate(("ro", "en")))
    tgz(
        folder / "training-parallel-ep-v8.tgz",
        {f"training-parallel-ep-v8/europarl-v8.ro-en.{x}": text(column(s, half))
         for s, x in languages},
    )  # fmt: skip
    with zipfile.ZipFile(folder / "en-ro.txt.zip", "w") as zipped:
        for side, language in languages:
            zipped.writestr(f"SETIMES.en-ro.{language}", text(column(side, half, half)))
    for side, language in languages:
        kind = "ref" if language == "en" else "src"
        for name, start in (("newsdev2016", 300), ("newstest2016", 400)):
            files = {f"{name}-roen-{kind}.{language}.sgm": sgml(column(side, HELD_OUT, start))}
            write(folder, files)


def diffuseq(folder: Path) -> None:
    for name, count, start in (("train", TRAIN, 0), ("valid", 6, 300), ("test", 6, 400)):
        rows = [json.dumps({"src": s, "trg": t}) for s, t in pairs(count, start)]
        write(folder, {f"{name}.jsonl": text(rows)})


def gigaword(folder: Path) -> None:
    for side, kind in enumerate(("article", "title")):
        name = ("input", "task1_ref0")[side]
        write(
            folder / "sumdata",
            {
                f"train/train.{kind}.txt.gz": text(column(side, TRAIN)),
                f"train/valid.{kind}.filter.txt": text(column(side, HELD_OUT, 300)),
                f"Giga/{name}.txt": text(column(side, HELD_OUT, 400)),
                f"DUC2003/{name}.txt": text(column(side, 10, 500)),  # of the same name
            },
        )


def multi30k(folder: Path) -> None:
    for side, language in enumerate(("de", "en")):
        for name, count, start in (
            ("train", TRAIN, 0), ("val", HELD_OUT, 300), ("test_2016_flickr", HELD_OUT, 400),
        ):  # fmt: skip
            write(folder, {f"{name}.{language}.gz": text(column(side, count, start))})


def sigmorphon(folder: Path) -> None:
    for name, count, start in (
        ("german-train-high", TRAIN, 0), ("german-dev", 6, 300), ("german-uncovered-test", 6, 400),
    ):  # fmt: skip
        rows = [f"{lemma}\t{form}\tV;IND;PST;1;SG" for lemma, form in pairs(count, start)]
        write(folder, {name: text(rows)})


def tatoeba(folder: Path) -> None:
    for side, language in enumerate(("de", "en")):
        write(folder, {f"train.{language}": text(column(side, TRAIN))})
        write(folder, {f"valid.{language}": text(column(side, 2 * HELD_OUT, 300))})
    several = [f"{english}\tor {english}" for english in column(1, 2 * HELD_OUT, 300)]
    write(folder, {"valid.refs_en.tsv": text(several)})


def cmudict(folder: Path) -> None:
    for side, name in enumerate(("src", "trg")):
        write(folder, {f"train.{name}": text(column(side, TRAIN))})
        write(folder, {f"valid.{name}": text(column(side, 2 * HELD_OUT, 300))})
    write(folder, {"valid.refs.tsv": text(column(1, 2 * HELD_OUT, 300))})


ORIGINALS: dict[str, Callable[[Path], None]] = {
    "iwslt14_de_en": iwslt14, "wmt14_en_de": wmt14, "wmt16_en_ro": wmt16, "qqp": diffuseq,
    "wiki_auto": diffuseq, "gigaword": gigaword, "multi30k_de_en": multi30k,
    "sigmorphon17_german": sigmorphon, "tatoeba_deen": tatoeba, "cmudict_g2p": cmudict,
}  # fmt: skip


def originals_of(name: str, folder: Path) -> Path:
    """Write a small sample of a corpus in its published format."""
    folder.mkdir()
    ORIGINALS[name](folder)
    return folder
