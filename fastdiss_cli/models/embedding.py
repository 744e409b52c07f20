"""The target embeddings of continuous diffusion, and the output layer tied to them."""
# P tokens of a batch, D latent, V vocabulary

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiss_cli.device import compute_dtype
from fastdiss_cli.models.cross_entropy import linear_cross_entropy

FORMS = ("raw", "nearest", "expected")  # of an estimate: see `LatentEmbedding.project`
LOGIT_SCALES = ("matched", "rsqrt", "learned", "one")
_SCORES = 2**26  # of estimates and tokens, at once


class LatentEmbedding(nn.Module):
    """The target embeddings and the output layer tied to them.

    Every embedding has norm sqrt(D), so that a schedule means the same for all tokens. The logit of
    a perfect estimate is D times the logit scale, that of another token about 0, and the anchor
    loss with label smoothing e asks for a difference of log(1 + V (1 - e) / e). ``matched`` makes
    these equal. A larger scale keeps z0_hat at a fraction of the embeddings' norm, from which the
    solver makes a z_t unlike any in training; a smaller one blurs the softmax, the more so the
    larger the vocabulary is.

    Args:
        size, dim: V and D.
        logit_scale: ``matched``; ``rsqrt``: 1/sqrt(D); ``learned``: from there on; ``one``.
        label_smoothing: that of the anchor loss; values below 0.01 count as 0.01 here.
    """

    def __init__(self, size: int, dim: int, logit_scale: str, label_smoothing: float) -> None:
        super().__init__()
        self.table = nn.Embedding(size, dim)
        self.bias = nn.Parameter(torch.zeros(size))
        e = max(label_smoothing, 0.01)
        self.logit_scale: float | Tensor
        match logit_scale:
            case "matched":
                self.logit_scale = math.log(1 + size * (1 - e) / e) / dim
            case "rsqrt":
                self.logit_scale = dim**-0.5
            case "learned":
                self.logit_scale = nn.Parameter(torch.full((1,), dim**-0.5))
            case "one":
                self.logit_scale = 1.0
        self._frozen: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed int64 [...] to float [..., D]."""
        return _normalise(self.table(tokens))

    def rows(self) -> Tensor:
        """Return all embeddings, float [V, D]."""
        return _normalise(self.table.weight) if self._frozen is None else self._frozen

    def logits(self, z0_hat: Tensor) -> Tensor:
        """Score all tokens for estimates [..., D]; float32 [..., V]."""
        return F.linear(z0_hat * self.logit_scale, self.rows(), self.bias).float()

    def cross_entropy(
        self, z0_hat: Tensor, tokens: Tensor, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Return what `linear_cross_entropy` returns for estimates [P, D] and int64 [P]."""
        x = z0_hat * self.logit_scale
        return linear_cross_entropy(x, self.rows(), self.bias, tokens, label_smoothing)

    def project(self, z0_hat: Tensor, form: str) -> Tensor:
        """Return estimates in one of `FORMS`; float32 [P, D] both.

        Args:
            z0_hat: the estimates.
            form: ``raw``: as they are; ``nearest``: the embedding of the best token (Li et al.
                2022, Diffusion-LM, the clamping trick); ``expected``: the mean embedding under
                the softmax (Dieleman et al. 2022, CDCD, score interpolation).
        """
        if form == "nearest":
            return self.rows()[self.logits(z0_hat).argmax(-1)].float()
        if form == "expected":
            return self._expected(z0_hat)
        return z0_hat

    def project_and_read(self, z0_hat: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `project` does, and the probability [P] and id [P] of the best tokens.

        The scores of all tokens are computed once for both.
        """
        logits, rows = self.logits(z0_hat), self.rows()
        probabilities = logits.softmax(-1).to(rows.dtype)
        best, tokens = probabilities.max(-1)
        if form == "expected":
            z0_hat = (probabilities @ rows).float()
        elif form == "nearest":
            z0_hat = rows[tokens].float()
        return z0_hat, best, tokens

    def freeze(self, dtype: torch.dtype) -> None:
        """Normalise the table once."""
        self._frozen = self.rows().detach().to(dtype)

    def _expected(self, z0_hat: Tensor) -> Tensor:
        dtype = compute_dtype(z0_hat)
        query = (z0_hat * self.logit_scale).to(dtype)
        rows, bias = self.rows().to(dtype), self.bias.to(dtype)
        with torch.autocast(z0_hat.device.type, enabled=False):
            # without a gradient, [P, V] is never in memory as a whole
            if dtype == torch.bfloat16:
                parts = query.split(max(_SCORES // len(rows), 1))
                means = [F.linear(part, rows, bias).softmax(-1) @ rows for part in parts]
                return torch.cat(means).float()
            # as attention over the table (not with a mask that requires a gradient)
            attn_mask = bias.detach().expand(1, 1, len(query), len(rows))
            rows = rows[None, None]
            return F.scaled_dot_product_attention(
                query[None, None], rows, rows, attn_mask=attn_mask, scale=1.0
            )[0, 0]


def _normalise(rows: Tensor) -> Tensor:
    return F.layer_norm(rows, rows.shape[-1:])
