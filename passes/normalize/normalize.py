"""Dynamo's graph as ATen operators above autograd: one spelling for each operation.

Input::

    %l_x_ : placeholder[target=L_x_]
    %y : call_method[target=chunk](args = (%l_x_, 2), kwargs = {dim: -1})
    %a : call_function[target=operator.getitem](args = (%y, 0))
    %z : call_function[target=torch._C._nn.linear](args = (%a, %weight, None))

Output::

    %l_x_ : placeholder[target=L_x_]
    %chunk : call_function[target=aten.chunk.default](args = (%l_x_, 2, -1))
    %getitem : call_function[target=operator.getitem](args = (%chunk, 0))
    %linear : call_function[target=aten.linear.default](args = (%getitem, %weight))

Afterwards every node is a placeholder, a ``get_attr``, a call of an operator overload (or ``getitem``, or arithmetic on
sizes) or an *island* (the fact ``island`` says why it was not opened); its value needs no context: casts are explicit,
``no_grad`` regions depend on detached values only.  ``meta["val"]`` is the value as a fake tensor of the compilation's
fake mode, and that of a placeholder says whether it requires grad.

In-place operators are still there: *functionalize* takes them away.
"""

from __future__ import annotations

import operator
from collections import ChainMap, Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fxsp import torch_internals
from fxsp.errors import RunsWhole, UnsupportedError
from fxsp.passes.base import Pass, Program
from fxsp.passes.graph import mark
from fxsp.passes.normalize.autocast import AutocastState, ExplicitAutocast
from fxsp.passes.normalize.fast_paths import FAST_PATHS
from fxsp.passes.normalize.islands import enclose_functorch
from fxsp.passes.normalize.restride import restride
from fxsp.passes.normalize.retrace import Retracer, describe
from fxsp.passes.normalize.subclasses import holds_subclass, mark_islands, refuse_unrecorded, see_through
from fxsp.source import is_of_module
from fxsp.torch_internals import is_wrapper_subclass

__all__ = ["Normalize", "normalize"]


class Normalize(Pass):
    """After this pass the graph consists of ATen operators; what cannot be traced runs whole."""

    def apply(self, program: Program) -> Program:
        inputs, program.inputs = program.inputs, ()
        sources = [torch_internals.input_source(node) for node in program.graph.find_nodes(op="placeholder")]
        try:
            program.gm = normalize(program.gm, inputs, spelled=program.inferring, split=program.arrivals)
        except UnsupportedError as error:
            raise RunsWhole(str(error)) from error
        for node, value, source in zip(program.graph.find_nodes(op="placeholder"), inputs, sources, strict=True):
            is_parameter = isinstance(value, torch.nn.Parameter)
            mark(node, is_parameter=is_parameter, is_state=is_parameter or is_of_module(source))
        return program


