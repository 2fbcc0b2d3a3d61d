"""*annotate*: where the annotations of a plan stand, and how long the text is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxsp.passes.annotate.annotate as module_under_test
from annotating import IN, OUT, Model, X, one, only_record, run
from capturing import ANNOTATE, compiled
from fxsp.plan import SequenceParallelPartialInput

# --- where annotations stand


def test_an_argument_is_replaced_within_the_call_only() -> None:
    class Reused(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.sin(x)
            a, b = self.two(h)
            return self.pair((a, b)) + h

    traced = run({"two": {"x": IN(-2)}}, model=Reused())
    ((where, value, kind, dim, text_len),) = traced.annotations()
    assert (where, kind, dim, text_len) == ("two[x]", "shard", 1, -1)
    assert value.target is torch.sin
    call = traced.call("two")
    (annotation,) = [node for node in traced.gm.graph.nodes if node.target is ANNOTATE]
    outside = [user for user in value.users if user is not annotation]
    assert len(outside) == 1
    assert not call.contains(outside[0])
    assert len(annotation.users) == 2
    assert all(call.contains(user) for user in annotation.users)
    assert annotation.meta["example_value"].shape == X.shape
    assert "stack_trace" in annotation.meta
    assert annotation.meta["nn_module_stack"].keys() == next(iter(annotation.users)).meta["nn_module_stack"].keys()
    assert only_record(traced) == (True, "[2, 5, 4] along 1")
    assert traced.records[0].entry == "two[x]: SequenceParallelInput(split_dim=-2)"
    assert annotation.args[4] == traced.records[0].entry


def test_an_output_is_replaced_everywhere_after_the_call() -> None:
    class Reused(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.two(x)
            return self.pair((a, b)) + b

    traced = run({"two": [None, OUT(1)]}, model=Reused())
    (annotation,) = [node for node in traced.gm.graph.nodes if node.target is ANNOTATE]
    assert annotation.args[0] is traced.call("two").outputs[1]
    assert list(annotation.args[0].users) == [annotation]
    assert len(annotation.users) == 2
    assert annotation.args[1:4] == ("gather", 1, -1)


def test_outputs_and_elements() -> None:
    traced = run(
        {
            "two": {0: IN(1, split_output=True), 1: IN(1, split_output=True)},
            "pair": {"pair": [IN(0), None]},
            "same": OUT(0),
            "": {"x": IN(1)},
        }
    )
    assert [(where, kind, dim) for where, _, kind, dim, _ in traced.annotations()] == [
        ("<root>[x]", "shard", 1),
        ("two[0]", "shard", 1),
        ("two[1]", "shard", 1),
        ("pair[pair][0]", "shard", 0),
        ("same", "gather", 0),
    ]
    order = {where: value for where, value, *_ in traced.annotations()}
    assert order["pair[pair][0]"].args[0] is traced.call("two").outputs[0]  # it reads the annotated output


def test_nested_calls_are_annotated_from_the_outside_in_and_back() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = Outer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(x)

    both = {"": {"x": IN(1)}, "outer": {"x": IN(1), 0: IN(1, split_output=True)}}
    entries = both | {"outer.inner": {"input": IN(1), 0: IN(0, split_output=True)}}
    traced = run(entries, model=Root())
    (relu,) = [node for node in traced.gm.graph.nodes if node.target is torch.nn.functional.relu]
    chain = [relu.args[0]]
    while chain[-1].op != "placeholder":
        chain.append(chain[-1].args[0])
    assert [node.args[4].split(":")[0] for node in chain[:-1]] == ["outer.inner[input]", "outer[x]", "<root>[x]"]
    after = [where for where, *_ in traced.annotations()][3:]
    assert after == ["outer.inner[0]", "outer[0]"]
    (result,) = traced.gm.graph.output_node().args[0]
    assert result.args[4].startswith("outer[0]")


def test_identity_modules_follow_one_another() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split, self.join = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.join(self.split(x)) + 1

    traced = run({"split": {0: IN(1, split_output=True)}, "join": OUT(1)}, model=Root())
    assert [(where, kind) for where, _, kind, *_ in traced.annotations()] == [("split[0]", "shard"), ("join", "gather")]
    first, second = [node for node in traced.gm.graph.nodes if node.target is ANNOTATE]
    assert second.args[0] is first
    assert first.args[0].op == "placeholder"
    assert next(iter(second.users)).op == "call_function"


def test_every_call_of_a_module() -> None:
    class Twice(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.extra(self.extra(torch.sin(x)) - 1)

    traced = run({"extra": {"input": IN(1)}}, model=Twice())
    assert [where for where, *_ in traced.annotations()] == ["extra[input]"] * 2
    assert only_record(traced) == (True, "[2, 5, 4] along 1 (2 calls)")


def test_bodies_of_checkpoints() -> None:
    class Checked(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(lambda v: self.same(self.pair(self.two(v))), x, use_reentrant=False)

    plan = {"two": {"x": IN(1)}, "same": OUT(1)}
    traced = run(plan, X.clone().requires_grad_(), model=Checked())
    assert [where for where, *_ in traced.annotations()] == ["two[x]", "same"]
    assert all(node.target is not ANNOTATE for node in traced.gm.graph.nodes)
    assert all(record.applied for record in traced.records)


def test_symbolic_lengths() -> None:
    plan = {"two": {"x": SequenceParallelPartialInput(1, "n")}}
    fast, log = compiled(Model(), plan, dynamic=True)
    for tokens, text in ((7, 3), (9, 4), (6, 5)):
        inputs = torch.randn(2, tokens, 4), torch.randn(text, 8)
        torch.testing.assert_close(fast(*inputs), Model()(*inputs))
    traced = one(log)
    ((_, _, kind, dim, text_len),) = traced.annotations()
    assert (kind, dim) == ("shard", 1)
    assert text_len.target is torch.ops.aten.sym_size.int
    assert isinstance(text_len.meta["example_value"], torch.SymInt)
    assert text_len.args[0] is traced.call("").arguments["text"]


# --- text lengths


@pytest.mark.parametrize(
    ("source", "args", "expected"),
    [
        (2, (X,), 2),
        (0, (X,), 0),
        ("n", (X, torch.randn(3, 7)), 3),
        ("n", (X, torch.randn(4)), 4),
        ("n", (X, torch.randn(2, 3, 7)), 3),
        ("text", (X, torch.randn(3, 7)), 3),
        ("number", (X, None, 3), 3),
    ],
)
def test_text_length(source: Any, args: Any, expected: int) -> None:
    class Reads(Model):
        def forward(self, x: torch.Tensor, text: Any = None, number: int = 2) -> torch.Tensor:
            more = 0 if text is None else text.sum()
            return self.pair(self.two(x, n=text)) + more * number + number

    traced = run({"two": {"x": SequenceParallelPartialInput(1, source)}}, *args, model=Reads())
    assert traced.annotations()[0][4] == expected
    assert traced.records[0].applied


@pytest.mark.parametrize(
    ("source", "args", "part"),
    [
        (5, (X,), "5 text tokens leave nothing to split of [2, 5, 4] along 1"),
        ("n", (X,), '"n" is None; it must be an integer'),
        ("n", (X, torch.tensor(3)), '"n" is []; it must be an integer, or a tensor with a token dimension'),
        ("y", (X,), '"y" is not passed in this graph'),
        ("number", (X, None, 3), '"number" is not used by the traced code'),
    ],
)
def test_a_text_length_that_cannot_be_told(source: Any, args: Any, part: str) -> None:
    class Reads(Model):
        def forward(self, x: torch.Tensor, text: Any = None, number: int = 2) -> torch.Tensor:
            more = 0 if text is None else text.sum()
            return self.pair(self.two(x, n=text)) + more

    traced = run({"two": {"x": SequenceParallelPartialInput(1, source)}}, *args, model=Reads())
    applied, detail = only_record(traced)
    assert not applied
    assert part in detail
    assert traced.annotations() == []


# --- the example of the docstring


def test_the_example_of_the_docstring() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.out = nn.ModuleList([Block()]), nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.blocks[0](x))

    traced = run({"blocks.0": {"x": IN(1)}, "out": OUT(1)}, model=Root())
    targets = [getattr(node.target, "__name__", node.target) for node in traced.gm.graph.nodes if node.op != "output"]
    assert targets == ["L_x_", "annotate.default", "relu", "tanh", "annotate.default"]
    assert "blocks.0[x]" in (module_under_test.__doc__ or "")
