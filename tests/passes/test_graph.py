"""What passes know about a node: one record, that copies of the node may share, and that nobody spells by hand."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from fxsp.passes.graph import (
    Call,
    Facts,
    decision_of,
    facts,
    global_value,
    is_split,
    local_value,
    mark,
    reachable,
    type_of,
    value_of,
)
from fxsp.types import Replicate, Sequence, Shard

ROOT = Path(__file__).resolve().parents[2]
#: Keys of a node's metadata that are torch's own.
TORCH = {
    *("val", "example_value", "tensor_meta", "unbacked_bindings", "grapharg", "custom", "seq_nr"),
    *("nn_module_stack", "fwd_nn_module_stack", "stack_trace", "autograd_backward"),
    *("recompute", "ac_graph_id", "_checkpoint_context_fn"),
}
SPLIT = Shard(0, Sequence.of(4))


def _node() -> Node:
    node = Graph().placeholder("x")
    node.meta["val"] = torch.ones(4)
    return node


def test_a_node_that_nothing_is_known_about() -> None:
    node = _node()
    assert facts(node) == Facts()
    assert not any(getattr(facts(node), field.name) for field in fields(Facts))
    assert facts(node).attention_record is facts(node).written_attention is None  # a position may be 0
    with pytest.raises(AssertionError, match=r"x.* has no type"):
        type_of(node)
    with pytest.raises(AssertionError, match=r"x.* has no decision"):
        decision_of(node)


def test_marks_add_up() -> None:
    node = _node()
    mark(node, type=SPLIT, free=True)
    mark(node, island="closed", free=False)
    assert facts(node) == Facts(type=SPLIT, island="closed")
    assert type_of(node) is SPLIT
    with pytest.raises(TypeError, match="tpye"):
        mark(node, tpye=SPLIT)


def test_a_copy_shares_what_is_known_and_nothing_that_is_marked_later() -> None:
    node = _node()
    mark(node, type=SPLIT)
    new = Graph().node_copy(node)
    assert facts(new) is facts(node)
    mark(new, type=Replicate(), stands_for="x")
    assert facts(node) == Facts(type=SPLIT)
    mark(node, free=True)
    assert facts(new) == Facts(type=Replicate(), stands_for="x")
    with pytest.raises(AttributeError):
        facts(node).free = True  # type: ignore[misc]


def test_facts_go_where_a_graph_goes() -> None:
    node = _node()
    mark(node, type=SPLIT, sent=12)
    node.graph.output(node)
    deep = copy.deepcopy(GraphModule({}, node.graph)).graph.find_nodes(op="placeholder")[0]
    assert facts(deep) == facts(node)
    assert pickle.loads(pickle.dumps(facts(node))) == facts(node)


def test_values() -> None:
    node = _node()
    assert global_value(node) is value_of(node) is node.meta["val"]
    assert local_value(node) is None
    mark(node, whole=torch.ones(4))
    assert global_value(node) is value_of(node) is facts(node).whole
    mark(node, local=torch.ones(2))
    assert value_of(node) is local_value(node) is facts(node).local
    assert global_value(node) is facts(node).whole
    from_dynamo = Graph().placeholder("x")
    from_dynamo.meta["example_value"] = torch.ones(3)
    assert global_value(from_dynamo) is None
    assert value_of(from_dynamo) is from_dynamo.meta["example_value"]


def _keys(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names of metadata that a file spells: ``n.meta["k"]``, ``n.meta.get("k")``, ``"k" in n.meta``."""

    def is_meta(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "meta"

    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=value, slice=ast.Constant(value=str(key))) if is_meta(value):
                yield key, node.lineno
            case ast.Call(func=ast.Attribute(value=value), args=[ast.Constant(value=str(key)), *_]) if is_meta(value):
                yield key, node.lineno
            case ast.Compare(left=ast.Constant(value=str(key)), comparators=[value]) if is_meta(value):
                yield key, node.lineno
            case ast.Call(func=ast.Attribute(value=value, attr="update"), keywords=given) if is_meta(value):
                yield from ((word.arg, node.lineno) for word in given if word.arg)


