"""Many ranks in one process: run a partitioned graph in lock-step.

Every value is a list with one tensor per rank.  An ordinary operator runs once per rank; an fxsp operator is a few
lines on lists (:mod:`fxsp.simulation.reference.table`), written apart from the kernels, so that this is the oracle
for tests, for ``fxsp.verify``, and for trying a plan before there are machines.  No process group is needed::

    outputs = simulate(partitioned, 8, inputs)      # outputs[rank][i], flattened

A value that is certainly the same on all ranks is computed once and its one tensor stands in all eight places.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxsp import torch_internals
from fxsp.errors import UnsupportedError
from fxsp.passes.graph import Call
from fxsp.passes.rules.families import family
from fxsp.simulation.reference import table as oracle
from fxsp.simulation.reference.lanes import pieces, total
from fxsp.types import Partial, Shard, Type

__all__ = ["Simulation", "assemble", "run", "simulate"]

#: One value on all ranks.
Lanes = list[Any]
Observer = Callable[[torch.fx.Node, Lanes], None]
#: What an operator of ours means, and its arguments: :func:`fxsp.simulation.reference.table.bind`.
Meaning = Callable[[str, Sequence[Any], dict[str, Any], int], tuple[Callable[..., Lanes], dict[str, Any]]]

#: Communication that is no fxsp operator: the oracle must not depend on what emit makes of one.
_FOREIGN = frozenset({"c10d", "_c10d_functional", "c10d_functional", "symm_mem"})

#: The oracle promises values, not strides: these may be legal on the real operators' results only.
_VIEWS = family("keeps_strides")


@dataclass
class Simulation:
    """What a lock-step run gave: flattened outputs, and the inputs as the program left them, per rank."""

    outputs: list[list[Any]]
    inputs: list[list[Any]] = field(default_factory=list)


def simulate(
    gm: torch.fx.GraphModule,
    size: int,
    inputs: Sequence[Any],
    *,
    observe: Observer | None = None,
    bind: Meaning = oracle.bind,
) -> list[list[Any]]:
    """Run a partitioned graph for ``size`` ranks on global ``inputs``; ``result[rank]`` are its flattened outputs.

    The rank in the graph's fxsp nodes is replaced by the simulated one; the size in them must be ``size``
    (``VerificationError``).  ``inputs`` are not modified.

    ``observe(node, lanes)`` is called for each node; ``bind`` says what operators of ours mean.
    """
    return run(gm, size, inputs, observe=observe, bind=bind).outputs


def run(
    gm: torch.fx.GraphModule,
    size: int,
    inputs: Sequence[Any],
    *,
    observe: Observer | None = None,
    bind: Meaning = oracle.bind,
) -> Simulation:
    """As :func:`simulate`, and returns the inputs too: ``result.inputs[rank]`` are what in-place operators left."""
    copies = [_private(x) for x in inputs]
    machine = _Machine(gm, size, observe, bind)
    with torch.no_grad():
        return machine.run(copies)


class _Machine:
    """The state of one run: for each live node its lanes, and whether they are one shared value."""

    def __init__(self, gm: torch.fx.GraphModule, size: int, observe: Observer | None, bind: Meaning) -> None:
        self.gm = gm
        self.size = size
        self.observe = observe
        self.bind = bind
        self.env: dict[torch.fx.Node, Lanes] = {}
        self.shared: set[torch.fx.Node] = set()

    def run(self, inputs: Sequence[Any]) -> Simulation:
        nodes = list(self.gm.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        if len(placeholders) != len(inputs):
            raise ValueError(f"the graph has {len(placeholders)} inputs, {len(inputs)} were given")
        for node, value in zip(placeholders, inputs, strict=True):
            self._set(node, [value] * self.size, shared=True)
        last_use = _last_uses(nodes)
        outputs: Lanes = []
        for node in nodes:
            if node.op == "output":
                outputs = self._per_rank(node.args[0])
                break
            if node.op != "placeholder":
                try:
                    self._step(node)
                except Exception as error:
                    error.add_note(f"while simulating {node.format_node()} on {self.size} ranks")
                    raise
            if self.observe is not None:
                self.observe(node, self.env[node])
            for dead in last_use.get(node, ()):
                del self.env[dead]
        return Simulation(
            [pytree.tree_leaves(out) for out in outputs],
            [[self.env[node][rank] for node in placeholders] for rank in range(self.size)],
        )

    def _set(self, node: torch.fx.Node, lanes: Lanes, *, shared: bool) -> None:
        self.env[node] = lanes
        if shared:
            self.shared.add(node)

    def _per_rank(self, arg: Any) -> Lanes:
        return [self._of_rank(arg, rank) for rank in range(self.size)]

    def _of_rank(self, arg: Any, rank: int) -> Any:
        return torch.fx.node.map_arg(arg, lambda n: self.env[n][rank])

    def _step(self, node: torch.fx.Node) -> None:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.gm)
            self._set(node, [_private(value)] * self.size, shared=True)
            return
        function = self._function(node)
        if _namespace(function) == "fxsp":
            self._fxsp(node)
            return
        if _namespace(function) in _FOREIGN:
            raise UnsupportedError(f"the simulator runs graphs before emit: {node.target} is no fxsp operator")
        shared = self.shared.issuperset(node.all_input_nodes)
        if not shared and _mutates(function):
            self._unshare(self._mutated(function, node))
        random = _is_random(function)
        state = torch.get_rng_state() if random else None
        lanes: Lanes = []
        for rank in range(1 if shared else self.size):
            if state is not None:
                torch.set_rng_state(state)  # every process draws from the same seed
            args, kwargs = self._of_rank((node.args, node.kwargs), rank)
            lanes.append(_call(function, args, kwargs))
        self._set(node, lanes * self.size if shared else lanes, shared=shared)

    def _function(self, node: torch.fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))
        if node.op == "call_method":
            name = str(node.target)
            return lambda self_, *args, **kwargs: getattr(self_, name)(*args, **kwargs)
        assert callable(node.target)
        return node.target

    def _fxsp(self, node: torch.fx.Node) -> None:
        name = torch_internals.schema(node.target).name.split("::")[1]
        # Tensors become lists over ranks; all else (lengths, sizes) is the same on every rank, so rank 0's is taken.
        lift = [torch.fx.node.map_arg(arg, self._lift) for arg in node.args]
        lift_kw = {key: torch.fx.node.map_arg(arg, self._lift) for key, arg in node.kwargs.items()}
        function, arguments = self.bind(name, lift, lift_kw, self.size)
        lanes = function(**arguments)
        self._set(node, lanes, shared=all(lane is lanes[0] for lane in lanes))

    def _lift(self, node: torch.fx.Node) -> Any:
        lanes = self.env[node]
        return oracle.Lanes(lanes) if isinstance(lanes[0], torch.Tensor) else lanes[0]

    def _mutated(self, function: Callable[..., Any], node: torch.fx.Node) -> list[Any]:
        """The tensors, on every rank, that the call may write to (all of its operands, if no schema says which)."""
        if torch_internals.is_operator(function):
            written: Any = Call(node).written
        else:
            written = [node.args, node.kwargs]
        return pytree.tree_leaves(self._per_rank(written))

    def _unshare(self, written: Iterable[Any]) -> None:
        """Before ranks write different data: give each rank its own copy of the written storages, views included."""
        storages = {_storage(t) for t in written if isinstance(t, torch.Tensor)}
        # Storages that only one rank sees need no copy.
        seen: dict[int, set[int]] = {}
        for lanes in self.env.values():
            for rank, lane in enumerate(lanes):
                for leaf in pytree.tree_leaves(lane):
                    if isinstance(leaf, torch.Tensor) and _storage(leaf) in storages:
                        seen.setdefault(_storage(leaf), set()).add(rank)
        common = {storage for storage, ranks in seen.items() if len(ranks) > 1}
        if not common:
            return
        clones: dict[tuple[int, int], torch.UntypedStorage] = {}

        def own(leaf: Any, rank: int) -> Any:
            if not isinstance(leaf, torch.Tensor) or _storage(leaf) not in common:
                return leaf
            key = (_storage(leaf), rank)
            if key not in clones:
                clones[key] = leaf.untyped_storage().clone()
            view = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            return view.set_(clones[key], leaf.storage_offset(), leaf.size(), leaf.stride())

        for node, lanes in self.env.items():
            leaves = [leaf for leaf in pytree.tree_leaves(lanes) if isinstance(leaf, torch.Tensor)]
            if any(_storage(leaf) in common for leaf in leaves):
                self.env[node] = [
                    pytree.tree_map(lambda leaf, r=rank: own(leaf, r), lane) for rank, lane in enumerate(lanes)
                ]
                self.shared.discard(node)


def _call(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call; a view whose legality depends on strides becomes a copy where the oracle's strides forbid it."""
    if function in _VIEWS and not kwargs:
        try:
            return function(*args)
        except RuntimeError:
            return args[0].reshape(args[1])
    return function(*args, **kwargs)


