from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import models
from capturing import Traced, compiled, names, trace
from fxsp.capture.capture import capture
from fxsp.errors import PlanError
from fxsp.plan import SequenceParallelInput, SequenceParallelOutput
from fxsp.torch_internals import Opaque

PLAN = {"blocks.0": {"x": SequenceParallelInput(1)}, "out": SequenceParallelOutput(1)}
X = torch.randn(2, 5, 4)
ROT = (torch.randn(5, 1), torch.randn(4))


class Block(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.broken = broken

    def forward(self, x: torch.Tensor, rot: Any = None, scale: int = 2) -> torch.Tensor:
        y = self.linear(x)
        if self.broken:
            torch._dynamo.graph_break()
        return y if rot is None else y * rot[0] + rot[1] * scale


class Model(nn.Module):
    def __init__(self, broken: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(broken), Block(broken)])
        self.out = nn.Linear(4, 4)
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor, rot: Any = None) -> torch.Tensor:
        x = torch.relu(x)
        for block in self.blocks:
            x = checkpoint(block, x, rot, use_reentrant=False) if self.checkpointed else block(x, rot=rot)
        return self.out(x)


def one(log: list[Traced]) -> Traced:
    (traced,) = log
    return traced


# --- bindings


def test_a_call_has_its_arguments_outputs_and_region() -> None:
    traced = one(trace(Model(), X, ROT, plan=PLAN))
    nodes = {node.name: node for node in traced.gm.graph.nodes}
    first, second = traced.call("blocks.0"), traced.call("blocks.1")
    assert names(first.arguments) == {"x": "x", "rot": ("l_rot_0_", "l_rot_1_")}
    assert nodes["x"].target is torch.relu
    assert second.arguments["x"] is first.outputs
    assert [node.op for node in first.region()] == ["call_function"] * len(first.region())
    assert not set(first.region()) & set(second.region())
    assert set(traced.call("blocks.0.linear").region()) < set(first.region())
    assert first.outputs in first.region()
    assert nodes["x"] not in first.region()
    assert [call.paths for call in traced.capture.calls] == [
        ("",),
        ("blocks.0",),
        ("blocks.0.linear",),
        ("blocks.1",),
        ("blocks.1.linear",),
        ("out",),
    ]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_frame_is_a_call_of_the_root(grad: bool, dynamic: bool) -> None:
    with torch.set_grad_enabled(grad):
        traced = one(trace(Model(), X, rot=ROT, plan=PLAN, options={"dynamic": dynamic}))
    root = traced.call("")
    assert names(root.arguments) == {"x": "l_x_", "rot": ("l_rot_0_", "l_rot_1_")}
    assert root.outputs is traced.call("out").outputs
    rest = [node for node in root.graph.nodes if node not in root.region() and node.op not in ("placeholder", "output")]
    assert [node.args[1] for node in rest] == ["gather"]  # the annotation of the output follows the call
    assert traced.capture.root is root.module


def test_arguments_left_out_or_unused() -> None:
    class Unused(Model):
        def forward(self, x: torch.Tensor, rot: Any = None, number: int = 3, extra: Any = None) -> torch.Tensor:
            return self.out(self.blocks[0](x, None, 5))

    traced = one(trace(Unused(), X, None, 7, extra=X + 1, plan=PLAN))
    assert names(traced.call("blocks.0").arguments) == {"x": "l_x_", "rot": None, "scale": 5}
    root = traced.call("").arguments
    assert root["rot"] is None
    assert root["extra"] == Opaque("not used by the traced code")
    # No guard stands for a number that nothing reads: it may be another one in the next call.
    assert root["number"] == Opaque("not used by the traced code")


