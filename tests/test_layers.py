"""The layers: our own attention, dropout and caches match torch's or a concatenation."""

from __future__ import annotations

import pytest
import torch

from fastdiss_cli.data.layout import Layout
from fastdiss_cli.device import autocast
from fastdiss_cli.models.layers import Cache, attend, dropout


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_is_that_of_float32(causal: bool) -> None:
    query, key, value = torch.randn(3, 4, 2, 7, 16)
    lengths = torch.tensor([7, 3, 5, 1])[:, None, None, None]
    attn_mask = None if causal else torch.arange(7) < lengths
    wanted = attend(query, key, value, attn_mask, causal)
    found = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), attn_mask, causal)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.03)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    x = torch.full((1000, 1001), 2.0)
    torch.manual_seed(0)
    found = dropout(x, 0.3, training=True)
    zeros = found == 0
    assert zeros.float().mean().item() == pytest.approx(0.3, abs=2e-3)
    torch.testing.assert_close(
        found[~zeros], torch.full_like(found[~zeros], 2 / 0.7), rtol=1e-4, atol=0
    )
    for lag in (1, 2, 3, 4):  # the four that share a draw are not dropped together
        flat = zeros.flatten().float()
        assert torch.corrcoef(torch.stack([flat[:-lag], flat[lag:]]))[0, 1].abs() < 5e-3
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.3, training=True), found)
    assert torch.equal(dropout(x, 0.3, training=False), x)
    with torch.enable_grad():
        x.requires_grad_(True)
        torch.manual_seed(0)
        dropout(x, 0.3, training=True).sum().backward()
    assert torch.equal(x.grad == 0, zeros)


def test_a_cache_keeps_the_selected_rows() -> None:
    cache, parts = Cache(), torch.randn(40, 2, 5, 3, 1, 4)  # beyond the first capacity
    for part in parts[:-1]:
        cache.append(part)
    rows = torch.tensor([3, 3, 0])
    cache.select(rows)
    wanted = torch.cat([*parts[:-1], parts[-1]], dim=3)[:, rows]
    torch.testing.assert_close(cache.append(parts[-1][:, rows]), wanted)


def test_a_layout_takes_padding_away_and_puts_it_back() -> None:
    mask = torch.arange(4) >= torch.tensor([4, 1, 3])[:, None]
    layout, batch = Layout.of(mask), torch.randn(3, 4, 2)
    tokens = layout.flat(batch)
    assert torch.equal(tokens, batch[~mask])
    assert torch.equal(layout.padded(tokens), batch.masked_fill(mask[..., None], 0))
    chosen = layout.select(torch.tensor([2, 0]))
    assert torch.equal(chosen.flat(batch[[2, 0]]), batch[[2, 0]][~mask[[2, 0]]])
    full = layout.select(torch.tensor([0, 0]))  # without padding nothing is moved, nothing masked
    assert full.attn_mask is None and torch.equal(full.padded(full.flat(batch[:2])), batch[:2])


def test_a_gpu_attends_without_cudnn() -> None:
    """The flag exists without a GPU, too, and is restored afterwards.

    All threads share it: the first to leave must not switch it on for the others, nor must the last
    one restore the value that it found itself.
    """
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    before = allowed()
    first, second = (autocast(torch.device("cuda"), torch.float32) for _ in range(2))
    first.__enter__()
    assert not allowed()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not allowed()
    second.__exit__(None, None, None)
    assert allowed() == before
