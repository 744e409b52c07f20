"""Open a dataset, whoever made it."""

from __future__ import annotations

from pathlib import Path

from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.data.dataset import Dataset
from fastdiss_cli.data.fairseq import FairseqDataset, is_data_bin
from fastdiss_cli.errors import FastdissError


def open_dataset(
    folder: Path, source: str | None = None, target: str | None = None, verify: bool = False
) -> Dataset:
    """Open a dataset, made by fastdiss or by fairseq.

    Args:
        folder: the folder of the dataset.
        source, target: the languages; None: those of the dataset.
        verify: also read and check every byte.

    Raises:
        FastdissError: there is no dataset, it is damaged, or it has other languages.
    """
    if is_data_bin(folder):
        return FairseqDataset(folder, source, target, verify)
    dataset = BinarizedDataset(folder, verify)
    src, tgt = dataset.languages
    if source not in (None, src) or target not in (None, tgt):
        raise FastdissError(
            f"{folder} goes from {src} to {tgt}; for another direction make a dataset with "
            f"`fastdiss preprocess -s {source or src} -t {target or tgt}`"
        )
    return dataset