def test_spelled_keys_are_found() -> None:
    source = 'n.meta["a"]\nn.meta.get("b", 1)\n"c" in n.x.meta\nn.meta.update(d=1)\nn.args["e"]\n'
    assert sorted(_keys(ast.parse(source))) == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]


@pytest.mark.parametrize("folder", ["fxsp", "passes", "kernels", "tests", "examples"])
def test_no_other_file_spells_a_key_of_ours(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {key}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for key, line in _keys(ast.parse(path.read_text()))
        if key not in TORCH
    ]
    assert not found, f"a fact about a node is a field of fxsp.passes.graph.Facts: {found}"


def _call() -> Call:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta["val"] = torch.ones(2, 3)
    node = graph.call_function(torch.ops.aten.sub.Tensor, (x,), {"other": y})
    node.meta["val"] = torch.ones(2, 3)
    return Call(node)


def test_a_call_binds_its_arguments() -> None:
    call = _call()
    x, y = call.operands
    assert call.arguments == {"self": x, "other": y, "alpha": 1}
    assert call.given == {"self": x, "other": y}
    assert (call["alpha"], call.get("alpha"), call.get("beta"), call.get("beta", 2)) == (1, 1, None, 2)
    assert call.is_default("alpha")
    assert not call.is_default("other")
    assert call.operand_shapes() == [*call.result_shapes(), call.shape("other")] == [(2, 3), (2, 3)]
    assert call.written == []


def test_an_argument_without_a_default_is_none() -> None:
    graph = Graph()
    call = Call(graph.call_function(torch.ops.aten.sum.dim_IntList, (graph.placeholder("x"), [-1])))
    assert call.arguments == {"self": call.node.args[0], "dim": [-1], "keepdim": False, "dtype": None}
    assert not call.is_default("dim")
    assert call.is_default("dtype")


def test_what_a_call_writes_to() -> None:
    graph = Graph()
    x, y, out = (graph.placeholder(name) for name in ("x", "y", "out"))
    assert Call(graph.call_function(torch.ops.aten.add_.Tensor, (x, y))).written == [x]
    assert Call(graph.call_function(torch.ops.aten.add.out, (x, y), {"out": out})).written == [out]
    assert Call(graph.call_function(torch.ops.aten._foreach_add_.List, ([x, out], [y, y]))).written == [x, out]


def test_a_call_is_written_again() -> None:
    call = _call()
    x, y = call.operands
    assert call.rebuild() == ((x, y), {})
    assert call.rebuild(other=x) == ((x, x), {})
    assert call.rebuild(alpha=3) == ((x, y), {"alpha": 3})
    assert call.bound_to({**call.arguments, "self": y}).rebuild() == ((y, y), {})
    assert call.arguments["self"] is x


def test_what_can_be_reached() -> None:
    edges = {"a": "bc", "b": "d", "c": "db", "d": "ae", "e": ""}
    asked: list[str] = []

    def step(name: str) -> str:
        asked.append(name)
        return edges[name]

    assert list(reachable("a", step)) == ["a", "b", "c", "d", "e"]  # the nearest first, and each once
    assert asked == ["a", "b", "c", "d", "e"]
    assert list(reachable("dd", step, stop=lambda name: name == "a")) == ["d", "a", "e"]
    assert list(reachable("ab", step, stop=lambda name: name in "ab")) == ["a", "b"]
    asked.clear()
    assert next(name for name in reachable("a", step) if name == "b")
    assert asked == ["a"]  # no further than somebody looks


def test_what_is_split() -> None:
    node = _node()
    assert not is_split(node)
    for type_, split in ((SPLIT, True), (Replicate(), False), ((Replicate(), SPLIT), True), ((Replicate(),), False)):
        mark(node, type=type_)
        assert is_split(node) == split
