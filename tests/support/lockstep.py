"""Values and gradients of a partitioned graph for all ranks in one eager run, some twenty times as fast as tracing.

Every rank has its own lane of tensors and its own autograd graph; the lanes meet in fxsp operators only, and each of
those is one ``autograd.Function`` over all lanes, forward and backward by the oracle.  The adjoints are written down
once more here, so a wrong pair in the kernels' table shows against ``simulate_with_grads``
(``test_rule_validation.py`` compares the two).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

import poisoning as oracle
from fxsp.torch_internals import is_higher_order, is_operator, schema
from poisoning import Lanes

__all__ = ["collectives", "gradients", "lanes_of"]

#: Our operators that send, and the names that reports use.
_SENDS = {
    "gather": "all_gather",
    "gather_used": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "reduce_grad": "all_reduce",
    "all_to_all": "all_to_all",
    "all_to_all_within": "all_to_all",
}
_counting: list[Counter[str]] = []


@contextlib.contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Counts the collectives that the lanes run inside, those of backward passes included."""
    counts: Counter[str] = Counter()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.pop()


def is_random(target: Any) -> bool:
    """Whether a call draws random numbers, or has a body that may."""
    return is_higher_order(target) or (is_operator(target) and torch.Tag.nondeterministic_seeded in target.tags)


def _call(name: str, lanes: Sequence[torch.Tensor], *args: Any, poison: bool = False) -> list[torch.Tensor]:
    if name == "scale_grad":  # an operator of gradients, which no simulated rank has
        return list(lanes)
    for counts in _counting:
        counts.update([_SENDS[name]] if name in _SENDS else [])
    call = oracle.bind(name, [Lanes(lanes), *args], {}, len(lanes))
    return list(call.run(poison_pads=poison))


def _adjoint(name: str, grads: Sequence[torch.Tensor], args: Sequence[Any]) -> Sequence[torch.Tensor]:
    if name in ("annotate", "all_reduce"):
        return grads
    if name == "scale_grad":
        return [grad * args[0] for grad in grads]
    if name == "use":
        return _call("all_reduce", grads, *args) if args[0] else grads
    if name == "shard":
        dim, lengths, whole, _, *ranks = args
        return _call("gather_sum", grads, dim, lengths, whole, *ranks)
    if name == "gather":
        dim, lengths, whole, rank, size, group = args
        own = _call("shard", grads, dim, lengths, whole, True, rank, size, group)
        return _call("scale_whole", own, dim, lengths, whole, size)
    if name == "deal":
        dim, lengths, head_tail, _, size, *units = args
        return _call("undeal", grads, dim, lengths, head_tail, size, *units)
    if name == "undeal":
        dim, lengths, head_tail, size, *units = args
        return _call("deal", grads, dim, lengths, head_tail, True, size, *units)
    if name == "pack":
        return _call("unpack", grads, *args[:2])
    if name == "unpack":
        return _call("pack", grads, *args, True)
    pairs = {"gather_used": "reduce_scatter", "take": "put"}
    return _call(pairs.get(name, name), grads, *args)


class _OnAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, args: Sequence[Any], poison: bool, *lanes: torch.Tensor) -> Any:
        ctx.name, ctx.args = name, args
        return tuple(lane.clone() for lane in _call(name, lanes, *args, poison=poison))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (None, None, None, *(g.clone() for g in _adjoint(ctx.name, grads, ctx.args)))


class _AtExtreme(torch.autograd.Function):
    """``at_extreme``: ``value`` forward, and backward the gradient goes to the hits of all ranks."""

    @staticmethod
    def forward(ctx: Any, size: int, args: Sequence[Any], *lanes: torch.Tensor) -> Any:
        x, value, ctx.hit = lanes[:size], lanes[size : 2 * size], lanes[2 * size :]
        ctx.args, ctx.size = args, size
        return tuple(lane.clone() for lane in _extreme("at_extreme", [x, value, ctx.hit], args))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        found = _extreme("at_extreme_backward", [grads, ctx.hit], ctx.args)
        return (None, None, *found, *([None] * 2 * ctx.size))


