"""The corpora of the recipes: where they come from, what is in them, how they are cleaned.

A number of pairs is only here where it is known for certain; 0 means that it is not, and prepare.py
writes down what it finds. The same holds for checksums: those here are the ones that sacreBLEU
verifies its downloads with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from readers import (
    Rows,
    in_turn,
    inflections,
    json_rows,
    parallel,
    segments,
    talk_lines,
    talk_segments,
)

from fastdiss_cli.data.text import read_lines

lines = parallel(read_lines)


@dataclass(frozen=True)
class Part:
    """A piece of a split.

    Attributes:
        files: the names of its files; ``.gz`` may be left out or put behind.
        rows: their reader.
        pairs: how many sentence pairs it has; 0: not known.
        url: of the archive that holds the files, or, with a slash at its end, of the folder where
            they are. None: they can be had by hand only.
        md5: of the archive.
    """

    files: tuple[str, ...]
    rows: Rows
    pairs: int = 0
    url: str | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Corpus:
    """A benchmark.

    Attributes:
        sides: endings of the files that are written.
        splits: train, valid and test, each of parts that are joined. Without test the second half
            of valid becomes the test set.
        plain: how the splits may be called in a local copy that is plain text already.
        lowercase: published figures are on lower-cased text.
        longest, ratio: a training pair is left out if a side has no word, or more than ``longest``
            words, or ``ratio`` times those of the other side; 0: no pair is.
        every: each pair of this number in the cleaned training text is for validation; 0: none.
    """

    sides: tuple[str, str]
    splits: dict[str, tuple[Part, ...]]
    plain: dict[str, tuple[str, ...]] = field(default_factory=dict)
    lowercase: bool = False
    longest: int = 0
    ratio: float = 0
    every: int = 0


def _plain(source: str, target: str, test: str = "test") -> dict[str, tuple[str, ...]]:
    prefixes = {"train": "train", "valid": "valid", "test": test}
    return {split: (f"{p}.{source}", f"{p}.{target}") for split, p in prefixes.items()}


_IWSLT14 = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
_WMT13 = "http://www.statmt.org/wmt13/"
_WMT14 = "http://www.statmt.org/wmt14/"
_WMT16 = "http://data.statmt.org/wmt16/translation-task/"
_MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
_CONLL2017 = "https://raw.githubusercontent.com/sigmorphon/conll2017/master/"
_IWSLT14_TESTS = tuple(
    f"IWSLT14.{name}.de-en.{side}.xml"
    for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
    for side in ("de", "en")
)

CORPORA = {
    "iwslt14_de_en": Corpus(
        ("de", "en"),
        {
            "train": (
                Part(
                    ("train.tags.de-en.de", "train.tags.de-en.en"),
                    parallel(talk_lines), 174_443, _IWSLT14,
                ),
            ),
            "test": (Part(_IWSLT14_TESTS, in_turn(parallel(talk_segments)), 6_750, _IWSLT14),),
        },
        lowercase=True, longest=175, ratio=1.5, every=23,
    ),
    "wmt14_en_de": Corpus(
        ("en", "de"),
        {
            "train": (
                Part(
                    ("europarl-v7.de-en.en", "europarl-v7.de-en.de"), lines, 1_920_209,
                    f"{_WMT13}training-parallel-europarl-v7.tgz",
                ),
                Part(
                    ("commoncrawl.de-en.en", "commoncrawl.de-en.de"), lines, 2_399_123,
                    f"{_WMT13}training-parallel-commoncrawl.tgz",
                ),
                Part(
                    ("news-commentary-v9.de-en.en", "news-commentary-v9.de-en.de"), lines, 201_288,
                    f"{_WMT14}training-parallel-nc-v9.tgz",
                ),
            ),
            "valid": (
                Part(
                    ("newstest2013-src.en.sgm", "newstest2013-src.de.sgm"), parallel(segments),
                    3_000, f"{_WMT13}test.tgz", "48eca5d02f637af44e85186847141f67",
                ),
            ),
            "test": (
                Part(
                    ("newstest2014-deen-ref.en.sgm", "newstest2014-deen-src.de.sgm"),
                    parallel(segments), 3_003,
                    f"{_WMT14}test-full.tgz", "a8cd784e006feb32ac6f3d9ec7eb389a",
                ),
            ),
        },
        longest=250, ratio=1.5,
    ),
    "wmt16_en_ro": Corpus(
        ("en", "ro"),
        {
            "train": (
                Part(
                    ("europarl-v8.ro-en.en", "europarl-v8.ro-en.ro"), lines,
                    url=f"{_WMT16}training-parallel-ep-v8.tgz",
                ),
                Part(
                    ("SETIMES.en-ro.en", "SETIMES.en-ro.ro"), lines, 213_047,
                    "http://opus.nlpl.eu/download.php?f=SETIMES/v2/moses/en-ro.txt.zip",
                ),
            ),
            "valid": (
                Part(
                    ("newsdev2016-roen-ref.en.sgm", "newsdev2016-roen-src.ro.sgm"),
                    parallel(segments), 1_999,
                    f"{_WMT16}dev.tgz", "4a3dc2760bb077f4308cce96b06e6af6",
                ),
            ),
            "test": (
                Part(
                    ("newstest2016-roen-ref.en.sgm", "newstest2016-roen-src.ro.sgm"),
                    parallel(segments), 1_999,
                    f"{_WMT16}test.tgz", "3d809cd0c2c86adb2c67034d15c4e446",
                ),
            ),
        },
        longest=250, ratio=1.5,
    ),
    "qqp": Corpus(
        ("src", "trg"),
        {
            "train": (Part(("train.jsonl",), json_rows, 144_715),),
            "valid": (Part(("valid.jsonl",), json_rows, 2_048),),
            "test": (Part(("test.jsonl",), json_rows, 2_500),),
        },
        plain=_plain("src", "trg"),
    ),
    "wiki_auto": Corpus(
        ("src", "trg"),
        {
            "train": (Part(("train.jsonl",), json_rows, 677_751),),
            "valid": (Part(("valid.jsonl",), json_rows, 2_048),),
            "test": (Part(("test.jsonl",), json_rows),),
        },
        plain=_plain("src", "trg"),
    ),
    "gigaword": Corpus(
        ("src", "trg"),
        {
            "train": (Part(("train.article.txt", "train.title.txt"), lines, 3_803_957),),
            "valid": (
                Part(("valid.article.filter.txt", "valid.title.filter.txt"), lines, 189_651),
            ),
            "test": (Part(("Giga/input.txt", "Giga/task1_ref0.txt"), lines, 1_951),),
        },
    ),
    "multi30k_de_en": Corpus(
        ("de", "en"),
        {
            "train": (Part(("train.de.gz", "train.en.gz"), lines, 29_000, _MULTI30K),),
            "valid": (Part(("val.de.gz", "val.en.gz"), lines, 1_014, _MULTI30K),),
            "test": (
                Part(
                    ("test_2016_flickr.de.gz", "test_2016_flickr.en.gz"), lines, 1_000, _MULTI30K
                ),
            ),
        },
        plain=_plain("de", "en", test="test2016"),
    ),
    "sigmorphon17_german": Corpus(
        ("src", "trg"),
        {
            "train": (
                Part(("german-train-high",), inflections, 10_000, f"{_CONLL2017}all/task1/"),
            ),
            "valid": (Part(("german-dev",), inflections, 1_000, f"{_CONLL2017}all/task1/"),),
            "test": (
                Part(
                    ("german-uncovered-test",), inflections, 1_000, f"{_CONLL2017}answers/task1/"
                ),
            ),
        },
        plain=_plain("src", "trg"),
    ),
    "tatoeba_deen": Corpus(
        ("de", "en"),
        {
            "train": (Part(("train.de", "train.en"), lines, 164_577),),
            "valid": (Part(("valid.de", "valid.en", "valid.refs_en.tsv"), lines, 2_000),),
        },
    ),
    "cmudict_g2p": Corpus(
        ("src", "trg"),
        {
            "train": (Part(("train.src", "train.trg"), lines, 119_052),),
            "valid": (Part(("valid.src", "valid.trg", "valid.refs.tsv"), lines, 2_000),),
        },
    ),
}  # fmt: skip
