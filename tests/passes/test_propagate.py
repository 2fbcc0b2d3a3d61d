"""Types of values: what flows from a plan entry, what wins where two shards meet; no decision reads a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxsp.errors import PlanError, UnsupportedError
from fxsp.passes.base import Program
from fxsp.passes.graph import Facts, facts
from fxsp.passes.propagate.propagate import Propagate
from fxsp.types import Ranks
from tracing import gather, shard, trace, types_of

X = torch.randn(2, 5, 4)
W = torch.randn(4, 4)


def _facts(function: Any, *inputs: Any) -> dict[str, Facts]:
    gm = trace(function, *inputs)
    Propagate().apply(Program(gm, Ranks(0, 2, "simulated")))
    return {node.name: facts(node) for node in gm.graph.nodes}


def test_the_example_of_the_pass() -> None:
    assert types_of(lambda x, w: F.linear(shard(x), w).mean(1), X, W) == [
        "x_1 R",
        "w_1 R",
        "annotate S(1, [5])",
        "linear S(1, [5])",
        "mean P",
    ]


@pytest.mark.parametrize(
    ("function", "inputs", "last"),
    [
        (lambda x: shard(x).transpose(1, 2), (X,), "S(2, [5])"),
        (lambda x: shard(x).flatten(0, 1), (X,), "S(0, 2*[5]*1)"),
        (lambda x: shard(x).flatten(1, 2), (X,), "S(1, 1*[5]*4)"),
        (lambda x: shard(x).flatten(), (X,), "S(0, 2*[5]*4)"),
        (lambda x: shard(x).flatten().view(2, 5, 2, 2), (X,), "S(1, [5])"),
        (lambda x: shard(x).unflatten(2, (2, 2)).permute(0, 2, 1, 3), (X,), "S(2, [5])"),
        (lambda x: shard(x).unsqueeze(0).expand(3, -1, -1, -1), (X,), "S(2, [5])"),
        (lambda x: shard(x)[:, :, None], (X,), "S(1, [5])"),
        (lambda x: shard(x)[0], (X,), "S(0, [5])"),
        (lambda x: shard(x).amax(-1), (X,), "S(1, [5])"),
        (lambda x: shard(x).sum(), (X,), "P"),
        (lambda x: shard(x).amax(1), (X,), "R"),
        (lambda x: shard(x).cumsum(1), (X,), "R"),
        (lambda x: shard(x).reshape(4, 10), (X,), "R"),
        (lambda x: shard(x, 1, 2) * 2, (X,), "S(1, [2 whole|3])"),
        (lambda x: shard(x, 1, 0) * 2, (X,), "S(1, [5])"),
        (lambda x: gather(shard(x)), (X,), "R"),
        (lambda x: shard(gather(shard(x).exp())), (X,), "S(1, [5])"),
        (lambda x: shard(x).transpose(1, 2) @ shard(x), (X,), "P"),
        (lambda x: shard(x) @ shard(x).transpose(1, 2), (X,), "S(1, [5])"),
        (lambda x, w: torch.einsum("bsc,cd->bds", shard(x), w), (X, W), "S(2, [5])"),
        (lambda x: torch.view_as_complex(shard(x).unflatten(2, (2, 2))), (X,), "S(1, [5])"),
        (lambda x: torch.zeros(5, 1) + shard(x), (X,), "S(1, [5])"),
        (lambda x: shard(x).new_zeros(3), (X,), "R"),
        (lambda x: shard(x).max(-1), (X,), "S(1, [5]), S(1, [5])"),
        (lambda x: shard(x).chunk(2, -1)[0], (X,), "S(1, [5]), S(1, [5])"),
        (lambda x: F.dropout(shard(x), 0.5, training=False), (X,), "S(1, [5])"),
        (lambda x: F.dropout(shard(x), 0.5, training=True), (X,), "S(1, [5])"),
        (lambda x: torch.rand_like(shard(x)), (X,), "R"),
    ],
)
def test_type_of_the_last_value(function: Any, inputs: Any, last: str) -> None:
    lines = [line for line in types_of(function, *inputs) if not line.startswith("getitem")]
    assert lines[-1].split(" ", 1)[1] == last


def test_nothing_is_decided_by_comparing_sizes() -> None:
    """Tokens, channels and batch of one size: the dimension is what counts."""
    x, w = torch.randn(4, 4, 4), torch.randn(4, 4)
    kinds = {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in types_of(_square, x, w)}
    assert kinds == {
        "x_1": "R",
        "w_1": "R",
        "annotate": "S(1, [4])",
        "linear": "S(1, [4])",
        "transpose": "S(2, [4])",
        "matmul": "S(2, [4])",
        "transpose_1": "S(1, [4])",
        "add": "S(1, [4])",
        "select": "S(0, [4])",
        "add_1": "S(1, [4])",
        "softmax": "S(1, [4])",
        "amax": "R",
    }


def _square(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = F.linear(shard(x), w)
    z = torch.matmul(w, y.transpose(1, 2)).transpose(1, 2) + y
    # The tokens of z[0] are its first dimension, which lies under the second one of z.
    return (z[0] + z).softmax(-1).amax(1)


def test_two_shards_of_one_product() -> None:
    """``m[:, None] * m[None, :]``: rows stay split, columns are made whole, with the reason."""
    found = _facts(lambda m: shard(m, 0)[:, None] * shard(m, 0)[None, :], torch.randn(5))
    decision = found["mul"].decision
    assert str(found["mul"].type) == "S(0, [5])"
    assert [str(t) for t in decision.operands] == ["S(0, [5])", "U"]
    assert decision.reason == (
        "operand 1 is S(1, [5]), but aten.mul.Tensor runs on a whole operand beside the other operands"
    )


def test_of_two_sequences_the_smaller_is_gathered() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.softmax(shard(x), -1)
        y = torch.softmax(torch.cat([shard(y[:, :2]), shard(y[:, 2:])], 1), -1)
        return x + y[..., :1], y + x[..., :1]

    found = _facts(function, X, torch.randn(2, 5, 4))
    assert [str(found[n].type) for n in ("add", "add_1")] == ["S(1, [5])", "S(1, [2|3])"]
    assert "operand 1 is S(1, [2|3])" in found["add"].decision.reason
    assert "runs on S(1, [5])" in found["add"].decision.reason
    assert [str(t) for t in found["add"].decision.operands] == ["S(1, [5])", "S(1, [5])"]


def test_a_shard_of_inputs_gives_way_because_it_costs_nothing() -> None:
    """A table split by the plan as one sequence, against tokens of two segments: the table is cut again."""

    def function(t: torch.Tensor, i: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x = torch.softmax(torch.cat([shard(t), shard(i)], 1), -1)
        return x[..., :1] * shard(table)

    found = _facts(function, torch.randn(2, 3, 4), X, torch.randn(1, 8, 64))
    assert str(found["mul"].type) == "S(1, [3|5])"
    assert found["annotate_2"].free


def test_free_means_computed_from_inputs_by_cheap_operators() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = shard(x).exp().transpose(1, 2).reshape(2, 20)
        z = F.linear(shard(x), w).exp()
        return y.sum(1) + z.sum((1, 2))

    found = _facts(function, X, W)
    free = {name: known.free for name, known in found.items() if known.type is not None}
    assert [n for n, f in free.items() if not f] == ["linear", "exp_1", "sum_1", "sum_2", "add"]


def test_every_type_has_an_origin() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return gather(F.linear(shard(x), w)).cumsum(1) + shard(x).mean(1, keepdim=True)

    found = _facts(function, X, W)
    origins = {name: known.type.origin for name, known in found.items() if known.type is not None}
    assert origins["annotate"] == "split dim 1"
    assert origins["linear"].startswith("aten.linear.default: ([d0, d1, i], [o, i]) -> ([d0, d1, o])")
    assert origins["linear"].endswith("shard of d1")
    assert origins["annotate_1"] == "whole again"
    assert origins["mean"].endswith("shard of d1")
    assert all(origins.values()), origins


def test_reasons_say_what_an_operator_needs() -> None:
    def function(x: torch.Tensor) -> tuple[Any, ...]:
        x = torch.softmax(shard(x), -1)
        return x.cumsum(1), x.reshape(4, 10), torch.bernoulli(x), torch.kron(x[0], x[0])

    found = _facts(function, X)
    reasons = [known.decision.reason for n, known in found.items() if n in ("cumsum", "reshape", "bernoulli", "kron")]
    assert reasons == [
        "aten.cumsum.default needs dimension 1 of operand 0 whole (the tokens [5])",
        "aten.reshape.default needs dimension 1 of operand 0 whole (the tokens [5])",
        "aten.bernoulli.default has no sharding rule for this use: it needs its operands whole",
        "aten.kron.default has no sharding rule for this use: it needs its operands whole",
    ]


@pytest.mark.parametrize(
    ("dim", "text", "message"),
    [
        (3, -1, r"dimension 3 is out of range for a tensor of shape \[2, 5, 4\]"),
        (1, 5, r"the text part has 5 tokens, but the tensor has only 5 along dimension 1"),
        (1, 9, r"the text part has 9 tokens"),
    ],
)
def test_entries_that_do_not_fit(dim: int, text: int, message: str) -> None:
    with pytest.raises(PlanError, match=f"split dim {dim}: {message}"):
        types_of(lambda x: shard(x, dim, text), X)


def test_nothing_to_split() -> None:
    assert types_of(lambda x: shard(x) + 1, torch.zeros(2, 0, 4)) == ["x_1 R", "annotate R", "add R"]


def test_writes_must_be_functionalized() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.exp.default, (x,))
    z = graph.call_function(torch.ops.aten.add_.Tensor, (y, 1))
    graph.output(z)
    for node in (x, y, z):
        node.meta["val"] = torch.ones(2)
    z.meta["stack_trace"] = 'File "/home/me/model.py", line 12, in forward\n    y += 1'
    with pytest.raises(UnsupportedError, match=r"aten.add_.Tensor in the root module \(model.py:12\) writes to exp"):
        Propagate().apply(Program(torch.fx.GraphModule({}, graph), Ranks(0, 2, "g")))