def _last_uses(nodes: list[torch.fx.Node]) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """For each node the values that are not used after it.  Inputs stay: they are part of the result."""
    result: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    seen: set[torch.fx.Node] = set()
    for node in reversed(nodes):
        for value in [node, *node.all_input_nodes]:
            if value not in seen and value.op not in ("placeholder", "output"):
                seen.add(value)
                result.setdefault(node, []).append(value)
    return result


def _storage(tensor: torch.Tensor) -> int:
    if torch_internals.is_wrapper_subclass(tensor):
        return -1  # it has none, and nothing writes to it
    return tensor.untyped_storage().data_ptr()


def _private(value: Any) -> Any:
    if torch_internals.is_wrapper_subclass(value):
        return value.detach()  # nothing writes to it
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _namespace(function: Any) -> str:
    return function.namespace if torch_internals.is_operator(function) else ""


def _mutates(function: Any) -> bool:
    """Whether the call may write to its operands: by schema, else yes (except Python's own operators)."""
    if torch_internals.is_operator(function):
        return bool(torch_internals.schema(function).is_mutable)
    return getattr(function, "__module__", "") not in ("_operator", "operator", "math", "builtins")


def _is_random(function: Any) -> bool:
    """Whether the call may draw random numbers; nobody looks into the bodies of higher-order operators."""
    if torch_internals.is_higher_order(function):
        return True
    return torch_internals.is_operator(function) and torch.Tag.nondeterministic_seeded in function.tags


def assemble(type_: Type, lanes: Sequence[torch.Tensor], whole: torch.Tensor | None = None) -> torch.Tensor:
    """The global value of which ``lanes`` (one tensor per rank) are the local ones, by its sharding type.

    ``R`` and ``U``: rank 0's; ``P``: the sum; ``S``: the shards without
    their pads, a whole segment from the local value ``whole``, else from rank 0.
    """
    if isinstance(type_, Partial):
        return total(lanes)
    if not isinstance(type_, Shard):
        return lanes[0]
    tokens, dim, size = type_.sequence, type_.dim, len(lanes)
    apart = int(type_.outer), int(tokens.local_length(size))  # [outer * sequence] as two dimensions
    rows = [lane.unflatten(dim, apart) for lane in lanes]
    everywhere = rows[0] if whole is None else whole.unflatten(dim, apart)
    lengths, units = (list(map(int, n)) for n in (tokens.lengths, tokens.units))
    parts = []
    for piece in pieces(lengths, tokens.whole, size, tokens.head_tail, units):
        if piece.whole:
            parts.append(everywhere.narrow(dim + 1, piece.local_start, piece.length))
            continue
        found = torch.cat([lane.narrow(dim + 1, piece.local_start, piece.local_length) for lane in rows], dim + 1)
        order = torch.cat([piece.rows(rank) for rank in range(size)]).argsort()[: piece.length]
        parts.append(found.index_select(dim + 1, order.to(found.device)))
    return torch.cat(parts, dim + 1).flatten(dim, dim + 1)
