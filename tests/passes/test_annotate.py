from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxsp.passes.annotate.annotate as module_under_test
from capturing import ANNOTATE, Traced, compiled, trace
from fxsp.errors import PlanError
from fxsp.plan import SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput

IN = SequenceParallelInput
OUT = SequenceParallelOutput
X = torch.randn(2, 5, 4)


class Two(nn.Module):
    """``(x, y) -> (x + 1, x * y)``."""

    def forward(self, x: torch.Tensor, y: Any = None, n: Any = None) -> Any:
        return x + 1, x * (3 if y is None else y)


class Pair(nn.Module):
    def forward(self, pair: Any) -> torch.Tensor:
        return pair[0] * pair[1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two, self.pair, self.same = Two(), Pair(), nn.Identity()
        self.extra = nn.ReLU()

    def forward(self, x: torch.Tensor, text: Any = None, number: int = 2) -> torch.Tensor:
        a, b = self.two(torch.sin(x) if text is None else x + text.sum(), n=text)
        return self.same(self.pair((a, b)))


def one(log: list[Traced]) -> Traced:
    (traced,) = log
    return traced


def run(plan: Any, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> Traced:
    return one(trace(Model() if model is None else model, *(args or (X,)), plan=plan, **kwargs))


def refused(plan: Any, *args: Any, model: nn.Module | None = None) -> str:
    fast, _ = compiled(Model() if model is None else model, plan)
    with pytest.raises(Exception, match="plan entry") as error:
        fast(*(args or (X,)))
    assert isinstance(error.value.inner_exception, PlanError)  # type: ignore[attr-defined]
    return str(error.value.inner_exception)  # type: ignore[attr-defined]


def only_record(traced: Traced) -> tuple[bool, str]:
    (record,) = traced.records
    return record.applied, record.detail


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


# --- what does not apply


@pytest.mark.parametrize(
    ("plan", "part"),
    [
        ({"two": {"x": IN(1, expected_dims=2)}}, "the tensor [2, 5, 4] is 3-D, not 2-D as expected_dims says"),
        ({"two": {"y": IN(1)}}, "the argument is not passed"),
        ({"two": {"n": IN(1)}}, "the argument is None"),
        ({"": {"text": IN(1)}}, "the argument is None"),
        ({"": {"number": IN(0)}}, "not used by the traced code"),
        ({"extra": {"input": IN(0)}}, "module was not called in this graph"),
        ({"extra": OUT(0)}, "module was not called in this graph"),
        ({"same": {"input": IN(0)}}, "the argument is not used during the call"),
    ],
)
def test_not_applied(plan: Any, part: str) -> None:
    class Passes(Model):
        def __init__(self) -> None:
            super().__init__()
            self.same = Input()

    class Input(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return input

    traced = run(plan, model=Passes())
    applied, detail = only_record(traced)
    assert not applied
    assert part in detail
    assert traced.annotations() == []


def test_an_empty_dimension_and_a_number() -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, by: Any) -> torch.Tensor:
            return x * by

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(x, x.shape[0])

    plan = {"scale": {"x": IN(1), "by": IN(0)}}
    records = run(plan, torch.randn(2, 0, 4), model=Root()).records
    assert [r.detail for r in records] == [
        "dimension 1 of the tensor [2, 0, 4] is empty",
        "the argument is 2, not a tensor",
    ]
    fast, log = compiled(Root(), plan, dynamic=True)
    fast(torch.randn(3, 5, 4))
    assert log[0].records[1].detail == "the argument is a SymInt, not a tensor"


def test_forward_called_directly_is_reported() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear.forward(x)

    applied, detail = only_record(run({"linear": {"input": IN(1)}}, model=Linear()))
    assert not applied
    assert "is its forward called directly" in detail


def test_a_value_that_is_written_in_place_stays_as_it_is() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x[0] = 0
            return x * 2

    class Root(nn.Module):
        def __init__(self, views: bool) -> None:
            super().__init__()
            self.writes, self.relu, self.views = Writes(), nn.ReLU(), views

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.sin(x)
            y = self.relu(h)
            if self.views:
                h.view(-1).mul_(3)
                return self.relu(y) + h
            return self.writes(h) + h + y

    for views, plan in ((False, {"writes": {"x": IN(1)}}), (True, {"relu": {"input": IN(1)}})):
        traced = run(plan, model=Root(views))
        assert "written in place after the call began" in only_record(traced)[1]
    output = run({"relu": OUT(1)}, model=Root(True))
    assert only_record(output)[0]  # what is written is the argument, not the output


def test_a_write_before_the_call_does_no_harm() -> None:
    class Root(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.empty_like(x)
            h[:, ::2] = x[:, ::2]
            h[:, 1::2] = 0
            return self.extra(h)

    assert only_record(run({"extra": {"input": IN(1)}}, model=Root())) == (True, "[2, 5, 4] along 1")


def test_one_rank_is_checked_and_not_changed() -> None:
    plan = {"two": {"x": SequenceParallelPartialInput(1, "n")}, "extra": OUT(1)}
    traced = run(plan, X, torch.randn(3, 2), size=1)
    assert [(r.applied, r.detail) for r in traced.records] == [
        (True, "[2, 5, 4] along 1; one rank: nothing to split"),
        (False, "module was not called in this graph"),
    ]
    assert traced.annotations() == []
    fast, _ = compiled(Model(), {"two": {"x": IN(7)}}, size=1)
    with pytest.raises(Exception, match="dimension 7 is out of range"):
        fast(X)


# --- what is wrong


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        (
            {"two": {"x": IN(3)}},
            ["`two[x]: SequenceParallelInput(split_dim=3)`", "dimension 3 is out of range", "[2, 5, 4] is 3-D"],
        ),
        ({"two": {0: IN(-4, split_output=True)}}, ["`two[0]: ", "dimension -4 is out of range"]),
        (
            {"two": OUT(1)},
            ["`two: SequenceParallelOutput", "returns 2 values: [2, 5, 4], [2, 5, 4]", "a list of specs"],
        ),
        ({"two": [OUT(1), OUT(1), OUT(1)]}, ["`two[2]: ", "there is no output 2; the module returns 2"]),
        ({"pair": {0: IN(1, split_output=True)}, "same": [None, OUT(1)]}, ["`same[1]: ", "the module returns 1"]),
        ({"pair": {"pair": IN(1)}}, ['"pair" is a tuple of 2 values; give a list of 2 specs']),
        ({"pair": {"pair": [IN(1)]}}, ['"pair" has 2 values, and the plan lists 1 specs']),
        ({"two": {"x": [IN(1), IN(1)]}}, ['"x" is [2, 5, 4], not a tuple; give one spec']),
        ({"twp": {"x": IN(1)}}, ['Model has no module "twp"', "two, pair, same, extra", 'mean "two"']),
    ],
)
def test_refused(plan: Any, parts: list[str]) -> None:
    message = refused(plan)
    for part in parts:
        assert part in message


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
