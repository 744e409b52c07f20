"""fairseq's own datasets, read without conversion.

What ``fairseq-preprocess`` writes, for the languages de and en:

    dict.de.txt, dict.en.txt                  see `Dictionary`; equal when joined
    train.de-en.de.bin, train.de-en.de.idx    tokens and index of one split and side
    ...

The bytes of ``.bin`` and ``.idx`` are described in `dataset`. There is no manifest to check them
against: instead, every id is checked, and the hash is computed from the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from fastdiss_cli import logs
from fastdiss_cli.data.dataset import ENDINGS, SIDES, TRAINING_SPLITS, Dataset, TokenFile
from fastdiss_cli.data.dictionary import Dictionary
from fastdiss_cli.data.files import file_hash
from fastdiss_cli.errors import FastdissError

_INDEX = re.compile(r"(?P<split>[^.]+)\.(?P<pair>[^.-]+-[^.-]+)\.(?P<language>[^.]+)\.idx")
_DICTIONARY = re.compile(r"dict\.[^.]+\.txt")
_OTHER_FORMATS = {b"TNTIDX\x00\x00": "lazy or cached", b"HUFFIDX\x00": "huffman"}
_MADE_BY = "fairseq-preprocess --dataset-impl mmap"


class FairseqDataset(Dataset):
    """An open folder that ``fairseq-preprocess`` wrote.

    Args:
        folder: where ``dict.<language>.txt`` and the splits are.
        source, target: the languages. As in fairseq, files that are named for one direction serve
            both; by default the direction is that of the names.
        verify: also check the ids of all splits (a full read).

    Raises:
        FastdissError: the direction is ambiguous, or a file is missing, damaged or in another
            format.
    """

    def __init__(
        self,
        folder: Path,
        source: str | None = None,
        target: str | None = None,
        verify: bool = False,
    ) -> None:
        found = _find_stems(folder)
        languages = src, tgt = _direction(folder, list(found), source, target)
        splits = {}
        for split, stems in {**found.get((tgt, src), {}), **found.get((src, tgt), {})}.items():
            splits[split] = {
                side: _open(stems, language, folder / split)
                for side, language in zip(SIDES, languages, strict=True)
            }
            sizes = {len(file) for file in splits[split].values()}
            if len(sizes) > 1:
                raise FastdissError(
                    f"{folder}/{split}: {min(sizes):,} sentences on one side and {max(sizes):,} on "
                    f"the other; run `{_MADE_BY}` again"
                )
        tokenizers = _dictionary(folder, src), _dictionary(folder, tgt)
        super().__init__(folder, languages, tokenizers, splits)
        parts = [split for split in splits if re.fullmatch(r"train\d+", split)]
        if parts:
            logs.warn(
                f"{folder}: fairseq would also train on {', '.join(parts)}; only `train` is used "
                "here: binarize the text of all of them as one"
            )
        for split in splits if verify else ():
            self.verify(split)
        logs.info(f"{folder}: a fairseq dataset, {src} to {tgt}")

    @cached_property
    def hash(self) -> str:
        """The sha256 of the dictionaries and of the files that training reads."""
        splits = [self.splits[split] for split in TRAINING_SPLITS if split in self.splits]
        facts = [self.src_tokenizer.hash, self.tgt_tokenizer.hash]
        for file in (sides[side] for sides in splits for side in SIDES):
            facts += [file_hash(Path(f"{file.stem}.{ending}")) for ending in ENDINGS]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def verify(self, split: str) -> None:
        """Check that a split's ids are in the dictionaries, and that its sentences end with eos."""
        for file, tokenizer in zip(self[split].values(), self.tokenizers, strict=True):
            file.check_ids(tokenizer.vocab_size)
            lasts = np.cumsum(file.sizes, dtype=np.int64) - 1
            ended = file.sizes > 0
            ended[ended] = file.tokens[lasts[ended]] == tokenizer.eos
            wrong = np.flatnonzero(~ended)
            if len(wrong):
                raise FastdissError(
                    f"{file.stem}.bin: {len(wrong):,} sentences do not end with eos, the first is "
                    f"number {wrong[0]}; run `{_MADE_BY}` again"
                )


def _dictionary(folder: Path, language: str) -> Dictionary:
    path = folder / f"dict.{language}.txt"
    try:
        return Dictionary(path.read_bytes(), origin=str(path))
    except OSError as error:
        raise FastdissError(f"{path}: cannot read the dictionary: {error.strerror}") from None


def is_data_bin(folder: Path) -> bool:
    """Return whether a folder looks like fairseq's, even if files are missing."""
    if not folder.is_dir() or (folder / "manifest.json").exists():
        return False
    names = [path.name for path in folder.iterdir()]
    return any(_DICTIONARY.fullmatch(name) or _INDEX.fullmatch(name) for name in names)


Stems = dict[str, Path]  # language -> the path of one split and side without its extension


def _find_stems(folder: Path) -> dict[tuple[str, str], dict[str, Stems]]:
    """Return the files of a folder by language pair and split."""
    found: dict[tuple[str, str], dict[str, Stems]] = {}
    for path in sorted(folder.iterdir()):
        match = _INDEX.fullmatch(path.name)
        if match:
            source, target = match["pair"].split("-")
            splits = found.setdefault((source, target), {})
            splits.setdefault(match["split"], {})[match["language"]] = path.with_suffix("")
    if not found:
        raise FastdissError(
            f"{folder} has fairseq's dict.*.txt, but no SPLIT.SRC-TGT.LANG.idx: "
            f"run `{_MADE_BY}` again"
        )
    return found


def _direction(
    folder: Path, pairs: list[tuple[str, str]], source: str | None, target: str | None
) -> tuple[str, str]:
    """Return the source and target languages."""
    pairs = [pair for pair in pairs if "None" not in pair]  # --only-source
    if source or target:
        both = dict.fromkeys([*pairs, *((b, a) for a, b in pairs)])
        matching = [(a, b) for a, b in both if source in (None, a) and target in (None, b)]
    else:
        matching = pairs
    if len(matching) == 1:
        return matching[0]
    available = ", ".join("-".join(pair) for pair in pairs) or "no pair of languages"
    raise FastdissError(
        f"{folder} holds {available}: choose with --source-lang and --target-lang, "
        "either direction of a pair"
    )


def _open(stems: Stems, language: str, where: Path) -> TokenFile:
    """Open one side of a split.

    Raises:
        FastdissError: it is missing, damaged, or not in fairseq's mmap format.
    """
    if language not in stems:
        others = ", ".join(f"{stem.name}.idx" for stem in stems.values())
        raise FastdissError(
            f"{where}: there is {others}, but the side {language} is missing; "
            f"run `{_MADE_BY}` again"
        )
    stem = stems[language]
    with open(f"{stem}.idx", "rb") as file:
        other = _OTHER_FORMATS.get(file.read(8))
    if other:
        raise FastdissError(
            f"{stem}.idx is in fairseq's {other} format, not mmap: run `{_MADE_BY}` again"
        )
    return TokenFile(stem, _MADE_BY)
