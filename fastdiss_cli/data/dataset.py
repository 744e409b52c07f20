"""What all datasets share: token files by split and side, in fairseq's "mmap" format.

``.bin`` is one array of tokens. ``.idx`` is: magic ``MMIDIDX\\0\\0``, version (uint64, 1), dtype
code (uint8), number of sentences (uint64), their lengths (int32 each) and their byte offsets in
``.bin`` (int64 each).
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastdiss_cli.data.files import file_hash
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.errors import FastdissError

SIDES = ("src", "tgt")
TRAINING_SPLITS = ("train", "valid")  # those that a training depends on
ENDINGS = ("bin", "idx")
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQ")
_DTYPES = {  # fairseq's codes, except those of floating-point types
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
    9: np.dtype("<u4"),
    10: np.dtype("<u8"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_BLOCK = 1 << 16  # sizes or tokens that are processed at once


class Dataset(ABC):
    """An open dataset.

    Attributes:
        folder: where it is.
        languages: the names of source and target.
        src_tokenizer, tgt_tokenizer: theirs.
        splits: the token files by split and side.
    """

    def __init__(
        self,
        folder: Path,
        languages: tuple[str, str],
        tokenizers: tuple[Tokenizer, Tokenizer],
        splits: dict[str, dict[str, TokenFile]],
    ) -> None:
        self.folder, self.languages, self.splits = folder, languages, splits
        self.src_tokenizer, self.tgt_tokenizer = tokenizers

    def __getitem__(self, split: str) -> dict[str, TokenFile]:
        if split not in self.splits:
            raise FastdissError(
                f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        return self.splits[split]

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        return self.src_tokenizer, self.tgt_tokenizer

    @property
    @abstractmethod
    def hash(self) -> str:
        """The sha256 of all that training depends on: the tokens and the tokenizers."""

    @property
    def summary(self) -> dict[str, Any]:
        """What a checkpoint stores about the data that it was trained on."""
        source, target = self.languages
        counts = {split: len(sides["src"]) for split, sides in self.splits.items()}
        return {"source": source, "target": target, "sentences": counts}

    def altered_references(self, split: str) -> int:
        """Return how many targets of a split are not as in the text; 0 if that is unknown."""
        return 0

    @abstractmethod
    def verify(self, split: str) -> None:
        """Read and check every byte of a split.

        Raises:
            FastdissError: it is damaged.
        """


@dataclass
class SideInfo:
    """One side of one split: sizes for a quick check, hashes for a thorough one."""

    tokens: int
    longest: int
    unknown: int
    sha256: dict[str, str]
    altered: int = 0  # sentences that decode to different text; missing in older manifests


class TokenWriter:
    """Write one split and side incrementally, in constant memory.

    As a context manager it closes its files.

    Args:
        stem: the path without its extension, as in ``folder/train.src``.
        dtype: uint16 or int32, little-endian.
    """

    def __init__(self, stem: Path, dtype: np.dtype) -> None:
        self.stem, self.dtype = stem, dtype
        self.unknown = self.altered = self.tokens = self.longest = self.sentences = 0
        # closed in `__exit__`
        self._bin = open(f"{stem}.bin", "wb")  # noqa: SIM115
        self._idx = open(f"{stem}.idx", "w+b")  # noqa: SIM115
        self._idx.seek(_HEADER.size)
        self._bin_hash = hashlib.sha256()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        with self._bin, self._idx:  # close both, though closing one may fail
            pass

    def add(
        self, sizes: np.ndarray, tokens: np.ndarray, unknown: int = 0, altered: int = 0
    ) -> None:
        """Append sentences, given as one flat array and their lengths.

        Args:
            sizes, tokens: the lengths, and all sentences one after the other.
            unknown, altered: for the `SideInfo`.
        """
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._bin.write(data)
        self._bin_hash.update(data)
        self._idx.write(sizes.astype("<i4", copy=False).tobytes())
        self.unknown += unknown
        self.altered += altered
        self.sentences += len(sizes)
        self.tokens += int(sizes.sum(dtype=np.int64))
        self.longest = max(self.longest, int(sizes.max(initial=0)))

    def finish(self) -> SideInfo:
        """Complete the index, and return the manifest's entry for both files."""
        tokens = 0
        for start in range(0, self.sentences, _BLOCK):
            count = min(_BLOCK, self.sentences - start)
            self._idx.seek(_HEADER.size + 4 * start)
            sizes = np.frombuffer(self._idx.read(4 * count), "<i4")
            ends = tokens + np.cumsum(sizes, dtype="<i8")
            self._idx.seek(_HEADER.size + 4 * self.sentences + 8 * start)
            self._idx.write(((ends - sizes) * self.dtype.itemsize).tobytes())
            tokens = int(ends[-1])
        self._idx.seek(0)
        self._idx.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], self.sentences))
        self._idx.flush()
        self._bin.flush()
        return SideInfo(
            tokens=self.tokens,
            longest=self.longest,
            unknown=self.unknown,
            altered=self.altered,
            sha256={
                "bin": self._bin_hash.hexdigest(),
                "idx": file_hash(Path(f"{self.stem}.idx")),
            },
        )


