"""Ring attention: keys and values go around the ranks, block after block, while the queries stay.

Step ``t`` sees the keys of the place ``t`` before this one.  The block of the next step is on its way while this one is
computed: the exchange is started before the attention and waited for after it.  Keys and values travel in one message,
as an all-to-all in which only the next rank gets anything.  Results are merged by their log-sum-exps in fp32, which are
kept as two numbers, so that neither a mask nor large scores cost precision (:mod:`fxsp.kernels.attention.merge`).

The backward pass sends keys and values around once more; their gradients travel with them, one step behind, in fp32,
and arrive home after the last step.  A rank holds two blocks at a time: O(S/P) of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels import collectives
from fxsp.kernels.attention.merge import join, rounded, wide
from fxsp.kernels.attention.ring_bias import Draw, bias_of, four, keys_of, mask_gradient, range_of, tokens_first
from fxsp.kernels.attention.ring_blocks import Chunk, Meeting, chunks_of, in_pieces, meetings, same_sequence
from fxsp.kernels.attention.ring_kernels import block_backward, block_forward
from fxsp.kernels.rows import cut, joined

__all__ = ["ring_attention", "ring_attention_backward"]

Size = Any


class _Ring:
    """The places of the ring, and what each step has to do.

    ``causal`` and ``window`` are those of :func:`fxsp.kernels.attention.banded.allowed`, of global positions;
    ``dropout_p`` and ``seed`` those of :func:`fxsp.kernels.draws.dropped_attention`.  ``exact``: torch would write this
    attention out (:mod:`fxsp.kernels.attention.own_kernel`); it says something for gradients.
    """

    def __init__(
        self, q: Tensor, q_lengths: Any, q_whole: Any, k_lengths: Any, k_whole: Any, causal: bool, scale: float | None,
        ulysses: int, rank: int, size: int, group: str, q_head_tail: Any = (), k_head_tail: Any = (),
        window: Size = None, dropout_p: float = 0.0, seed: Tensor | None = None, q_units: Any = (), k_units: Any = (),
        exact: bool = False,
    ) -> None:  # fmt: skip
        self.ring = size // ulysses
        self.place = rank // ulysses
        self.causal, self.exact = causal, exact
        self.same = same_sequence(
            (q_lengths, q_whole, q_head_tail, q_units), (k_lengths, k_whole, k_head_tail, k_units)
        )
        self.at = (ulysses, rank, size, group)
        self.window = window
        self.draw = None if seed is None or not dropout_p else Draw(dropout_p, seed, rank % ulysses * q.shape[1])
        own = chunks_of(q_lengths, q_whole, ulysses, self.ring, self.place, q_head_tail, q_units)
        self.queries = in_pieces(own, window)
        self.keys = [
            in_pieces(chunks_of(k_lengths, k_whole, ulysses, self.ring, place, k_head_tail, k_units), window)
            for place in range(self.ring)
        ]
        self.scale = scale if scale is not None else float(q.shape[-1]) ** -0.5

    def step(self, t: int) -> tuple[list[Chunk], list[Meeting]]:
        """The keys that are here in step ``t``, and who meets them; only split segments travel."""
        keys = self.keys[(self.place - t) % self.ring]
        if t > 0:
            moving, row = [], 0
            for k in keys:
                if not k.whole:
                    moving.append(Chunk(k.segment, k.place, row, k.rows, k.first, k.limit, False))
                    row = row + k.rows
            keys = moving
        return keys, meetings(self.queries, keys, self.causal, self.same, self.window)

    def bias(self, mask: Tensor | None, keys: Sequence[Chunk], call: Meeting, like: Tensor) -> Tensor | None:
        return bias_of(mask, self.queries, keys, call, self.causal, self.window, like)

    def weights(self, keys: Sequence[Chunk], call: Meeting, q: Tensor) -> Tensor | None:
        """What dropout multiplies the probabilities of one call with."""
        return None if self.draw is None else self.draw.weights(self.queries, keys, call, q)

    def split_rows(self, x: Tensor) -> Tensor:
        """The rows that travel."""
        keys = self.keys[self.place]
        if not any(k.whole for k in keys):
            return x
        return torch.cat([x.narrow(2, k.row, k.rows) for k in keys if not k.whole], 2)

    def send(self, parts: Sequence[Tensor]) -> Tensor:
        """Start to send these to the next place, in one message."""
        ulysses, rank, size, group = self.at
        flat = torch.cat([part.reshape(-1) for part in parts])
        return collectives.start_shift(flat, ulysses, rank, size, group)

    def receive(self, pending: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """What the place before has sent, in the shapes of what was sent."""
        parts = cut(collectives.wait(pending), [x.numel() for x in like], 0)
        return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *where: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(out [B, H, Lq, E], lse [B, H, Lq], rest [B, H, Lq])`` of this rank's queries over everyone's keys.

    The log-sum-exp is rounded to one number, ``lse``; with the ``rest`` it is exact.

    ``q [B, H, Lq, D]``, ``k [B, h, Lk, D]``, ``v [B, h, Lk, E]`` are local rows; the rows of ``mask`` are those of the
    queries (or one), its columns all keys in global order (or one).  ``where`` are the arguments of :class:`_Ring`.
    """
    ring = _Ring(q, *where)
    mask = four(mask)
    held: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(ring.queries)
    steps = [ring.step(t) for t in range(ring.ring)]
    left = [sum(i in call.queries for _, calls in steps for call in calls) for i in range(len(ring.queries))]
    here, moving = [k, v], [ring.split_rows(k), ring.split_rows(v)]
    for t, (keys, calls) in enumerate(steps):
        pending = ring.send(moving) if t + 1 < ring.ring else None
        for call in calls:
            first, rows = range_of(ring.queries, call.queries)
            part = q if len(call.queries) == len(ring.queries) else q.narrow(2, first, rows)
            bias = ring.bias(mask, keys, call, q)
            ks, vs = (keys_of(x, keys, call.keys) for x in here)
            flag = call.how == "causal" and bias is None
            results = block_forward(part, ks, vs, bias, flag, ring.scale, ring.weights(keys, call, q))
            for i in call.queries:
                c = ring.queries[i]
                out, level, rest = (x.narrow(2, c.row - first, c.rows) for x in results)
                before = held[i]
                left[i] -= 1
                # The sum is kept wide, and rounded where the last of its summands is added.
                dtype = wide(q.dtype) if left[i] else q.dtype
                held[i] = (out, level, rest) if before is None else join(*before, out, level, rest, dtype)
        if pending is not None:
            moving = here = ring.receive(pending, moving)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for c, result in zip(ring.queries, held, strict=True):
        if result is None:  # no rank has a key that these queries see
            none = q.new_full([q.shape[0], q.shape[1], c.rows], float("-inf"), dtype=wide(q.dtype))
            nothing = torch.zeros_like(none)
            result = (nothing.unsqueeze(-1).expand(*none.shape, v.shape[3]), none, nothing)
        for one, x in zip(parts, (result[0].to(q.dtype), *rounded(*result[1:])), strict=True):
            one.append(x)
    out, lse, rest = (joined(one, 2) for one in parts)
    return tokens_first(out), lse.contiguous(), rest.contiguous()


