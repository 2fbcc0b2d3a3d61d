"""Islands: parts of Dynamo's graph that *normalize* must not look into.

A custom ``autograd.Function``, control flow, a vmap: traced through, they would lose their meaning (a blind trace drops
the backward of a custom function).  They stay one node, the fact ``island`` says why, and they run whole on every rank.

Higher-order operators are one node already.  A functorch transform is a stretch of nodes between a call that opens a
level and the call that closes it; :func:`enclose_functorch` makes each stretch one call.

Input::

    %open = call_function[target=_vmap_increment_nesting](args = (3, error))
    %b = call_function[target=_add_batch_dim](args = (%x, 0, 1))
    %c = call_method[target=sin](args = (%b,))
    %d = call_function[target=_remove_batch_dim](args = (%c, 1, 3, 0))
    %close = call_function[target=_vmap_decrement_nesting]()

Output::

    %functorch = get_attr[target=functorch]
    %wrap = call_function[target=torch.ops.higher_order.wrap](args = (%functorch, %x))
    %d = call_function[target=operator.getitem](args = (%wrap, 0))
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from fxsp import torch_internals

__all__ = ["INLINED", "closed_nodes", "enclose_functorch", "is_functorch_island"]

#: Higher-order operators that only wrap a body, by name: the body is traced in their place.
INLINED = frozenset({"tag_activation_checkpoint", "wrap", "invoke_subgraph"})


#: How the body of an enclosed functorch transform is known.
_CLASS_NAME = "FunctorchTransform"


def is_functorch_island(args: Sequence[Any]) -> bool:
    """Whether these are the arguments of a call that :func:`enclose_functorch` made."""
    return bool(args) and type(args[0]).__name__ == _CLASS_NAME


def closed_nodes(gm: torch.fx.GraphModule) -> dict[torch.fx.Node, str]:
    """The nodes of Dynamo's graph, and of the bodies of its higher-order operators, that are in islands, with what the
    island is.
    """
    found = {n: "a functorch transform" for stretch in _stretches(gm.graph) for n in stretch}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not torch_internals.is_higher_order(node.target):
            continue
        name = node.target.name()
        for argument in node.all_input_nodes:
            body = getattr(gm, str(argument.target), None) if argument.op == "get_attr" else None
            if isinstance(body, torch.fx.GraphModule):
                inside = closed_nodes(body)
                everything = {} if name in INLINED else dict.fromkeys(body.graph.nodes, f"higher-order operator {name}")
                found.update({**everything, **inside})
    return found


def enclose_functorch(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``gm`` itself if no functorch transform is in it, else a copy with each outermost one as a call."""
    if not any(torch_internals.functorch_depth_change(n.target) for n in gm.graph.nodes if n.op == "call_function"):
        return gm
    copy = torch.fx.GraphModule(gm, deepcopy(gm.graph))  # with the modules and constants that the graph refers to
    copy.meta.update(gm.meta)
    for stretch in _stretches(copy.graph):
        _enclose(copy, stretch)
    copy.graph.lint()
    return copy


def _stretches(graph: torch.fx.Graph) -> list[list[torch.fx.Node]]:
    """The outermost stretches of functorch transforms, in order.

    The function that ``torch.func.vjp`` returns differentiates after its level is closed: a stretch goes on to that.
    """
    found: list[list[torch.fx.Node]] = []
    inside: set[torch.fx.Node] = set()
    depth = 0
    for node in graph.nodes:
        change = torch_internals.functorch_depth_change(node.target) if node.op == "call_function" else 0
        if node in inside:
            pass
        elif change > 0 and depth == 0:
            found.append([node])
            inside.add(node)
        elif depth > 0:
            found[-1].append(node)
            inside.add(node)
        elif torch_internals.is_functorch_gradient(node.target) and not inside.isdisjoint(node.all_input_nodes):
            first = next(i for i, stretch in enumerate(found) if not set(stretch).isdisjoint(node.all_input_nodes))
            # It returns a tuple; a result of an island is a tensor.
            *_, last = node, *(user for user in node.users if user.target is operator.getitem)
            found[first:] = [_up_to(last, found[first][0])]
            inside.update(found[first])
        depth += change
    return found


def _up_to(last: torch.fx.Node, first: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes from ``first`` to ``last``, both included, without constants."""
    nodes = [last]
    while nodes[-1] is not first:
        nodes.append(nodes[-1].prev)
    return [node for node in reversed(nodes) if node.op != "get_attr"]


def _enclose(gm: torch.fx.GraphModule, stretch: list[torch.fx.Node]) -> None:
    inside = set(stretch)
    inputs = list(
        dict.fromkeys(a for n in stretch for a in n.all_input_nodes if a not in inside and a.op != "get_attr")
    )
    results = [n for n in stretch if any(u not in inside for u in n.users)]

    body = torch.fx.Graph()
    new: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in inputs:
        new[node] = body.placeholder(node.name)
    for node in stretch:
        for attribute in node.all_input_nodes:
            if attribute.op == "get_attr" and attribute not in new:
                new[attribute] = body.node_copy(attribute)
        new[node] = body.node_copy(node, new.__getitem__)
    body.output(tuple(new[n] for n in results))

    module = torch.fx.GraphModule(gm, body, class_name=_CLASS_NAME)
    name = torch_internals.add_module(gm, "functorch", module)
    with gm.graph.inserting_after(stretch[-1]):
        body_node = gm.graph.get_attr(name)
    with gm.graph.inserting_after(body_node):
        call = gm.graph.call_function(torch_internals.wrap_operator(), (body_node, *inputs))
    # The calls that open and close a level have no source line; what is computed between them does.
    telling = next((n for n in reversed(stretch) if n.meta.get("stack_trace")), stretch[-1])
    call.meta.update({k: v for k, v in telling.meta.items() if k != "example_value"})
    previous = call
    for index, node in enumerate(results):
        with gm.graph.inserting_after(previous):
            previous = gm.graph.call_function(operator.getitem, (call, index))
        previous.meta = dict(node.meta)
        node.replace_all_uses_with(previous, delete_user_cb=lambda user: user not in inside)
    for node in reversed(stretch):
        gm.graph.erase_node(node)
