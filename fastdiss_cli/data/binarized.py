"""Our own datasets: token files, tokenizers and a manifest.

A dataset is a folder:

    manifest.json                   what is in it: counts, hashes, flags (see `Manifest`)
    tokenizer.src, tokenizer.tgt    see `make_tokenizer` (the same bytes twice when joined)
    train.src.bin, train.src.idx    tokens and index of one split and side, see `dataset`
    ...
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdiss_cli.data.dataset import (
    ENDINGS,
    SIDES,
    TRAINING_SPLITS,
    Dataset,
    SideInfo,
    TokenFile,
)
from fastdiss_cli.data.files import file_hash
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.data.tokenizer_file import load_tokenizer
from fastdiss_cli.errors import FastdissError

FORMAT_VERSION = 1


@dataclass
class Manifest:
    """The contents of ``manifest.json``."""

    source: str
    target: str
    joined: bool
    dtype: str
    tokenizers: dict[str, str]  # side -> sha256
    vocab_sizes: dict[str, int]
    sentences: dict[str, int]  # split -> count
    splits: dict[str, dict[str, SideInfo]]  # split -> side -> facts
    made_with: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        # undecodable bytes of a file name become \\udcXX, which is valid JSON
        path = folder / "manifest.json"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / "manifest.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            version = facts["version"]
            if version == FORMAT_VERSION:
                manifest = cls(**facts)
                manifest.splits = {
                    split: {side: SideInfo(**info) for side, info in sides.items()}
                    for split, sides in manifest.splits.items()
                }
                manifest._check_fields()
                return manifest
        except (FileNotFoundError, NotADirectoryError):
            hint = "make it with `fastdiss preprocess`" if folder.is_dir() else "no such folder"
            if folder.is_file():
                hint = "it is a file; text is for `fastdiss preprocess`, or for `generate --input`"
            raise FastdissError(f"{folder} is not a fastdiss dataset: {hint}") from None
        except (
            OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError,
        ) as error:  # fmt: skip
            raise FastdissError(
                f"{path} is damaged ({type(error).__name__}: {error}): "
                "run `fastdiss preprocess` again"
            ) from None
        raise FastdissError(
            f"{folder} has dataset format {version!r}; this fastdiss reads format {FORMAT_VERSION}"
        )

    def _check_fields(self) -> None:
        """Raise KeyError, TypeError or ValueError if a field that is read later is invalid."""
        if self.sentences.keys() != self.splits.keys():
            raise ValueError("sentences and splits differ")
        for split in self.splits:
            if not split.isidentifier():  # it becomes part of a file name
                raise ValueError(f"{split!r} is not a valid name of a split")
        infos = [sides[side] for sides in self.splits.values() for side in SIDES]
        hashes = [self.tokenizers[side] for side in SIDES]
        hashes += [info.sha256[ending] for info in infos for ending in ENDINGS]
        words = [*hashes, self.dtype]
        counts = [self.vocab_sizes[side] for side in SIDES]
        counts += [self.sentences[split] for split in self.splits]
        counts += [n for info in infos for n in (info.tokens, info.longest, info.altered)]
        for kind, values in ((str, words), (int, counts)):
            for value in values:
                if not isinstance(value, kind):
                    raise TypeError(f"{value!r} where {kind.__name__} is expected")


class BinarizedDataset(Dataset):
    """An open folder that ``fastdiss preprocess`` wrote.

    Args:
        folder: where ``manifest.json`` is.
        verify: also check the hashes of all files and the range of all ids (a full read).

    Raises:
        FastdissError: no dataset, another format version, or damaged files.
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        self.manifest = manifest = Manifest.read(folder)
        source = _tokenizer(folder, manifest, "src")
        tokenizers = source, _tokenizer(folder, manifest, "tgt", same=source)
        splits = {
            split: {side: TokenFile(folder / f"{split}.{side}") for side in SIDES}
            for split in manifest.splits
        }
        super().__init__(folder, (manifest.source, manifest.target), tokenizers, splits)
        for split, files in splits.items():
            for file in files.values():
                found = len(file), file.tokens.dtype.name
                wanted = manifest.sentences[split], manifest.dtype
                if found != wanted:
                    raise FastdissError(
                        f"{file.stem}.idx holds {found[0]:,} sentences of {found[1]}, but the "
                        f"manifest says {wanted[0]:,} of {wanted[1]}; run `fastdiss preprocess` "
                        "again"
                    )
            if verify:
                self.verify(split)

    @property
    def hash(self) -> str:
        facts = {
            "tokenizers": self.manifest.tokenizers,
            "files": {
                f"{split}.{side}": info.sha256
                for split, sides in self.manifest.splits.items()
                for side, info in sides.items()
                if split in TRAINING_SPLITS
            },
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def altered_references(self, split: str) -> int:
        return self.manifest.splits[split]["tgt"].altered

    def verify(self, split: str) -> None:
        """Check the hashes of a split's files, and the range of all ids."""
        for side, file in self[split].items():
            file.verify(self.manifest.splits[split][side], self.manifest.vocab_sizes[side])


def _tokenizer(
    folder: Path, manifest: Manifest, side: str, same: Tokenizer | None = None
) -> Tokenizer:
    """Load the tokenizer of a side, or return ``same`` if it has the same bytes."""
    path, expected = folder / f"tokenizer.{side}", manifest.tokenizers[side]
    try:
        found = file_hash(path)
    except OSError as error:
        raise FastdissError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
    if found != expected:  # before its bytes are parsed
        raise FastdissError(
            f"{path} has hash {found[:16]}, but the manifest says {expected[:16]}; "
            "run `fastdiss preprocess` again"
        )
    tokenizer = same if same and same.hash == found else load_tokenizer(path)
    size = manifest.vocab_sizes[side]
    if tokenizer.vocab_size != size:
        raise FastdissError(
            f"{path} has {tokenizer.vocab_size} pieces, but the manifest says {size}; "
            "run `fastdiss preprocess` again"
        )
    return tokenizer
