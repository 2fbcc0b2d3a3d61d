"""The inner compilers: what runs the partitioned graph on each rank.

``inductor``
    Inductor, with *emit* as passes of this compile alone.
``aot_eager``
    AOTAutograd, *emit*, and then one ATen call after the other.  No code generation: for tests, and to tell a wrong
    graph from a wrong kernel.
``eager``
    The graph, one call after the other, autograd as in eager code.  For inference, *emit* comes first.
a function
    Any other backend, as Dynamo would call it, on the graph of ``eager``; if that is Inductor, with *emit* as above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, GraphModule

from fxsp.config import INNERS
from fxsp.errors import OptionError
from fxsp.inspection.profiler_names import name_collectives
from fxsp.kernels.ops import as_view, op_of
from fxsp.passes.emit.emit import drop_identities, emit, fingerprint
from fxsp.torch_internals import (
    aot_autograd,
    boxed,
    graph_pass,
    inductor,
    inductor_decompositions,
    inductor_settings,
    known_settings,
    mode_patches,
)

__all__ = ["compile_inner", "needs_values"]

#: A backend of ``torch.compile``.
Compiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]

#: Graphs may differ by rank after emit (a rank without pads needs no index arithmetic), and a reordering that looks at
#: costs could then put the collectives of two ranks in different orders: a deadlock.  Inductor by itself keeps the
#: order of the graph; these, all off unless someone turned them on, would not.
SAFE_ORDER: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": False,
    "aten_distributed_optimizations.enable_overlap_scheduling": False,
    "_micro_pipeline_tp": False,
    "_fuse_ddp_communication": False,
    "bucket_all_gathers_fx": "none",
    "bucket_reduce_scatters_fx": "none",
    "bucket_all_reduces_fx": "none",
}


def compile_inner(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    inner: str | Compiler = "inductor",
    mode: str | None = None,
    training: bool = False,
) -> Callable[..., Any]:
    """``gm``, a graph of ATen and fxsp ops, as a function of its inputs.  ``gm`` may be edited in place.

    ``mode`` is that of ``torch.compile``, for Inductor.  ``training``: gradients may be asked for.
    Raises :class:`OptionError` for an unknown ``inner``.
    """
    if callable(inner):
        settings = inductor_settings(inner)
        if settings is not None:
            return inductor(gm, example_inputs, {**settings, **inductor_patches()})
        _eager(gm, training)
        return inner(gm, example_inputs)
    if inner == "inductor":
        return inductor(gm, example_inputs, inductor_patches(mode))
    if inner == "aot_eager":
        return aot_autograd(gm, example_inputs, _run_emitted, drop_identities)
    if inner == "eager":
        return _eager(gm, training)
    raise OptionError(f"inner={inner!r} is not known; valid are {', '.join(map(repr, INNERS))}")


def needs_values(inner: str | Compiler) -> bool:
    """Whether the nodes of the graph must have local fakes; who runs AOTAutograd traces it once more."""
    return inner == "eager" or (callable(inner) and inductor_settings(inner) is None)


def inductor_patches(mode: str | None = None) -> dict[str, Any]:
    """The settings of Inductor for one compile of a partitioned graph."""
    uuid = fingerprint()

    def emit_for_inductor(graph: Graph) -> None:
        emit(graph, decompositions=inductor_decompositions())

    return {
        **mode_patches(mode),
        **known_settings(SAFE_ORDER),
        "joint_custom_pre_pass": graph_pass(drop_identities, f"fxsp drop_identities {uuid}"),
        "post_grad_custom_pre_pass": graph_pass(emit_for_inductor, f"fxsp emit {uuid}"),
    }


def _run_emitted(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    emit(gm.graph)
    name_collectives(gm.graph)
    return boxed(gm)


def _has_values(gm: GraphModule) -> bool:
    """Whether emit finds the fakes that it needs."""
    return all("val" in x.meta for node in gm.graph.nodes if op_of(node) for x in node.all_input_nodes)


def _eager(gm: GraphModule, training: bool) -> Callable[..., Any]:
    if not training and _has_values(gm):
        emit(gm.graph)
    for node in gm.graph.nodes:
        if (op := op_of(node)) is not None and op.is_identity:
            node.target, node.args = as_view, (op.name, *node.args)
    name_collectives(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm.forward