def _extreme(name: str, operands: Sequence[Sequence[torch.Tensor]], args: Sequence[Any]) -> list[torch.Tensor]:
    return list(oracle.bind(name, [*map(Lanes, operands), *args], {}, len(operands[0])).run())


def lanes_of(
    gm: GraphModule, size: int, inputs: Sequence[Sequence[Any]], *, poison_pads: bool = False
) -> list[tuple[Any, ...]]:
    """The outputs of every rank; ``inputs[i][rank]``, which the graph may write to.  Differentiable.

    Random numbers are those of one seed on every rank.
    """
    env: dict[Node, list[Any]] = {}
    queue = iter(inputs)

    def run(target: Callable[..., Any], node: Node) -> list[Any]:
        per_rank = [torch.fx.map_arg((node.args, node.kwargs), lambda n, r=r: env[n][r]) for r in range(size)]
        if not (is_operator(target) and schema(target).name.startswith("fxsp::")):
            state = torch.get_rng_state() if is_random(target) else None
            results = []
            for args, kwargs in per_rank:
                if state is not None:
                    torch.set_rng_state(state)
                results.append(target(*args, **kwargs))
            return results
        name = schema(target).name.removeprefix("fxsp::")
        args = per_rank[0][0]
        if name in ("positions", "place_positions"):
            return list(oracle.bind(name, args, {}, size).run())
        if name in ("ring_attention", "merged_attention"):
            # Plain attention on the lanes: autograd differentiates it as it stands.
            operands = [None if args[i] is None else Lanes([a[i] for a, _ in per_rank]) for i in range(4)]
            return list(oracle.bind(name, [*operands, *args[4:]], per_rank[0][1], size).run())
        if name in ("pack_heads", "unpack_heads"):
            # The same: no gradient of a pad is in question, since no row is added.
            operands = [a[0] for a, _ in per_rank]
            many = isinstance(operands[0], (list, tuple))
            first = [Lanes(x) for x in zip(*operands, strict=True)] if many else Lanes(operands)
            return list(oracle.bind(name, [first, *args[1:]], {}, size).run(poison_pads=poison_pads))
        if name == "at_extreme":
            return list(_AtExtreme.apply(size, args[3:], *(a[i] for i in range(3) for a, _ in per_rank)))
        lanes = [a[0] for a, _ in per_rank]
        if lanes[0].requires_grad:
            return list(_OnAllRanks.apply(name, args[1:], poison_pads, *lanes))
        return _call(name, lanes, *args[1:], poison=poison_pads)

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            env[node] = list(next(queue))
        elif node.op == "output":
            outputs: Any = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            return [torch.fx.map_arg(tuple(outputs), lambda n, r=r: env[n][r]) for r in range(size)]
        elif node.op == "get_attr":
            env[node] = [getattr(gm, str(node.target))] * size
        else:
            assert node.op == "call_function", node.op
            env[node] = run(node.target, node)
    raise AssertionError("the graph has no output")


def gradients(
    gm: GraphModule,
    size: int,
    inputs: Sequence[Any],
    grad_outputs: Sequence[torch.Tensor],
    *,
    poison_pads: bool = False,
) -> tuple[list[tuple[Any, ...]], list[list[torch.Tensor]]]:
    """``(outputs[rank], input_grads[rank])``, as :func:`with_grads.simulate_with_grads`."""
    lanes = [
        [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for _ in range(size)]
        for x in inputs
    ]
    # The graph may write to its inputs, which leaves must not see.
    own = [[x.clone() if isinstance(x, torch.Tensor) else x for x in ranks] for ranks in lanes]
    outputs = lanes_of(gm, size, own, poison_pads=poison_pads)
    pairs = [
        (y, g) for out in outputs for y, g in zip(out, grad_outputs, strict=True) if getattr(y, "requires_grad", False)
    ]
    leaves = [[x[r] for x in lanes if getattr(x[r], "requires_grad", False)] for r in range(size)]
    flat = [x for rank in leaves for x in rank]
    found = torch.autograd.grad([p[0] for p in pairs], flat, [p[1] for p in pairs], materialize_grads=True)
    count = len(leaves[0])
    detached = [tuple(y.detach() if isinstance(y, torch.Tensor) else y for y in out) for out in outputs]
    return detached, [list(found[r * count : (r + 1) * count]) for r in range(size)]