def normalize(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], *, spelled: bool = False, split: Collection[int] = ()
) -> torch.fx.GraphModule:
    """``gm`` re-traced to ATen; same inputs, same outputs, in the same order.

    ``spelled``: nodes are marked with the nodes of ``gm`` whose value they are.  ``split``: of these inputs Dynamo had
    split values, and did not see what shares memory with them.

    ``example_inputs`` are what Dynamo gives a backend (real tensors and symbolic ints), or fakes.  Grad mode and
    autocast have to be as they will be when the graph runs; the result must be compiled and run with autocast off.

    Raises :class:`UnsupportedError` if an operation cannot be traced, or if an output's facts (dtype, shape, strides,
    requires_grad, aliasing) differ from those that Dynamo recorded.
    """
    mode = torch_internals.compile_fake_mode(example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = [_input(p, v, mode) for p, v in zip(placeholders, example_inputs, strict=True)]
    outputs: list[Any] = []

    with AutocastState() as autocast:
        tracer = Retracer(enclose_functorch(gm), mode, autocast, spelled=spelled)
        seen_through = torch_internals.operators_first(see_through) if holds_subclass(values) else nullcontext()

        def run(*inputs: Any) -> Any:
            for subclass in filter(is_wrapper_subclass, inputs):
                torch_internals.record_inner(subclass)
            with seen_through:
                result = tracer.run(*inputs)
            outputs.extend(tree_leaves(result))
            refuse_unrecorded(outputs)
            return result

        inputs = _stand_ins(values, mode)
        # The value of a placeholder shares storage with what is traced, but nothing else: that may yet be written to.
        values = [_fresh(v) if v is not old else v for v, old in zip(inputs, values, strict=True)]
        new = torch_internals.retrace(run, inputs, mode, ChainMap(dict(FAST_PATHS), ExplicitAutocast()))  # type: ignore[arg-type]

    for before, after, value in zip(placeholders, new.graph.find_nodes(op="placeholder"), values, strict=True):
        after.target = before.target
        torch_internals.rename_node(after, before.name)
        after.meta["val"] = value
    for node in new.graph.find_nodes(op="get_attr"):
        if torch_internals.fake_mode_of(getattr(new, str(node.target))) is not None:
            raise UnsupportedError(f"{describe(node)} is a value of the program that tracing took for a constant")
    for node in new.graph.nodes:
        if node.target is torch.ops.aten.cat.default:
            _drop_empty(node)
    mark_islands(new.graph)
    torch_internals.carry_dynamo_facts(gm, new)
    _restride(gm, new, mode, inputs, outputs, tracer.storage_of)
    new.recompile()
    _compare(gm, inputs, outputs, tracer.storage_of, {f"input {position}" for position in split})
    return new


def _drop_empty(node: torch.fx.Node) -> None:
    """``cat`` takes tensors of shape ``[0]`` beside any others and ignores them (a key/value cache begins so)."""
    operands = list(node.args[0])  # type: ignore[arg-type]
    kept = [n for n in operands if not _is_empty(n.meta.get("val"))]
    dtype = node.meta["val"].dtype
    if 0 < len(kept) < len(operands) and all(n.meta["val"].dtype == dtype for n in kept):
        node.args = (kept, *node.args[1:])


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 1 and isinstance(n := value.shape[0], int) and n == 0


def _input(placeholder: torch.fx.Node, value: Any, mode: Any) -> Any:
    symbol = placeholder.meta.get("example_value")
    if isinstance(symbol, torch.SymInt) and isinstance(value, int):
        return symbol
    return torch_internals.to_fake(value, mode)


def _stand_ins(values: list[Any], mode: Any) -> list[Any]:
    """Inputs for the trace: writes to them change neither the shape nor the history of the compilation's own fakes."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    owners = Counter(map(torch_internals.storage_key, tensors))
    with mode, torch.enable_grad():
        return [_stand_in(v, owners) if isinstance(v, torch.Tensor) else v for v in values]


def _stand_in(value: torch.Tensor, owners: Mapping[int, int]) -> torch.Tensor:
    if torch_internals.remembers_item(value):
        return value
    if value.is_leaf or owners[torch_internals.storage_key(value)] > 1:
        return _fresh(value)
    # An input with a history may be written to in place, a leaf that requires grad may not.
    return _fresh(value).clone()


def _fresh(value: torch.Tensor) -> torch.Tensor:
    """The same memory, and no history."""
    return value.detach().requires_grad_(value.requires_grad)


def _recorded(value: Any) -> Any:
    """What Dynamo recorded of a node; a constant is itself."""
    return value.meta.get("example_value", value.meta.get("val")) if isinstance(value, torch.fx.Node) else value


def _compare(
    gm: torch.fx.GraphModule,
    inputs: list[Any],
    outputs: list[Any],
    storage_of: Callable[[torch.Tensor], int],
    unseen: Collection[str],
) -> None:
    """Outputs must have the facts that Dynamo recorded; values of the two fake modes never meet.

    What shares memory with inputs that are ``unseen`` was not recorded.
    """
    nodes = tree_leaves(gm.graph.output_node().args[0])
    expected = list(map(_recorded, nodes))
    for index, (node, want, found) in enumerate(zip(nodes, expected, outputs, strict=True)):
        if want is None and isinstance(node, torch.fx.Node):
            continue  # Dynamo recorded nothing
        if found is None and _is_left_out(node, want):
            continue
        for fact, a, b in _differences(want, found):
            where = describe(node) if isinstance(node, torch.fx.Node) else repr(node)
            raise UnsupportedError(
                f"output {index}, {where}: traced to ATen operators its {fact} is {b}, but Dynamo recorded {a}"
            )
    before = list(map(_recorded, gm.graph.find_nodes(op="placeholder")))
    want_alias, found_alias = _aliases(before, expected), _aliases(inputs, outputs, storage_of)
    for index, (a, b) in enumerate(zip(want_alias, found_alias, strict=True)):
        if a != b and b not in unseen and None not in (expected[index], outputs[index]):
            raise UnsupportedError(
                f"output {index} shares memory with {b or 'nothing'} when traced to ATen operators, "
                f"but with {a or 'nothing'} as Dynamo recorded it"
            )


def _is_left_out(node: Any, want: Any) -> bool:
    """Whether an operator did not compute this result: it is ``None``, for which fake kernels return no elements."""
    return isinstance(node, torch.fx.Node) and node.target is operator.getitem and _is_empty(want)


def _restride(
    gm: torch.fx.GraphModule,
    new: torch.fx.GraphModule,
    mode: Any,
    inputs: list[Any],
    outputs: list[Any],
    storage_of: Callable[[torch.Tensor], int],
) -> None:
    """Outputs that differ from what Dynamo recorded by their strides alone are laid in memory as recorded."""
    expected = map(_recorded, tree_leaves(gm.graph.output_node().args[0]))
    aliases = _aliases(inputs, outputs, storage_of)
    shared = {storage_of(v) for v, owner in zip(outputs, aliases, strict=True) if owner and isinstance(v, torch.Tensor)}
    for index, (want, found) in enumerate(zip(expected, outputs, strict=True)):
        if [fact for fact, _, _ in _differences(want, found)] == ["strides"] and storage_of(found) not in shared:
            laid = restride(new, mode, index, want, _same)
            if laid is not None:
                outputs[index] = laid.requires_grad_(found.requires_grad)


def _differences(want: Any, found: Any) -> list[tuple[str, Any, Any]]:
    """The facts of two values that are not the same."""
    facts: list[tuple[str, Any, Any]]
    if isinstance(want, torch.Tensor) and isinstance(found, torch.Tensor):
        facts = [
            ("dtype", want.dtype, found.dtype),
            ("device", want.device, found.device),
            ("shape", tuple(want.shape), tuple(found.shape)),
            ("requires_grad", want.requires_grad, found.requires_grad),
        ]
        if want.layout == found.layout == torch.strided:
            facts.append(("strides", tuple(want.stride()), tuple(found.stride())))
    else:
        a, b = ("tensor" if isinstance(v, torch.Tensor) else "number" for v in (want, found))
        facts = [("kind", a, b)]
    return [(fact, a, b) for fact, a, b in facts if not _same(a, b)]


def _same(a: Any, b: Any) -> bool:
    """Equality that adds no guard: symbolic sizes are compared by their expressions, else by their hints."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return torch_internals.same_size(a, b)
    return bool(a == b)


def _aliases(
    inputs: list[Any],
    outputs: list[Any],
    storage_of: Callable[[torch.Tensor], int] = torch_internals.storage_key,
) -> list[str]:
    """For each output the first input or earlier output with the same storage, ``""`` for none."""
    owners: dict[Any, str] = {None: ""}  # None: no tensor
    found: list[str] = []
    for kind, values in (("input", inputs), ("output", outputs)):
        found = []
        for index, value in enumerate(values):
            key = storage_of(value) if isinstance(value, torch.Tensor) else None
            found.append(owners.get(key, ""))
            owners.setdefault(key, f"{kind} {index}")
    return found