def ring_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor,
    *where: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the mask (of no elements unless ``mask_grad``), from the results of the forward pass.

    ``where``: as there, with ``mask_grad`` before ``ulysses``.
    """
    tokens, (mask_grad, *place) = where[:6], where[6:]
    ring = _Ring(q, *tokens, *place)
    dtype = wide(q.dtype)
    given, mask = mask, four(mask)
    dq: list[Tensor | None] = [None] * len(ring.queries)
    dmask = torch.zeros_like(mask, dtype=dtype) if mask is not None and mask_grad else None
    here, moving = [k, v], [ring.split_rows(k), ring.split_rows(v)]
    own: list[Tensor] = []
    home: Tensor | None = None
    for t in range(ring.ring):
        pending = ring.send(moving) if t + 1 < ring.ring else None
        keys, calls = ring.step(t)
        dk: list[Tensor | None] = [None] * len(keys)
        dv: list[Tensor | None] = [None] * len(keys)
        for call in calls:
            first, rows = range_of(ring.queries, call.queries)
            ks, vs = (keys_of(x, keys, call.keys) for x in here)
            g, part, o, level, more = (x.narrow(2, first, rows) for x in (grad, q, out, lse, rest))
            bias = ring.bias(mask, keys, call, q)
            flag = call.how == "causal" and bias is None
            weights = ring.weights(keys, call, q)
            gq, gk, gv, gbias = block_backward(
                g, part, ks, vs, bias, o, level, more, flag, ring.scale, mask_grad, weights, ring.exact
            )
            for i in call.queries:
                c = ring.queries[i]
                dq[i] = _added(dq[i], gq.narrow(2, c.row - first, c.rows), dtype)
            for grads, g in ((dk, gk), (dv, gv)):
                for j, part in zip(call.keys, cut(g, [keys[j].real for j in call.keys], 2), strict=True):
                    grads[j] = _added(grads[j], part, dtype)
            if dmask is not None and gbias is not None:
                dmask = mask_gradient(dmask, gbias, ring.queries, keys, call)
        mine = [_rows(parts, keys, x, dtype) for parts, x in ((dk, k), (dv, v))]
        if t == 0:
            own = mine
        else:
            if home is not None:
                mine = [a + b for a, b in zip(ring.receive(home, mine), mine, strict=True)]
            home = ring.send(mine)
        if pending is not None:
            moving = here = ring.receive(pending, moving)
    if home is not None:
        arrived = ring.receive(home, [ring.split_rows(x) for x in own])
        own = [_with_split(ring, x, y) for x, y in zip(own, arrived, strict=True)]
    gq = _rows(dq, ring.queries, q, dtype)
    results = [tokens_first(x.to(q.dtype)) for x in (gq, *own)]
    if dmask is None or given is None:
        return results[0], results[1], results[2], q.new_zeros([0])
    return results[0], results[1], results[2], dmask.to(given.dtype).view(given.shape)


def _added(total: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if total is None else total + x


def _rows(parts: Sequence[Tensor | None], chunks: Sequence[Chunk], like: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradients of all rows of these chunks; zeros for pads, and for what nobody has seen."""
    pieces = []
    for part, c in zip(parts, chunks, strict=True):
        if part is not None:
            pieces.append(part)
        left = c.rows if part is None else c.rows - part.shape[2] if c.static else 0
        if not (isinstance(left, int) and left == 0):
            pieces.append(like.new_zeros([like.shape[0], like.shape[1], left, like.shape[3]], dtype=dtype))
    return joined(pieces, 2)


def _with_split(ring: _Ring, own: Tensor, arrived: Tensor) -> Tensor:
    """The gradients of the own rows, with those from the other ranks added to what travelled."""
    keys = ring.keys[ring.place]
    if not any(k.whole for k in keys):
        return own + arrived
    moved = iter(cut(arrived, [k.rows for k in keys if not k.whole], 2))
    pieces = cut(own, [k.rows for k in keys], 2)
    return torch.cat([x if k.whole else x + next(moved) for x, k in zip(pieces, keys, strict=True)], 2)