def _names_self(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


def _names_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers' `deprecate_kwarg` does."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("decorated", [_names_self, _names_nothing])
def test_decorated_forwards_bind_to_the_undecorated_signature(decorated: Callable[..., Any]) -> None:
    class Decorated(Model):
        @decorated
        @decorated
        def forward(self, x: torch.Tensor, rot: Any = None) -> torch.Tensor:
            return self.out(self.blocks[0](rot=rot, x=x))

    for traced in (
        one(trace(Decorated(), X, ROT, plan=PLAN)),
        one(trace(Decorated(), rot=ROT, x=X, plan=PLAN)),
    ):
        root, block = traced.call("").arguments, traced.call("blocks.0").arguments
        assert root.keys() == {"x", "rot"}
        assert root["x"] is block["x"]
        assert root["rot"] == block["rot"]
        assert isinstance(root["x"], torch.fx.Node)


def test_a_module_called_twice_and_two_of_one_kind() -> None:
    class Twice(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.blocks[1](self.blocks[0](self.blocks[0](x))))

    traced = one(trace(Twice(), X, plan=PLAN))
    first, second = traced.capture.calls_of(traced.capture.root.blocks[0])  # type: ignore[union-attr, index, arg-type]
    assert second.arguments["x"] is first.outputs
    assert traced.call("blocks.1").arguments["x"] is second.outputs


def test_one_tensor_passed_twice() -> None:
    class Both(Model):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.out(self.blocks[0](x) + y)

    root = one(trace(Both(), X, X, plan=PLAN)).call("")
    assert root.arguments["x"] is root.arguments["y"]


def test_lists_are_read_before_the_call_changes_them() -> None:
    class Pops(nn.Module):
        def forward(self, items: list[torch.Tensor]) -> torch.Tensor:
            return items.pop() * 2

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pops = Pops()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pops([x + 1, x + 2])

    call = one(trace(Holder(), X, plan={"": {"x": SequenceParallelInput(1)}})).call("pops")
    assert len(call.arguments["items"]) == 2


def test_bodies_of_checkpoints_have_their_own_graph() -> None:
    x = X.clone().requires_grad_()
    traced = one(trace(Model(checkpointed=True), x, ROT, plan=PLAN))
    call = traced.call("blocks.0")
    assert call.graph is not traced.gm.graph
    assert all(
        node.graph is call.graph and node.op == "placeholder" for node in [call.arguments["x"], *call.arguments["rot"]]
    )
    assert call.outputs.graph is call.graph
    assert [name for name, *_ in traced.annotations()] == ["out", "blocks.0[x]"]


def test_hooks_belong_to_the_call() -> None:
    model = Model()
    model.register_forward_pre_hook(lambda module, args: None)
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    traced = one(trace(model, X, plan=PLAN))
    assert traced.call("blocks.0").outputs.target is not torch._C._nn.linear
    assert names(traced.call("").arguments) == {"x": "l_x_", "rot": None}


# --- which module the plan belongs to


def test_the_root_is_found_below_functions_and_wrappers() -> None:
    model = Model()

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x, rot=ROT).pow(2).mean()

    for log in (
        trace(lambda x: model(x, ROT).sum(), X, plan=PLAN),
        trace(step, model, X, plan=PLAN),
        trace(Wrapper(model), X, rot=ROT, plan=PLAN),
        trace(Wrapper(torch.compile(model, backend="eager")), X, ROT, plan=PLAN),
    ):
        traced = one(log)
        assert traced.capture.root is model
        assert traced.call("").arguments.keys() == {"x", "rot"}
        assert all(record.applied for record in traced.records)


def test_the_models_own_plan_is_used_without_an_option() -> None:
    class Owner(Model):
        _sp_plan = PLAN

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Owner(), Owner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    assert one(trace(Model(), X)).capture.entries is None
    assert [e.pattern for e in one(trace(Owner(), X)).capture.entries or ()] == ["blocks.0", "out"]
    pair = one(trace(Pair(), X)).capture
    assert pair.root is not None
    assert pair.notes == ["the plan of Owner is not used: one graph follows one plan"]


def test_checkpoint_wrappers_are_seen_through() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Model()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    traced = one(trace(model, X.clone().requires_grad_(), ROT, plan=PLAN))
    assert isinstance(traced.call("blocks.0").module, Block)
    assert all(record.applied for record in traced.records)


@torch.no_grad()
def test_after_a_graph_break_the_root_is_remembered() -> None:
    first = trace(Model(broken=True), X, plan=PLAN)[0]
    assert isinstance(first.capture.root, Model)  # the frame is a block's
    assert [(r.entry.split(":")[0], r.applied) for r in first.records] == [("blocks.0[x]", True), ("out", False)]
    assert "module was not called in this graph" in first.records[1].detail
    assert "a part of Model only" in first.capture.notes[0]
    assert first.call("blocks.0").outputs == Opaque("the graph ends in a graph break, before the module returns")


@torch.no_grad()
def test_a_resumed_frame_says_what_is_missing() -> None:
    class Resumed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.out(x)

    first, second = trace(Resumed(), X, plan=PLAN | {"": {"x": SequenceParallelInput(1)}})
    assert first.call("").outputs == Opaque("the graph ends in a graph break, before the module returns")
    assert [r.applied for r in first.records] == [True, False, True]
    assert second.capture.root is first.capture.root
    assert [r.applied for r in second.records] == [False, True, False]
    assert "goes on after a graph break" in second.capture.notes[0]
    assert "the model's own call is not in this graph" in second.records[2].detail


