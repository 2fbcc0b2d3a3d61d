"""Regions that are compiled once (``torch.compiler.nested_compile_region``) as plain calls of their bodies.

A graph that is not re-traced may have to run as it stands: as the reference of a verification, by the inner
``"eager"``, whole in training.  ``invoke_subgraph`` has no derivative outside of a compilation, and under Inductor of
torch 2.13 the gradients of a model with two kinds of regions were found to be wrong.

Input::

    %body = get_attr[target=subgraph_0]
    %invoke_subgraph = call_function[target=invoke_subgraph](args = (%body, subgraph_0, %x))

Output::

    %call = call_module[target=subgraph_0](args = (%x))

Where *normalize* opens them, they are inlined (:mod:`fxsp.passes.normalize.islands`).
"""

from __future__ import annotations

from copy import deepcopy

from torch.fx import GraphModule, Node

from fxsp import torch_internals

__all__ = ["open_regions"]


def open_regions(gm: GraphModule) -> GraphModule:
    """``gm`` itself if no region is in it, else a copy in which bodies are called."""
    bodies = {name: open_regions(body) for name, body in gm.named_children() if isinstance(body, GraphModule)}
    changed = any(body is not getattr(gm, name) for name, body in bodies.items())
    if not changed and not any(_is_region(node) for node in gm.graph.nodes):
        return gm
    copy = GraphModule(gm, deepcopy(gm.graph))
    copy.meta.update(gm.meta)
    for name, body in bodies.items():
        setattr(copy, name, body)
    graph = copy.graph
    for node in list(graph.nodes):
        if not _is_region(node):
            continue
        body, _, *operands = node.args
        assert isinstance(body, Node)
        with graph.inserting_before(node):
            call = graph.call_module(str(body.target), tuple(operands))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)
    graph.lint()
    copy.recompile()
    return copy


def _is_region(node: Node) -> bool:
    if node.op != "call_function" or not torch_internals.is_higher_order(node.target):
        return False
    return bool(node.target.name() == "invoke_subgraph") and isinstance(node.args[0], Node)  # type: ignore[union-attr]
