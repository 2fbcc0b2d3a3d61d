"""Dropout of an attention that is computed block by block: each block draws for its own pairs of a query and a key.

Whether a probability stays is a hash of one seed and of its place in the whole attention (:mod:`fxsp.kernels.draws`):
batch entry, head, query, key.  So it does not matter which rank computes a block, nor when; the backward pass draws the
same once more, and nothing but the seed is kept for it.

With weights ``w`` (0, or ``1 / (1 - p)``) and probabilities ``P`` the output is ``(P w) V``.  The log-sum-exp is that
of all scores, dropped or not: blocks merge as they do without dropout.  So ``dP = w (g V^T)``, and as before the sum of
``P dP`` over all keys is ``g`` times the final output: ``dS = P (dP - g . out)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsp.kernels.attention.merge import wide
from fxsp.kernels.attention.ring_bias import tokens_of
from fxsp.kernels.attention.ring_blocks import Chunk, Meeting
from fxsp.kernels.draws import kept

__all__ = ["Draw"]


@dataclass(frozen=True)
class Draw:
    """Probability of being dropped, the seed (int64 ``[1]``, the same on all ranks), the first of the heads here."""

    p: float
    seed: Tensor
    head: int

    def weights(self, queries: Sequence[Chunk], keys: Sequence[Chunk], call: Meeting, q: Tensor) -> Tensor:
        """``[B, H, m, n]`` for one call of the block kernel; ``q [B, H, ...]``."""
        rows, columns = tokens_of(queries, keys, call, q.device)
        batch, heads = (torch.arange(n, device=q.device) for n in q.shape[:2])
        places = [batch.view(-1, 1, 1, 1), (heads + self.head).view(-1, 1, 1), rows.unsqueeze(1), columns]
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return kept(self.seed, places, self.p).to(wide(q.dtype)) * scale
