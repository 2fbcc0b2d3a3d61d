"""One attention of the local graph, as the methods write it: its operands heads first, and the operator itself."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fxsp.kernels.attention.own_kernel import written_out
from fxsp.kernels.ops import local_ops
from fxsp.passes.attention.operators import BANDED, SDPA
from fxsp.passes.attention.question import AttentionChoice
from fxsp.passes.attention.repeat_kv import repeat_heads, repeated_heads
from fxsp.passes.builder import Builder
from fxsp.passes.graph import facts, mark, shape_of, type_of
from fxsp.types import Length, Sequence, Shard

__all__ = ["Attend"]

aten = torch.ops.aten


class Attend:
    """What a method has to write an attention with; ``q``, ``k``, ``v`` are local, ``[B, H, L, D]``."""

    def __init__(self, build: Builder, node: Node, cache: dict[Any, Node]) -> None:
        self.build = build
        #: Masks of causal rows, which attentions share.
        self.cache = cache
        self.choice: AttentionChoice = facts(node).attention
        self.op = self.choice.op
        self.args: dict[str, Any] = dict(node.kwargs)
        self.mask = self.args.get(self.op.mask) if self.op.mask is not None else None
        self.causal = self.args.get(self.op.causal) if isinstance(self.op.causal, str) else self.op.causal
        self.window = self.args.get("window") if self.op.op is BANDED else None
        value = facts(node).whole
        #: Of the output, global and heads first.
        self.shape = list(self.op.laid(shape_of(node)))
        self.device, self.itemsize = value.device, value.element_size()
        #: How often the kernel reads each key and value.
        self.repeat = 1
        self.given = [_node(self.args[n]) for n in (self.op.query, self.op.key, self.op.value)]
        self.q, self.k, self.v = map(self._heads_first, self.given)
        (k, times), (v, others) = repeated_heads(self.k), repeated_heads(self.v)
        if times == others == self.choice.repeat:
            # Otherwise a conversion stands between, and they are exchanged repeated.
            spread = self.choice.way.spread
            self.k, self.v = (self._spread(x, spread) for x in (k, v))
            self.repeat = max(1, times // spread)

    @property
    def queries(self) -> Sequence:
        """The tokens of the queries, where these are split."""
        assert self.choice.queries is not None
        return self.choice.queries

    @property
    def keys(self) -> Sequence:
        """The tokens of the keys and values, where these are split."""
        assert self.choice.keys is not None
        return self.choice.keys

    @property
    def exact(self) -> dict[str, bool]:
        """Whether one device would write this attention out; blocks of it then take their gradients as that does."""
        q, k, v = (facts(x).whole for x in self.given)
        mask = facts(self.mask).whole if isinstance(self.mask, Node) else None
        return {"exact": True} if written_out(q, k, v, mask, bool(self.args.get("enable_gqa"))) else {}

    def turned(self, x: Node) -> Node:
        """``[B, H, S, D]`` in the operator's layout, or the other way round."""
        return x if self.op.heads_first else self.build.call(aten.transpose.int, x, 1, 2)

    def _heads_first(self, x: Node) -> Node:
        new = self.turned(x)
        if new is not x:
            type_ = type_of(x)
            type_ = replace(type_, dim=2) if isinstance(type_, Shard) else type_
            mark(new, type=type_, whole=facts(x).whole.transpose(1, 2))
        return new

    def _spread(self, x: Node, times: int) -> Node:
        """Heads repeated before the exchange, so that they divide over the ranks."""
        new = repeat_heads(self.build, x, times)
        if new is not x:
            mark(new, type=type_of(x), whole=facts(x).whole.repeat_interleave(times, 1))
        return new

    # The operator, on this rank.

    def rows(self, k: Node, v: Node) -> Node:
        """This rank's queries attend to whole keys and values, or whole queries do."""
        mask, causal = self.mask, self.causal
        if causal and self.choice.queries is not None:
            mask, causal = self._causal_rows(k, self.choice.queries), False
        return self.attend(self.q, k, v, mask, causal)

    def attend(self, q: Node, k: Node, v: Node, mask: Any, causal: Any, own_heads_of: Length | None = None) -> Node:
        """The operator on the queries of this rank, or on its heads of all, which are ``own_heads_of`` rows."""
        if self.op.builtin:
            if self.args.get("dropout_p"):
                return self._dropped(q, k, v, mask, causal, own_heads_of)
            return self._sdpa(q, k, v, mask, causal)
        given = dict(self.args)
        for name, x in zip((self.op.query, self.op.key, self.op.value), (q, k, v), strict=True):
            laid = self.turned(x)
            given[name] = laid if self.op.strided else self.build.call(aten.contiguous.default, laid)
        if self.op.mask is not None:
            given[self.op.mask] = mask
        if isinstance(self.op.causal, str):
            given[self.op.causal] = causal
        out = self.build.call(self.op.op, **given)
        if len(self.op.op._schema.returns) > 1:
            out = self.build.call(operator.getitem, out, self.op.output)
        return self.turned(out)

    def _sdpa(self, q: Node, k: Node, v: Node, mask: Any, causal: Any) -> Node:
        extra = {n: self.args[n] for n in ("scale", "enable_gqa") if self.args.get(n) not in (None, False)}
        banded = causal and (mask is not None or self.window is not None)
        if self.repeat > 1 and mask is None and not banded:
            extra["enable_gqa"] = True  # the kernel reads each key as often as it is needed
        else:
            # Of the kernels of GPUs, those that take a mask want as many keys as queries.
            k, v = (repeat_heads(self.build, x, self.repeat) for x in (k, v))
        if banded:
            gqa = bool(self.args.get("enable_gqa"))
            return self.build.call(BANDED, q, k, v, mask, True, self.window, self.args.get("scale"), gqa)
        return self.build.call(SDPA, q, k, v, mask, 0.0, causal, **extra)

    def _dropped(self, q: Node, k: Node, v: Node, mask: Any, causal: Any, own_heads_of: Length | None) -> Node:
        """With active dropout: each element's draw depends on its place in the whole attention."""
        call = self.build.call
        heads = self.shape[-3] if len(self.shape) > 2 else 1
        every = call(aten.arange.default, self.build.size(heads), device=self.device)
        if own_heads_of is None:
            rows = self.build.positions(self.queries, self.device)
        else:
            # Queries may have come in another order; then this is another draw, and no worse.
            every = self.build.take(every, 0)
            rows = call(aten.arange.default, self.build.size(own_heads_of), device=self.device)
        k, v = (repeat_heads(self.build, x, self.repeat) for x in (k, v))
        return call(
            local_ops.dropped_attention.default, q, k, v, mask, self.args["dropout_p"], bool(causal),
            self.args.get("scale"), bool(self.args.get("enable_gqa")), self.build.seed(self.device), rows, every,
        )  # fmt: skip

    def _causal_rows(self, k: Node, queries: Sequence) -> Node:
        """What this rank's rows may look at, ``[Lq, S]``, or with a mask of keys ``[B, 1, Lq, S]``: keys at or before a
        query's position (the flag means the upper left), not before its window.
        """
        length = shape_of(k)[-2]
        key = ("causal", str(queries), str(length), self.device, self.window, self.mask)
        if key not in self.cache:
            call = self.build.call
            rows = call(aten.unsqueeze.default, self.build.positions(queries, self.device), 1)
            columns = call(aten.arange.default, self.build.size(length), device=self.device)
            found = call(aten.ge.Tensor, rows, columns)
            if self.window is not None:
                near = call(aten.le.Scalar, call(aten.sub.Tensor, rows, columns), self.window)
                found = call(aten.logical_and.default, found, near)
            if isinstance(self.mask, Node):
                found = call(aten.logical_and.default, found, self.mask)
            self.cache[key] = found
        return self.cache[key]


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument
