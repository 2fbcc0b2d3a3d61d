"""fxsp ops become ATen and ``_c10d_functional`` ops, in graphs that AOTAutograd has made.

Input::

    %x_1 = fxsp.gather(%x, 1, [4], [False], 0, 2, '0')

Output::

    %permute = aten.permute(%x, [1, 0, 2])
    %clone = aten.clone(%permute, memory_format=torch.contiguous_format)
    %all_gather_into_tensor = _c10d_functional.all_gather_into_tensor(%clone, 2, '0')
    %wait_tensor = _c10d_functional.wait_tensor(%all_gather_into_tensor)
    %permute_1 = aten.permute(%wait_tensor, [1, 0, 2])

After this pass no fxsp op remains.  What each becomes is its lowering (``fxsp.kernels.lowering``), traced with the
node's own fakes, once for all nodes that look the same.

Two steps, since the partitioner stands between them:

:func:`drop_identities` on the joint graph: ``use``, say, has done its work once autograd has seen it.  Left to the
partitioner it would be saved for the backward pass, a copy of each parameter.

:func:`emit` on the forward, backward and inference graphs.  Here the all-reduces of gradients (``reduce_grad``) that
are results of the graph are put together in buckets; each bucket starts when its last member is there, and is waited
for at the end.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

import fxsp.errors
from fxsp.errors import VerificationError
from fxsp.kernels import collectives, lowering
from fxsp.kernels.ops import fxsp_ops, op_of
from fxsp.kernels.rows import cut, joined
from fxsp.torch_internals import arguments_of, fake_mode_of, functionalized, is_operator, schema, storage_key
from fxsp.types import as_length

__all__ = ["BUCKET_BYTES", "FOLDERS", "drop_identities", "emit", "fingerprint"]

#: Gradients are reduced together up to this size.
BUCKET_BYTES = 25 * 2**20

#: What a node of the lowering inherits from the op's node.
_INHERITED = (
    "stack_trace",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "source_fn_stack",
    "original_aten",
    "from_node",
    "seq_nr",
    "autograd_backward",
)


#: Where the files of this version are: fxsp, its passes and its kernels, with all folders in them.
FOLDERS = (Path(fxsp.errors.__file__).parent, Path(__file__).parents[1], Path(lowering.__file__).parent)


@functools.cache
def fingerprint(folders: tuple[Path, ...] = FOLDERS) -> str:
    """Hash of this version of fxsp, which decides what :func:`emit` writes: part of the keys of compiler caches.

    Covers names (from their folder on) and contents of all Python files below ``folders``.
    """
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.py"))]
    found = hashlib.sha256()
    for folder, file in files:
        found.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def is_kernel(target: Any) -> bool:
    """Whether a call is one of the operators around our Triton kernels, which stay in a graph."""
    return is_operator(target) and schema(target).name.startswith("fxsp_kernels::")


def drop_identities(graph: Graph) -> None:
    """Remove the operators that are nothing forward (``use``, say), in place."""
    with _apart(graph):
        for node in list(graph.nodes):
            if (op := op_of(node)) is not None and op.is_identity:
                _replace(node, node.args[0])


def emit(
    graph: Graph, bucket_bytes: int = BUCKET_BYTES, decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> None:
    """Replace every fxsp op by its lowering, in place.

    ``bucket_bytes=0``: each gradient is reduced alone.  ``decompositions`` are those that the rest of the graph went
    through: a compiler takes no op that it would have had decomposed.

    Raises :class:`VerificationError` if an fxsp op remains.
    """
    splicer = _Splicer(graph, decompositions)
    for bucket in _buckets(graph, bucket_bytes):
        _reduce_together(splicer, bucket)
    with _apart(graph):
        for node in list(graph.nodes):
            op = op_of(node)
            if op is not None and op.is_identity:
                _replace(node, node.args[0])
            elif op is not None:
                arguments = arguments_of(node)
                if decompositions is None and "fuse" in arguments:
                    arguments["fuse"] = False  # nobody comes after us who would fuse
                _replace(node, splicer.call(op.lowering, tuple(arguments.values()), node, node))
    left = [node.name for node in graph.nodes if op_of(node) is not None]
    if left:
        raise VerificationError(f"emit left fxsp ops in the graph: {', '.join(left)}")


def _replace(node: Node, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for user in list(node.users):
            _replace(user, value[user.args[1]])  # type: ignore[index]  # getitem
        node.graph.erase_node(node)
        return
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


class _Splicer:
    """Writes calls of plain functions into a graph, as the ATen ops that they consist of."""

    def __init__(self, graph: Graph, decompositions: Mapping[Any, Callable[..., Any]] | None) -> None:
        self.graph = graph
        self.decompositions = dict(decompositions or {})
        self._traces: dict[Any, Graph] = {}
        modes = (fake_mode_of(node.meta.get("val")) for node in graph.nodes)
        self._mode: AbstractContextManager[Any] = next(filter(None, modes), contextlib.nullcontext())

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], at: Node, like: Node) -> Any:
        """Insert ``function(*args)`` before ``at``, with the source line of ``like``; its result, as nodes."""
        inputs: list[Node] = []

        def number(node: Node) -> str:
            inputs.append(node)
            return f"%{len(inputs)}"

        key = (function, repr(torch.fx.map_arg(args, number)), tuple(_description(n.meta["val"]) for n in inputs))
        if key not in self._traces:
            self._traces[key] = self._trace(function, args, inputs)
        return self._splice(self._traces[key], inputs, at, like)

    def _trace(self, function: Callable[..., Any], args: tuple[Any, ...], inputs: Sequence[Node]) -> Graph:
        def run(*values: Any) -> Any:
            left = iter(values)
            return function(*torch.fx.map_arg(args, lambda _: next(left)))

        values = [node.meta["val"] for node in inputs]
        with torch.no_grad(), self._mode:
            trace = make_fx(run, self.decompositions)(*values).graph
            if self.decompositions and any(is_kernel(node.target) for node in trace.nodes):
                # A compiler gets the Triton kernels themselves, and so places their outputs and launches them.
                trace = make_fx(functionalized(run), self.decompositions)(*values).graph
        return trace

    def _splice(self, trace: Graph, inputs: Sequence[Node], at: Node, like: Node) -> Any:
        left = iter(inputs)
        new: dict[Node, Any] = {}
        result = None
        with self.graph.inserting_before(at):
            for node in trace.nodes:
                if node.op == "placeholder":
                    new[node] = next(left)
                elif node.op == "output":
                    result = torch.fx.map_arg(node.args[0], new.__getitem__)
                elif node.users or node.op != "call_function":
                    new[node] = self._copy(node, new, like)
        return result

    def _copy(self, node: Node, new: dict[Node, Any], like: Node) -> Node:
        if node.op != "call_function":
            raise VerificationError(f"the lowering of {like.target} has a constant ({node.op} {node.target})")
        copy = self.graph.node_copy(node, new.__getitem__)
        # Not the trace's own value: the trace serves many nodes, and each has its own storage.
        args, kwargs = torch.fx.map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
        with self._mode:
            target: Any = node.target
            val = target(*args, **kwargs)
        copy.meta = {key: like.meta[key] for key in _INHERITED if key in like.meta}
        copy.meta["val"] = val
        return copy


def _description(value: Any) -> Any:
    """What a trace depends on, of an input."""
    if not isinstance(value, Tensor):
        return str(value)
    sizes = tuple(str(as_length(n)) for n in (*value.shape, *value.stride()))
    return (sizes, value.dtype, value.device)


def _results(graph: Graph) -> list[Any]:
    return list(pytree.tree_leaves(graph.output_node().args[0]))


def _places(graph: Graph) -> list[Any]:
    """A key for the memory of each input and result; None for what is no tensor."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("val") if isinstance(node, Node) else None for node in (*inputs, *_results(graph))]
    return [storage_key(value) if isinstance(value, Tensor) else None for value in values]


