"""Inductor and AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxsp.torch_internals.recompiles import backend_layers


def inductor_modes() -> tuple[str, ...]:
    """The modes of ``torch.compile(mode=...)`` that Inductor knows."""
    try:
        from torch._inductor import list_mode_options
    except ImportError:  # the list moved: these have been there since the first release
        return ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    return tuple(dict.fromkeys(("default", *list_mode_options())))


def graph_pass(run: Callable[[torch.fx.Graph], None], uuid: str) -> Any:
    """``run`` as a pass for Inductor's configuration; ``uuid`` names its behaviour in the keys of Inductor's caches."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class FxspPass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> str:
            return uuid

    return FxspPass()


def mode_patches(mode: str | None) -> dict[str, Any]:
    """The settings of Inductor that ``torch.compile(mode=...)`` stands for."""
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return list_mode_options(mode)


def known_settings(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``patches`` that this version of Inductor has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {name: value for name, value in patches.items() if name in known}


def inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile with Inductor, with settings for this compile only."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, inputs, config_patches=dict(patches))
    return compiled  # type: ignore[no-any-return]


def inductor_settings(compiler: Any) -> dict[str, Any] | None:
    """The settings with which ``torch.compile`` calls Inductor, if that is what it calls."""
    from torch import _TorchCompileInductorWrapper

    found = [layer for layer in backend_layers(compiler) if isinstance(layer, _TorchCompileInductorWrapper)]
    return dict(found[0].config) if found else None


def aot_autograd(
    gm: torch.fx.GraphModule,
    inputs: Sequence[Any],
    compiler: Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    joint: Callable[[torch.fx.Graph], None],
) -> Callable[..., Any]:
    """AOTAutograd around ``compiler`` (forward, backward and inference); ``joint`` edits joint graphs in place."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(graph: torch.fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        joint(graph.graph)
        graph.recompile()
        return min_cut_rematerialization_partition(graph, joint_inputs, **kwargs)

    return aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition, keep_inference_input_mutations=True
    )(gm, inputs)


def functionalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` traced without in-place operations; operators around Triton kernels become the kernels."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

    return dispatch_functionalize(function, FunctionalTensorMode())


def boxed(gm: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """The graph as a function of one list, which it empties: inputs are freed after their last use."""
    from torch.fx.graph import _BoxedCodeGen

    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()
    forward = gm.forward

    def run(args: list[Any]) -> Any:
        return forward(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
