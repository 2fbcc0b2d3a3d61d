"""lower_attention: every marked attention becomes local attention and collectives.

Ulysses, for two ranks, four heads of 8, five tokens; two all-to-alls and nothing else moves::

    %q, %k, %v: [B, 4, 3, 8]
    %pack_heads:   [2, 3, B 6, 8]    q, k, v by destination: rank, token, tensor, batch, head; written once
    %all_to_all:   [2, 3, B 6, 8]    by source: rank and token together are the global order
    %narrow:       [5, B 4, 8]       keys and values without pads: a narrow of the outermost dimension, a view
    %attention:    [1, B 2, 6, 8]    queries with pads: what becomes of a pad is a pad
    %reshape:      [2, 3, B 2, 8]    a view, since fused kernels write token by token
    %all_to_all:   [2, 3, B 2, 8]    by source: the heads of each rank
    %unpack_heads: [B, 3, 4, 8]      by token, as the output projection reads them
    %result:       [B, 4, 3, 8]      a view

Queries stay as they arrive, rank by rank and with pads, as long as nothing looks at their order: then nothing moves on
either side of the attention.  Of keys and values pads must go, unless the causal flag hides them, and several segments
with pads are put in global order by ``unpack``; so are queries whose order counts, and ``pack`` is the way back.  Heads
of all batch entries count as heads of one, unless a mask tells them apart: else the output of a larger batch would lie
batch first, and had to be copied to be sent.
After this pass no ``distributed_attention`` remains.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fxsp.kernels.attention.own_kernel import written_out
from fxsp.kernels.ops import fxsp_ops, local_ops, op_of
from fxsp.passes.attention.decide import AttentionChoice, distributed_attention
from fxsp.passes.attention.methods.ring import lower_ring
from fxsp.passes.attention.methods.ulysses import HeadExchange
from fxsp.passes.attention.operators import ATTENTION_OPS, BANDED, SDPA
from fxsp.passes.attention.repeat_kv import chain_of, repeat_heads, repeated_heads
from fxsp.passes.base import Program
from fxsp.passes.builder import Builder
from fxsp.passes.graph import facts, global_value, mark, type_of
from fxsp.torch_internals import saved_tag
from fxsp.types import Length, Sequence, Shard, as_length, same_length

__all__ = ["LowerAttention"]

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerAttention:
    """After this pass attention is local, and its collectives are nodes of the graph."""

    name: str = "lower_attention"

    def apply(self, program: Program) -> Program:
        graph = program.graph
        build = Builder(graph, program.ranks, program.report, training=program.training)
        inputs = graph.find_nodes(op="placeholder")
        if inputs:
            with graph.inserting_after(inputs[-1]):
                for node in inputs:
                    build.learn(node, global_value(node))
        cache: dict[Any, Node] = {}
        for node in list(graph.nodes):
            if isinstance(node.meta.get("val"), torch.SymInt):
                build.learn(node, node.meta["val"])
            if node.target is not distributed_attention:
                continue
            build.at(node)
            before = node.prev
            with graph.inserting_before(node):
                new = _Lowering(build, node, cache).lower()
            for written in _between(before, node):
                mark(written, attention_record=facts(node).attention_record)
                # In an activation checkpoint, what was exchanged is saved: else it would be exchanged once more.
                if "recompute" in node.meta and _is_saved(written):
                    written.meta.update(saved_tag())
            mark(new, type=type_of(node), whole=facts(node).whole)
            node.replace_all_uses_with(new)
            op = facts(node).attention.op
            repeats = [n for name in (op.key, op.value) for n in list(chain_of(_node(node.kwargs[name])))[:-1]]
            graph.erase_node(node)
            for old in dict.fromkeys(repeats):
                if not old.users:
                    graph.erase_node(old)
        program.gm.recompile()
        return program


def _is_saved(node: Node) -> bool:
    op = op_of(node)
    if op is not None:
        return op.saved
    # The seed of a dropout: another one would drop other elements.  A banded attention is several operators, masks
    # among them: those are computed again.
    return node.target is aten.randint.default or (node.target in ATTENTION_OPS and node.target is not BANDED)


def _between(before: Node, after: Node) -> Iterator[Node]:
    node = before.next
    while node is not after:
        yield node
        node = node.next


class _Lowering:
    def __init__(self, build: Builder, node: Node, cache: dict[Any, Node]) -> None:
        self.build = build
        self.size = build.ranks.size
        self.cache = cache
        self.choice: AttentionChoice = facts(node).attention
        self.op = self.choice.op
        self.args = dict(node.kwargs)
        self.mask = self.args.get(self.op.mask) if self.op.mask is not None else None
        self.causal = self.args.get(self.op.causal) if isinstance(self.op.causal, str) else self.op.causal
        self.window = self.args.get("window") if self.op.op is BANDED else None
        self.repeat = 1
        value = facts(node).whole
        self.shape = list(self.op.laid(tuple(as_length(n) for n in value.shape)))
        self.device, self.itemsize = value.device, value.element_size()
        self.queries_as_they_come, self.keys_as_they_come = self._as_they_come()
        #: Whether heads of different batch entries may count as heads of one: then the output lies as it is sent.
        #: Dropout tells them apart.
        alike = _is_for_all_heads(self.mask) and not self.args.get("dropout_p")
        self.batch_as_heads = self.op.op is SDPA and isinstance(self.shape[0], int) and alike

    def _as_they_come(self) -> tuple[bool, bool]:
        """Whether queries (and the output), and keys and values, may stay as they arrive: rank by rank, with pads.

        Rows of queries may come in any order, and some may be pads, if no mask and no causal flag tells one from
        another.  Keys and values may, if there is no mask at all, and no pads.  Of one contiguous segment pads stand
        at the end: there the causal flag itself hides them from all tokens, and queries and keys keep them alike.
        """
        mask, queries, keys = self.mask, self.choice.queries, self.choice.keys
        if keys is None or queries is None or any(queries.whole) or self.op.positional or self.op.per_head:
            return False, False
        if self.args.get("window") is not None and self.op.op is BANDED:
            return False, False
        if self.causal:
            alike = mask is None and len(queries.segments) == 1 and queries.same_as(keys) and not any(queries.head_tail)
            return alike, alike
        free = not _has_rows(mask), mask is None and not any(keys.whole) and not keys.has_pads(self.size)
        # An operator that is registered may want as many queries as keys.
        return free if self.op.builtin or all(free) else (False, False)

    def lower(self) -> Node:
        q, k, v = (self._heads_first(_node(self.args[n])) for n in (self.op.query, self.op.key, self.op.value))
        (plain_k, times), (plain_v, others) = repeated_heads(k), repeated_heads(v)
        if times == others == self.choice.repeat:
            # Otherwise a conversion stands between, and they are exchanged repeated.
            k, v, self.repeat = plain_k, plain_v, times
            if self.choice.spread > 1:
                k, v = (self._spread(x, self.choice.spread) for x in (k, v))
                self.repeat = max(1, self.repeat // self.choice.spread)
        if self.choice.method == "merged":
            return self._merged(q, k, v)
        if self.choice.method in ("ring", "hybrid"):
            return lower_ring(self.build, self.choice, q, k, v, self.args, self._is_exact())
        if self.choice.method == "ulysses":
            return self._turned(self._ulysses(q, k, v))
        if self.choice.keys is not None:
            k, v = self._gather_kv(k, v, self.choice.keys)
        return self._turned(self._rows(q, k, v))

    def _is_exact(self) -> bool:
        """Whether one device would write this attention out; blocks of it then take their gradients as that does."""
        q, k, v = (facts(_node(self.args[n])).whole for n in (self.op.query, self.op.key, self.op.value))
        mask = facts(self.mask).whole if isinstance(self.mask, Node) else None
        return written_out(q, k, v, mask, bool(self.args.get("enable_gqa")))

    def _heads_first(self, x: Node) -> Node:
        """An operand as ``[B, H, S, D]``."""
        new = self._turned(x)
        if new is not x:
            type_ = type_of(x)
            type_ = replace(type_, dim=2) if isinstance(type_, Shard) else type_
            mark(new, type=type_, whole=facts(x).whole.transpose(1, 2))
        return new

    def _turned(self, x: Node) -> Node:
        """``[B, H, S, D]`` in the operator's layout, or the other way round."""
        return x if self.op.heads_first else self.build.call(aten.transpose.int, x, 1, 2)

    def _spread(self, x: Node, times: int) -> Node:
        """Heads repeated before the exchange, so that they divide over the ranks."""
        new = repeat_heads(self.build, x, times)
        mark(new, type=type_of(x), whole=facts(x).whole.repeat_interleave(times, 1))
        return new

    def _sdpa(self, q: Node, k: Node, v: Node, mask: Any, causal: Any) -> Node:
        if self.args.get("dropout_p"):
            return self._dropped(q, k, v, mask, causal)
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

    def _attend(self, q: Node, k: Node, v: Node, mask: Any, causal: Any) -> Node:
        """The operator itself, on this rank."""
        if self.op.builtin:
            return self._sdpa(q, k, v, mask, causal)
        given = dict(self.args)
        for name, x in zip((self.op.query, self.op.key, self.op.value), (q, k, v), strict=True):
            laid = self._turned(x)
            given[name] = laid if self.op.strided else self.build.call(aten.contiguous.default, laid)
        if self.op.mask is not None:
            given[self.op.mask] = mask
        if isinstance(self.op.causal, str):
            given[self.op.causal] = causal
        out = self.build.call(self.op.op, **given)
        if len(self.op.op._schema.returns) > 1:
            out = self.build.call(operator.getitem, out, self.op.output)
        return self._turned(out)

    def _dropped(self, q: Node, k: Node, v: Node, mask: Any, causal: Any) -> Node:
        """With active dropout: each element's draw depends on its place in the whole attention."""
        call, queries = self.build.call, self.choice.queries
        assert queries is not None
        heads = self.shape[-3] if len(self.shape) > 2 else 1
        every = call(aten.arange.default, self.build.size(heads), device=self.device)
        if self.choice.method == "ulysses":
            every = self.build.take(every, 0)
            # Queries may have come in another order; then this is another draw, and no worse.
            come = as_length(queries.local_length(self.size) * self.size)
            length = come if self.queries_as_they_come else queries.length
            rows = call(aten.arange.default, self.build.size(length), device=self.device)
        else:
            rows = self.build.positions(queries, self.device)
        k, v = (repeat_heads(self.build, x, self.repeat) for x in (k, v))
        return call(
            local_ops.dropped_attention.default, q, k, v, mask, self.args["dropout_p"], bool(causal),
            self.args.get("scale"), bool(self.args.get("enable_gqa")), self.build.seed(self.device), rows, every,
        )  # fmt: skip

    # Queries are whole, each rank attends to its own keys.

    def _merged(self, q: Node, k: Node, v: Node) -> Node:
        keys, ranks = self.choice.keys, self.build.ranks
        assert keys is not None
        both = self.build.call(
            fxsp_ops.merged_attention.default, q, k, v, self.mask, self.build.sizes(keys.lengths),
            list(keys.whole), bool(self.causal), self.args.get("scale"), ranks.rank, ranks.size, ranks.group,
            *self.build.placed(keys), **({"exact": True} if self._is_exact() else {}),
        )  # fmt: skip
        why = "outputs of an attention to each rank's own keys, merged by their log-sum-exps"
        self.build.record("all_gather", both, self.choice.sent, why)
        return self.build.call(operator.getitem, both, 0)

    # Queries stay, keys and values are whole.

    def _rows(self, q: Node, k: Node, v: Node) -> Node:
        mask, causal = self.mask, self.causal
        if causal and self.choice.queries is not None:
            mask, causal = self._causal_rows(k, self.choice.queries), False
        return self._attend(q, k, v, mask, causal)

    def _causal_rows(self, k: Node, queries: Sequence) -> Node:
        """What this rank's rows may look at, ``[Lq, S]``, or with a mask of keys ``[B, 1, Lq, S]``: keys at or before a
        query's position (the flag means the upper left), not before its window.
        """
        length = _global(k, -2)
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

    def _gather_kv(self, k: Node, v: Node, keys: Sequence) -> tuple[Node, Node]:
        """One all-gather of keys and values side by side in the head dimension."""
        widths = [_global(k, -1), _global(v, -1)]
        dim = len(self.shape) - 2
        both = self.build.call(aten.cat.default, [k, v], -1)
        # Whole queries meet them on every rank alike.
        whole = self.build.gather(both, dim, keys, used=self.choice.queries is not None)
        self.build.record("all_gather", whole, self.choice.sent, "keys and values of an attention", keys)
        parts = self.build.call(aten.split_with_sizes.default, whole, self.build.sizes(widths), -1)
        first, second = (self.build.call(operator.getitem, parts, i) for i in (0, 1))
        for new, old in ((first, k), (second, v)):
            mark(new, whole=facts(old).whole)
        return first, second

    # Ulysses.

    def _ulysses(self, q: Node, k: Node, v: Node) -> Node:
        choice = self.choice
        assert choice.keys is not None
        assert choice.queries is not None
        exchange = HeadExchange(self.build, self.shape, self.itemsize, self.batch_as_heads)
        rows, columns = (choice.queries, self.queries_as_they_come), (choice.keys, self.keys_as_they_come)
        if choice.queries.same_as(choice.keys) and _global(q, -1) == _global(v, -1):
            q, k, v = exchange.to_heads([q, k, v], *columns, 1 if rows[1] and not columns[1] else 0)
        elif _global(k, -1) == _global(v, -1):
            (q,) = exchange.to_heads([q], *rows)
            k, v = exchange.to_heads([k, v], *columns)
        else:
            (q,) = exchange.to_heads([q], *rows)
            (k,) = exchange.to_heads([k], *columns)
            (v,) = exchange.to_heads([v], *columns)
        out = self._attend(q, k, v, self.mask, self.causal)
        return exchange.to_tokens(out, *rows)


def _has_rows(mask: Any) -> bool:
    """Whether a mask may tell one query from another."""
    if not isinstance(mask, Node):
        return mask is not None
    shape = facts(mask).whole.shape
    return len(shape) >= 2 and not same_length(as_length(shape[-2]), 1)


def _is_for_all_heads(mask: Any) -> bool:
    """Whether a mask, if there is one, is the same for all heads of all batch entries."""
    if not isinstance(mask, Node):
        return mask is None
    return all(same_length(as_length(n), 1) for n in facts(mask).whole.shape[:-2])


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument


def _global(x: Node, dim: int) -> Length:
    return as_length(facts(x).whole.shape[dim])
