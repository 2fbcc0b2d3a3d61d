"""What ``fxsp.ring_attention`` means, on lists with one tensor per rank: attention by its definition.

Every rank's queries over the keys of all ranks of its ring, put in global order without pads: scores, mask, softmax.
Nothing goes around, nothing is merged.  Gradients are autograd's, but for one thing: one device's fused kernel keeps a
row's log-sum-exp in one number, and takes probabilities from it in its backward pass (:func:`weighted`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.draws import kept
from fxsp.simulation.reference.lanes import Flags, Lengths, pieces

__all__ = ["by_autograd", "place_positions", "ring_attention", "ring_attention_backward", "weighted"]


def _tokens(
    lengths: Lengths, whole: Flags, ulysses: int, ring: int, place: int, head_tail: Flags = (), units: Lengths = ()
) -> list[int]:
    """The global position of each row of one place of the ring; -1 - n for a pad, n that of its segment's last row.

    The rows of a place are those of ``ulysses`` ranks in a row: those of one rank, were units so many times as long.
    """
    result: list[int] = []
    for piece in pieces(lengths, whole, ring, head_tail, [ulysses * unit for unit in units or [1] * len(lengths)]):
        last = piece.start + piece.length - 1
        rows = (piece.start + piece.rows(place)).tolist()
        result += [row if row <= last else -1 - last for row in rows]
    return result


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: Tensor | None, scale: float | None,
    weights: Tensor | None = None, exact: bool = False,
) -> Any:  # fmt: skip
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhmd,bhnd->bhmn", q.to(dtype), k.to(dtype).repeat_interleave(groups, 1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if past is not None:
        scores = scores.masked_fill(~past, -torch.inf)
    exact = exact or weights is not None or q.shape[-1] != v.shape[-1] or (mask is not None and mask.requires_grad)
    out, lse, rest = weighted(scores, v.to(dtype).repeat_interleave(groups, 1), exact, weights)
    return out.to(q.dtype), lse, rest


def weighted(
    scores: Tensor, values: Tensor, exact: bool, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values weighted by the softmax of ``scores [B, H, m, n]``, the log-sum-exp, and what is missing from that.

    ``exact``: the gradient is that of the softmax; else that of a fused kernel.  No key allowed: zeros and ``-inf``.
    """
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    filled = scores.masked_fill(nothing, 0)
    if exact:
        probabilities = filled.softmax(-1).masked_fill(nothing, 0)
        if weights is not None:
            probabilities = (probabilities * weights).to(values.dtype)
        out = torch.einsum("bhmn,bhne->bhme", probabilities, values)
    else:
        out = _Fused.apply(filled, nothing, values)
    top = filled.detach().amax(-1)
    lse = filled.logsumexp(-1).masked_fill(nothing.squeeze(-1), -torch.inf)
    rest = (filled.detach() - top.unsqueeze(-1)).exp().sum(-1).log() - (lse.detach() - top)
    return out, lse, rest.masked_fill(nothing.squeeze(-1), 0)