@contextlib.contextmanager
def _apart(graph: Graph) -> Iterator[None]:
    """Keeps apart, by a clone, the results of a graph that had their own memory and would share it afterwards."""
    before = _places(graph)
    yield
    after, results, output = _places(graph), _results(graph), graph.output_node()
    inputs = len(after) - len(results)
    for i, node in enumerate(results, start=inputs):
        if after[i] is None:
            continue
        if any(after[i] == after[j] and before[i] != before[j] for j in range(i)):
            with graph.inserting_before(output):
                clone = graph.call_function(torch.ops.aten.clone.default, (node,))
            clone.meta = {**node.meta, "val": torch.ops.aten.clone.default(node.meta["val"])}
            results[i - inputs] = clone
            after[i] = object()
    _, spec = pytree.tree_flatten(output.args[0])
    output.args = (pytree.tree_unflatten(results, spec),)


# Buckets of gradients


def _buckets(graph: Graph, limit: int) -> list[list[Node]]:
    """The all-reduces of gradients that are results of the graph, in groups to be reduced together."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    output = graph.output_node()
    gradients = graph.find_nodes(op="call_function", target=fxsp_ops.reduce_grad.default)
    members = [node for node in gradients if set(node.users) == {output}]
    buckets: list[list[Node]] = []
    open_buckets: dict[Any, tuple[list[Node], int]] = {}
    # In the order in which the gradients are ready.  The node itself may come much later: autograd runs it last.
    for node in sorted(members, key=lambda node: (order[node.args[0]], order[node])):
        value, group = node.meta["val"], node.args[1]
        key = (group, collectives.summand_dtype(value.dtype), value.device)
        bytes_ = value.numel() * key[1].itemsize
        if not isinstance(bytes_, int):
            buckets.append([node])
            continue
        bucket, used = open_buckets.get(key, ([], limit))
        if used + bytes_ > limit:
            bucket, used = [], 0
            buckets.append(bucket)
        bucket.append(node)
        open_buckets[key] = (bucket, used + bytes_)
    return buckets


def _reduce_together(splicer: _Splicer, bucket: list[Node]) -> None:
    """One all-reduce for ``bucket``: started after its last gradient, waited for at the end of the graph."""
    gradients: list[Any] = [node.args[0] for node in bucket]
    output = splicer.graph.output_node()
    at = gradients[-1].next
    while at.op == "placeholder":
        at = at.next
    pending = splicer.call(_start, (bucket[0].args[1], *gradients), at, bucket[0])
    results = splicer.call(_finish, (pending, *(node.args[0] for node in bucket)), output, bucket[0])
    for node, result in zip(bucket, results, strict=True):
        _replace(node, result)


def _start(group: str, *gradients: Tensor) -> Tensor:
    flat = [collectives.summand(g).view(-1) for g in gradients]
    return collectives.start_all_reduce(joined(flat, 0), group)


def _finish(pending: Tensor, *like: Tensor) -> list[Tensor]:
    parts = cut(collectives.wait(pending), [g.numel() for g in like], 0)
    return [part.view(g.shape).to(g.dtype) for part, g in zip(parts, like, strict=True)]