class TokenFile:
    """One split and side, memory-mapped: ``file[i]`` is the ids of sentence ``i``.

    Opening reads only the header and both ends of the index. Sizes and offsets are checked when
    they are used: those of one sentence by ``file[i]``, all of them by `sizes`.

    Args:
        stem: the path without its extension.
        made_by: the command that makes such files, for error messages.

    Raises:
        FastdissError: a file is missing, or header, sizes and offsets are inconsistent.
    """

    def __init__(self, stem: Path, made_by: str = "fastdiss preprocess") -> None:
        self.stem, self.made_by = stem, made_by
        index = self._map(".idx", np.dtype("u1"))
        head = bytes(index[: _HEADER.size])
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise self._damaged(".idx", "no index header")
        _, version, code, count = _HEADER.unpack(head)
        if version != 1 or code not in _DTYPES:
            raise self._damaged(".idx", f"unknown index version {version} or dtype code {code}")
        if len(index) != _HEADER.size + 12 * count:
            raise self._damaged(".idx", f"{len(index)} bytes do not hold {count} sentences")
        middle = _HEADER.size + 4 * count
        self._sizes: np.ndarray = index[_HEADER.size : middle].view("<i4")
        self._offsets: np.ndarray = index[middle:].view("<i8")
        self.tokens: np.ndarray = self._map(".bin", _DTYPES[code])
        end = 0
        if count:
            end = int(self._offsets[-1]) + int(self._sizes[-1]) * self.tokens.itemsize
        if end != self.tokens.nbytes:
            raise self._damaged(".bin", f"{self.tokens.nbytes} bytes, but the index ends at {end}")
        if count and self._offsets[0] != 0:
            raise self._misfit()

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, sentence: int) -> np.ndarray:
        sentence = range(len(self))[sentence]
        start, size = int(self._offsets[sentence]), int(self._sizes[sentence])
        end, width = self.tokens.nbytes, self.tokens.itemsize
        if sentence + 1 < len(self):
            end = int(self._offsets[sentence + 1])
        inside = 0 <= start <= end <= self.tokens.nbytes
        if not inside or start % width or start + size * width != end:
            raise self._misfit()
        return self.tokens[start // width : end // width]

    def gather(self, sentences: np.ndarray) -> np.ndarray:
        """Return the concatenated tokens of the given sentences."""
        sizes = self.sizes[sentences].astype(np.int64)
        begins = self._offsets[sentences] // self.tokens.itemsize
        shift = begins - (np.cumsum(sizes) - sizes)  # from result positions to file positions
        return self.tokens[np.repeat(shift, sizes) + np.arange(sizes.sum())]

    @cached_property
    def sizes(self) -> np.ndarray:
        """The length of every sentence, int32 [N]."""
        widths = np.diff(self._offsets, append=self.tokens.nbytes)
        fit = np.array_equal(widths, self._sizes * np.int64(self.tokens.itemsize))
        if not fit or self._sizes.min(initial=0) < 0:
            raise self._misfit()
        return self._sizes

    def verify(self, info: SideInfo, vocab_size: int) -> None:
        """Check both files against the manifest, and every id against the vocabulary."""
        for ending in ENDINGS:
            if file_hash(Path(f"{self.stem}.{ending}")) != info.sha256[ending]:
                raise self._damaged(f".{ending}", "its bytes differ from the manifest's sha256")
        found, wanted = (
            (len(self.tokens), int(self.sizes.max(initial=0))),
            (info.tokens, info.longest),
        )
        if found != wanted:
            raise self._damaged(
                ".idx",
                f"{found[0]:,} tokens, {found[1]:,} in the longest sentence, but the manifest says "
                f"{wanted[0]:,} and {wanted[1]:,}",
            )
        self.check_ids(vocab_size)

    def check_ids(self, vocab_size: int) -> None:
        """Check every id against the vocabulary."""
        for start in range(0, len(self.tokens), _BLOCK):
            block = self.tokens[start : start + _BLOCK]
            for end in (int(block.min()), int(block.max())):
                if not 0 <= end < vocab_size:
                    raise self._damaged(
                        ".bin", f"id {end} is outside the vocabulary of {vocab_size}"
                    )

    def _map(self, ending: str, dtype: np.dtype) -> np.ndarray:
        path = Path(f"{self.stem}{ending}")
        try:
            size = path.stat().st_size
            if size % dtype.itemsize:
                raise self._damaged(ending, f"{size} bytes are not a whole number of tokens")
            # as a plain array: slices of a memmap are memmaps too, which is slow
            return np.asarray(np.memmap(path, dtype, mode="r")) if size else np.zeros(0, dtype)
        except OSError as error:
            raise self._damaged(ending, error.strerror or str(error)) from None

    def _misfit(self) -> FastdissError:
        return self._damaged(".idx", "sizes and offsets do not match")

    def _damaged(self, ending: str, what: str) -> FastdissError:
        return FastdissError(f"{self.stem}{ending}: {what}; run `{self.made_by}` again")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest token type that fits the vocabulary, as chosen by fairseq."""
    return _DTYPES[8 if vocab_size < 65500 else 4]
