"""Collectives by name in a profiler's trace: ``all_to_all_single blocks.0.attn (model.py:12)``.

Where the graph runs one call after the other (inner ``eager`` and ``aot_eager``), each collective runs inside a
``torch.profiler.record_function`` that says what it is, for which module, and whether it belongs to the backward pass.
Under Inductor the calls are in generated code, without names: there the collectives of a trace come in the order of the
graph, that of ``report.collectives``, and ``TORCH_LOGS=output_code`` shows each with the nodes it was made from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from fxsp.kernels.ops import op_of
from fxsp.source import module_path, node_source
from fxsp.torch_internals import is_operator, schema

__all__ = ["name_collectives", "named_collective"]


def named_collective(label: str, namespace: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Run a collective under a name."""
    with torch.profiler.record_function(label):
        return getattr(getattr(torch.ops, namespace), name)(*args, **kwargs)


def name_collectives(graph: Graph) -> None:
    """Every collective of a graph that is run as it stands runs under its name from now on; in place."""
    for node in graph.nodes:
        if node.op != "call_function" or not is_operator(node.target):
            continue
        namespace, _, name = schema(node.target).name.partition("::")
        ours = (op := op_of(node)) is not None and op.sends is not None
        if name == "wait_tensor" or not (namespace == "_c10d_functional" or ours):
            continue
        place = module_path(node) or "root"
        line = f" ({node_source(node)})" if node_source(node) else ""
        backward = " backward" if node.meta.get("autograd_backward") else ""
        node.args = (f"{name} {place}{line}{backward}", namespace, name, *node.args)
        node.target = named_collective