class _Fused(torch.autograd.Function):
    """A softmax times values; differentiated with ``exp(score - lse)``, as FlashAttention's backward pass does."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, nothing: Tensor, values: Tensor) -> Tensor:
        out = torch.einsum("bhmn,bhne->bhme", scores.softmax(-1).masked_fill(nothing, 0), values)
        ctx.save_for_backward(scores, nothing, values, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        scores, nothing, values, out = ctx.saved_tensors
        (grad,) = grads
        p = (scores - scores.logsumexp(-1, keepdim=True)).exp().masked_fill(nothing, 0)
        of_p = torch.einsum("bhme,bhne->bhmn", grad, values) - (grad * out).sum(-1, keepdim=True)
        return p * of_p, None, torch.einsum("bhmn,bhme->bhne", p, grad)


def ring_attention(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], mask: Sequence[Tensor] | None,
    q_lengths: Lengths, q_whole: Flags, k_lengths: Lengths, k_whole: Flags,
    causal: bool, scale: float | None, ulysses: int, rank: int = 0, size: int = 1, group: str = "",
    q_head_tail: Flags = (), k_head_tail: Flags = (), window: int | None = None,
    dropout_p: float = 0.0, seed: Sequence[Tensor] | Tensor | None = None, q_units: Lengths = (),
    k_units: Lengths = (), exact: bool = False,
) -> Any:  # fmt: skip
    """``(out, lse, rest)`` of each rank; differentiable."""
    ring = size // ulysses
    results = []
    for r in range(size):
        place, peer = divmod(r, ulysses)
        tokens = _tokens(q_lengths, q_whole, ulysses, ring, place, q_head_tail, q_units)
        rows = torch.tensor([p if p >= 0 else -1 - p for p in tokens])
        # Where each key is: a whole segment's at home, a split one's where its token lies.
        at: dict[int, tuple[int, int]] = {}
        for other in (*range(ring), place):
            for row, position in enumerate(_tokens(k_lengths, k_whole, ulysses, ring, other, k_head_tail, k_units)):
                if position >= 0:
                    at[position] = (other * ulysses + peer, row)
        keys = torch.stack([k[lane][:, :, row] for lane, row in (at[n] for n in range(len(at)))], 2)
        values = torch.stack([v[lane][:, :, row] for lane, row in (at[n] for n in range(len(at)))], 2)
        past = torch.arange(len(at)) <= rows.unsqueeze(1) if causal else None
        if window is not None:
            near = torch.arange(len(at)) >= rows.unsqueeze(1) - window
            past = near if past is None else past & near
        weights: Tensor | None = None
        if dropout_p and seed is not None:
            (batch, heads), columns = q[r].shape[:2], torch.arange(len(at))
            of_head = torch.arange(peer * heads, (peer + 1) * heads)
            places = [torch.arange(batch)[:, None, None, None], of_head[:, None, None], rows[:, None], columns]
            weights = kept(seed[0], places, dropout_p).double() / (1 - dropout_p if dropout_p < 1 else 1.0)
        results.append(_attention(q[r], keys, values, None if mask is None else mask[r], past, scale, weights, exact))
    return results


def place_positions(
    lengths: Lengths, whole: Flags, ulysses: int, size: int, device: Any, head_tail: Flags = (), units: Lengths = ()
) -> Any:
    """The global index of each row of a rank's place in the ring; a pad has that of its segment's last row."""
    places = [_tokens(lengths, whole, ulysses, size // ulysses, r // ulysses, head_tail, units) for r in range(size)]
    return [torch.tensor([p if p >= 0 else -1 - p for p in rows], device=device) for rows in places]


def ring_attention_backward(
    grad: Sequence[Tensor], q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor],
    mask: Sequence[Tensor] | None, out: Sequence[Tensor], lse: Sequence[Tensor], rest: Sequence[Tensor],
    q_lengths: Lengths, q_whole: Flags, k_lengths: Lengths, k_whole: Flags,
    causal: bool, scale: float | None, mask_grad: bool, ulysses: int, rank: int = 0, size: int = 1, group: str = "",
    q_head_tail: Flags = (), k_head_tail: Flags = (), window: int | None = None,
    dropout_p: float = 0.0, seed: Sequence[Tensor] | Tensor | None = None, q_units: Lengths = (),
    k_units: Lengths = (), exact: bool = False,
) -> Any:  # fmt: skip
    """The gradients of q, k, v and the mask, by autograd of :func:`ring_attention`."""

    def run(queries: Any, keys: Any, values: Any, masks: Any) -> Any:
        return ring_attention(
            queries, keys, values, masks, q_lengths, q_whole, k_lengths, k_whole, causal, scale, ulysses, 0, size, "",
            q_head_tail, k_head_tail, window, dropout_p, seed, q_units, k_units, exact,
        )  # fmt: skip

    return by_autograd(run, grad, q, k, v, mask, mask_grad)


def by_autograd(
    run: Callable[..., Any], grad: Sequence[Tensor], q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor],
    mask: Sequence[Tensor] | None, mask_grad: bool,
) -> Any:  # fmt: skip
    """Of each rank the gradients of q, k, v and the mask (of no elements unless ``mask_grad``).

    ``run(q, k, v, mask)`` gives the output and more of each rank; ``grad`` are the gradients of the outputs.
    """
    with torch.enable_grad():
        operands = [[x.detach().requires_grad_() for x in lanes] for lanes in (q, k, v)]
        masks = None if mask is None else [m.detach().requires_grad_(mask_grad) for m in mask]
        results = run(*operands, masks)
        leaves = [x for lanes in operands for x in lanes]
        if masks is not None and mask_grad:
            leaves += masks
        found = torch.autograd.grad([o for o, *_ in results], leaves, list(grad), materialize_grads=True)
    size = len(q)
    columns = [found[i : i + size] for i in range(0, len(found), size)]
    if len(columns) == 3:
        columns.append(tuple(x.new_zeros(0) for x in q))
    return list(zip(*columns, strict=True))


OPERATORS = (ring_attention, ring_attention_backward, place_positions)
