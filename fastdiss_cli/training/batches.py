"""The batches of a split, distributed over the ranks."""

from __future__ import annotations

from fastdiss_cli import logs
from fastdiss_cli.config import TrainConfig
from fastdiss_cli.data.batching import TokenBatcher
from fastdiss_cli.data.dataset import Dataset
from fastdiss_cli.distributed import Processes


def make_batcher(
    dataset: Dataset, split: str, config: TrainConfig, processes: Processes
) -> TokenBatcher:
    """Return this rank's batcher for a split; warn of sentences that are too long.

    Args:
        dataset: the data, which must have the split.
        split: train or valid.
        config: the seed and the sizes of batches.
        processes: the process group.
    """
    files = dataset[split]
    batcher = TokenBatcher(
        files["src"],
        files["tgt"],
        dataset.src_tokenizer.pad,
        dataset.tgt_tokenizer.pad,
        config.max_tokens,
        config.max_positions,
        config.seed,
        processes.rank,
        processes.world_size,
    )
    if batcher.left_out:
        logs.warn(
            f"{split}: {batcher.left_out:,} of {len(files['src']):,} sentence pairs are longer "
            f"than train.max_positions = {config.max_positions} tokens and are left out"
        )
    large = int((batcher.lengths[batcher.sentences] > config.max_tokens).sum())
    if large:
        logs.warn(
            f"{split}: {logs.counted(large, 'sentence pair')} longer than --max-tokens = "
            f"{config.max_tokens}: each becomes a larger batch of its own"
        )
    return batcher