def test_two_compilations_do_not_share_roots() -> None:
    model = Model()
    trace(model, X, plan=PLAN)
    plan = {"": {"x": SequenceParallelInput(1)}}
    assert one(trace(model.blocks[0], X, plan=plan)).capture.root is model.blocks[0]


def test_a_plan_that_fits_no_module_is_an_error() -> None:
    plan = {"blocks.0": {"y": SequenceParallelInput(1)}, "out": SequenceParallelOutput(1)}
    fast, _ = compiled(lambda model, x: model(x), plan)
    with pytest.raises(Exception, match=r"Block.forward has no argument \"y\"") as error:
        fast(Model(), X)
    assert isinstance(error.value.__cause__ or error.value.inner_exception, PlanError)  # type: ignore[attr-defined]


def test_a_graph_of_no_module_compiles_unsharded() -> None:
    traced = one(trace(lambda x: x.sin(), X, plan=PLAN))
    assert traced.capture.root is None
    assert not any(record.applied for record in traced.records)
    assert "no module is called" in traced.records[0].detail


def test_outside_of_dynamo_nothing_is_known() -> None:
    found = capture(torch.fx.symbolic_trace(Model().out), PLAN)
    assert found.root is None
    assert "not made by torch.compile" in found.notes[0]
    assert len(found.entries or ()) == 2


# --- what stays behind


def test_other_backends_are_not_observed_and_nothing_is_kept() -> None:
    model = Model()
    trace(model, X, plan=PLAN)
    fast, log = compiled(model, PLAN)
    fast(X)
    seen: list[Any] = []

    def other(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(capture(gm, PLAN))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=other)(X)
    assert [len(call.paths) for call in seen[0].calls] == [1]  # the frame itself; no module call was recorded
    ref = weakref.ref(log[0].capture.calls[0])
    log.clear()
    gc.collect()
    assert ref() is None


# --- real models


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("flux", True), ("flux2", False), ("wan", False), ("qwen_image_mask", False), ("llama", False), ("llama", True)],
)
def test_real_models(name: str, dynamic: bool) -> None:
    model, inputs = models.MODELS[name]()
    plan: Any = None
    if name == "llama":
        both = [SequenceParallelInput(1), SequenceParallelInput(1)]
        plan = {
            "model.layers.0": {"hidden_states": SequenceParallelInput(1), "position_embeddings": both},
            "lm_head": SequenceParallelOutput(1),
        }
    fast, log = compiled(model, plan, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        expected = models.first_tensor(model(**inputs))
        torch.testing.assert_close(models.first_tensor(fast(**inputs)), expected)
    traced = one(log)
    found = {record.entry.split(":")[0]: record.applied for record in traced.records}
    root = traced.call("")
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert isinstance(root.arguments[key], torch.fx.Node), key
            assert tuple(root.arguments[key].meta["example_value"].shape) or value.ndim == 0
    if name == "flux":
        assert all(found.values())
        block = traced.call("transformer_blocks.0")
        assert block.arguments["temb"] is traced.call("time_text_embed").outputs
        assert block.arguments["image_rotary_emb"] == traced.call("pos_embed").outputs
        assert block.arguments["hidden_states"] is traced.call("x_embedder").outputs
        following = traced.call("single_transformer_blocks.0").arguments
        assert (following["encoder_hidden_states"], following["hidden_states"]) == block.outputs
    elif name == "flux2":
        assert len([call for call in traced.capture.calls if "pos_embed" in call.paths]) == 2
        assert found["<root>[hidden_states]"]
        assert found["proj_out"]
    elif name == "wan":
        assert found == {
            "rope[0]": True,
            "rope[1]": True,
            "blocks.0[hidden_states]": True,
            "proj_out": True,
            "<root>[timestep]": False,
        }
        assert traced.call("blocks.0").arguments["rotary_emb"] == traced.call("rope").outputs
    elif name == "qwen_image_mask":
        assert [key for key, applied in found.items() if not applied] == ["transformer_blocks.0[modulate_index]"]
    else:
        assert all(found.values())
        assert names(root.outputs) == {"logits": names(traced.call("lm_head").outputs)}
        layer = traced.call("model.layers.0")
        assert layer.arguments["hidden_states"] is traced.call("model.embed_tokens").outputs
        assert layer.arguments["position_embeddings"] == traced.call("model.rotary_emb").outputs
