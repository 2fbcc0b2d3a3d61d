"""The printed graph and the printed report, as golden text."""

from __future__ import annotations

import operator
from textwrap import dedent

import pytest
import sympy
import torch

import fxsp.kernels.ops
import small
from fxsp.inspection.printer import format_graph, op_text
from fxsp.inspection.report_text import Section, format_report, sections
from fxsp.inspection.wire import bytes_sent, format_bytes, local_shape
from fxsp.passes.graph import mark
from fxsp.report import AttentionRecord, CollectiveRecord, GatherRecord, PlanRecord, Report
from fxsp.types import Ranks, Replicate, Sequence, Shard, parse

ops = torch.ops.fxsp
aten = torch.ops.aten


def _value(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _note(node: torch.fx.Node, type_: str, *shape: int, module: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Global value, type, and module of a node."""
    mark(node, type=parse(type_) if type_ else None)
    node.meta["val"] = _value(*shape, dtype=dtype)
    if module:
        node.meta["nn_module_stack"] = {"1": (f"L['self'].{module}", torch.nn.Module)}


def _text_and_image(rank: int) -> torch.fx.GraphModule:
    """[text whole | image split], a linear, and everything whole again."""
    where = ([2, 5], [True, False], rank, 2, "some group")
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    rows = graph.create_node(
        "call_function", ops.shard.default, (x, 1, [2, 5], [True, False], False, rank, 2, "some group"), name="shard"
    )
    used = graph.create_node("call_function", ops.use.default, (w, "some group"), name="use")
    linear = graph.create_node("call_function", aten.linear.default, (rows, used), name="linear")
    scaled = graph.create_node("call_function", aten.mul.Tensor, (linear, 0.5), name="mul")
    whole = graph.create_node("call_function", ops.gather.default, (scaled, 1, *where), name="gather")
    parts = graph.create_node(
        "call_function", aten.split_with_sizes.default, (whole, [2, 5], 1), name="split_with_sizes"
    )
    text = graph.create_node("call_function", operator.getitem, (parts, 0), name="getitem")
    graph.output((text, whole))
    _note(x, "R", 1, 7, 4)
    _note(w, "R", 8, 4)
    _note(rows, "S(1, [2 whole|5])", 1, 7, 4, module="blocks.0")
    _note(used, "U", 8, 4, module="blocks.0.proj")
    _note(linear, "S(1, [2 whole|5])", 1, 7, 8, module="blocks.0.proj")
    _note(scaled, "S(1, [2 whole|5])", 1, 7, 8, module="blocks.0")
    _note(whole, "R", 1, 7, 8)
    parts.meta["val"] = (_value(1, 2, 8), _value(1, 5, 8))
    mark(parts, type=(Replicate(), Replicate()))
    _note(text, "R", 1, 2, 8)
    return torch.fx.GraphModule({}, graph)


def test_graph() -> None:
    expected = """\
        P=2, 7 values, 1 collective sends 96 B per rank
          x                 R                  f32[1, 7, 4]                input
          w                 R                  f32[8, 4]                   input
          shard             S(1, [2 whole|5])  f32[1, 5, 4]                shard(x, 1, [2 whole|5], rank)             | blocks.0
          use               U                  f32[8, 4]                   use(w)                                     | blocks.0.proj
          linear            S(1, [2 whole|5])  f32[1, 5, 8]                linear(shard, use)                         | blocks.0.proj
          mul               S(1, [2 whole|5])  f32[1, 5, 8]                mul(linear, 0.5)                           | blocks.0
        ▶ gather            R                  f32[1, 7, 8]                gather(mul, 1, [2 whole|5], rank)    96 B
          split_with_sizes  R                  f32[1, 2, 8], f32[1, 5, 8]  split_with_sizes(gather, [2, 5], 1)
          getitem           R                  f32[1, 2, 8]                split_with_sizes[0]
                                                                           return getitem, gather
        """  # noqa: E501
    assert format_graph(_text_and_image(0), Ranks(0, 2, "g")) == dedent(expected).rstrip()


def test_graph_is_the_same_text_on_every_rank() -> None:
    first, second = (format_graph(_text_and_image(rank), Ranks(rank, 2, f"group {rank}")) for rank in (0, 1))
    assert first == second


def test_local_value_wins_and_missing_metadata_is_left_out() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.sum.dim_IntList, (x, [0, -1], True), {"dtype": torch.bfloat16})
    graph.output(y)
    x.meta["val"] = _value(6)
    mark(x, type=Shard(0, Sequence.of(6)), local=_value(3))
    gm = torch.fx.GraphModule({}, graph)
    assert local_shape(x, Ranks(0, 2, "g")) == (3,)
    assert local_shape(y, Ranks(0, 2, "g")) is None
    lines = format_graph(gm, Ranks(0, 2, "g")).splitlines()
    assert lines[0] == "P=2, 1 value, 0 collectives"
    assert lines[2].split() == ["sum_dim_int_list", "sum(x,", "[0,", "-1],", "True,", "dtype=bf16)"]
    assert lines[3].strip() == "return sum_dim_int_list"


def test_symbolic_lengths_are_formulas() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    rows = graph.call_function(ops.gather.default, (x, 0, [7], [False], 0, 2, "g"))
    n = sympy.Symbol("s0", positive=True, integer=True)
    x.meta["val"] = _value(7, 3)
    mark(x, type=Shard(0, Sequence.of(n)))
    mark(rows, type=Replicate())
    assert str(local_shape(x, Ranks(0, 2, "g"))) == "(((s0 + 1)//2), 3)"


def test_bytes_of_lengths_that_are_nodes() -> None:
    """From what the pass counted, else from the length's value, else from the operand's rows."""
    graph = torch.fx.Graph()
    x, length = graph.placeholder("x"), graph.placeholder("length")
    rows = graph.call_function(ops.gather.default, (x, 0, [length], [False], 0, 2, "g"))
    mark(x, local=_value(4, 3))
    ranks = Ranks(0, 2, "g")
    assert bytes_sent(rows, ranks) == 4 * 3 * 4
    assert op_text(rows) == "gather(x, 0, [length], rank)"
    length.meta["val"] = 7
    assert bytes_sent(rows, ranks) == 4 * 3 * 4
    assert op_text(rows) == "gather(x, 0, [7], rank)"
    assert op_text(graph.call_function(ops.pack.default, (x, [3, 2], 2, False))) == "pack(x, [3|2])"
    mark(rows, sent=12)
    assert bytes_sent(rows, ranks) == 12


@pytest.mark.parametrize(
    ("op", "dtype", "expected"),
    [
        # x is [4, 6, 2]: 48 elements.
        (lambda g, x: g.call_function(ops.all_to_all.default, (x, "g")), torch.float32, 48 * 4 * 3 // 4),
        (lambda g, x: g.call_function(ops.all_reduce.default, (x, "g")), torch.float32, 2 * 48 * 4 * 3 // 4),
        (lambda g, x: g.call_function(ops.all_reduce.default, (x, "g")), torch.bfloat16, 2 * 48 * 4 * 3 // 4),
        (lambda g, x: g.call_function(ops.gather.default, (x, 1, [2, 13], [True, False], 0, 4, "g")),
         torch.bfloat16, 3 * 4 * 4 * 2 * 2),
        (lambda g, x: g.call_function(ops.reduce_scatter.default, (x, 1, [6], [False], 0, 4, "g")),
         torch.float32, 3 * 4 * 2 * 2 * 4),
        (lambda g, x: g.call_function(ops.mask_pads.default, (x, 1, [24], [False], 0, 4)), torch.float32, None),
        (lambda g, x: g.call_function(aten.relu.default, (x,)), torch.float32, None),
    ],
)  # fmt: skip
def test_bytes_sent(op, dtype, expected) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    mark(x, local=_value(4, 6, 2, dtype=dtype))
    assert bytes_sent(op(graph, x), Ranks(0, 4, "g")) == expected


def test_format_bytes() -> None:
    texts = [format_bytes(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30, sympy.Symbol("s0") * 4)]
    assert texts == ["0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 GiB", "4*s0 B"]


def test_report() -> None:
    report = Report(
        plan=[
            *[PlanRecord(f"blocks.{i}[x]: SequenceParallelInput(split_dim=1)", True) for i in range(2)],
            PlanRecord("blocks.0: SequenceParallelOutput(gather_dim=1)", True, "twice in a row"),
            PlanRecord("rope[0]: SequenceParallelInput(split_dim=0)", False, "expected_dims=2, the tensor has 3"),
        ],
        attentions=[
            *[
                AttentionRecord(f"blocks.{i}.attn", "m.py:1", "ulysses", 4096, (("ring", "more bytes"),))
                for i in (0, 1)
            ],
            AttentionRecord("blocks.0.cross", "m.py:2", "local", 0, (), "keys are whole"),
        ],
        collectives=[
            *[CollectiveRecord("all_to_all", f"a{i}", "blocks.0.attn", 2048) for i in range(4)],
            CollectiveRecord("gather", "g", "Model", 512, "graph output", "m.py:9"),
        ],
        implicit_gathers=[
            GatherRecord("cumsum", "blocks.0.mix", "m.py:7", "sums over tokens", 768),
            GatherRecord("output", "", "", "graph outputs are whole", 512, kind="output"),
        ],
        notes=["grad_reduce is deferred"],
        timings={"propagate": 0.25, "partition": 0.5},
    )
    expected = """\
        plan:
          applied      blocks.*[x]: SequenceParallelInput(split_dim=1) (2 times)
          applied      blocks.*: SequenceParallelOutput(gather_dim=1)  twice in a row
          not applied  rope[0]: SequenceParallelInput(split_dim=0): expected_dims=2, the tensor has 3
        attention:
          2 x ulysses in blocks.*.attn (m.py:1): 4.0 KiB each; rejected: ring (more bytes)
          1 x local in blocks.*.cross (m.py:2): 0 B each; keys are whole
        collectives (sent per rank, forward):
             4 x all_to_all     8.0 KiB  in blocks.*.attn
             1 x gather         512 B  graph output, in Model (m.py:9)
             5   in all         8.5 KiB
        implicit gathers (an operator needs all tokens):
          cumsum in blocks.*.mix (m.py:7): sums over tokens; 768 B
        gathers for graph outputs:
          output: graph outputs are whole; 512 B
        notes:
          grad_reduce is deferred
        compile time: 0.75 s (partition 500 ms, propagate 250 ms)
        """
    assert format_report(report) == dedent(expected).rstrip()


def test_report_of_nothing_and_of_much() -> None:
    assert format_report(Report()) == "nothing to report: no plan entry applied"
    assert format_report(Report(unsharded="no plan")) == "runs whole on every rank: no plan"
    lines = format_report(Report(notes=[f"note {i}" for i in range(30)])).splitlines()
    assert len(lines) == 14
    assert lines[-1] == "  … and 18 more"


def test_sections_are_cut_and_have_a_foot() -> None:
    lines = [str(i) for i in range(6)]
    assert Section("many", lines, limit=3, foot="end").text() == [
        "many:",
        "  0",
        "  1",
        "  2",
        "  … and 3 more",
        "  end",
    ]
    assert Section("one more is shown", lines[:4], limit=3).text()[-1] == "  3"
    assert Section("none", []).text() == []


def test_figures_change_lines_and_no_section() -> None:
    e = fxsp.explain(small.Model(mix=True), small.inputs(), world_size=2, plan=small.SPLIT)
    (result,), (measured,) = e.results, e.measures
    assert measured is not None
    plain, told = sections(result.report), sections(result.report, measured)
    assert [s.title for s in plain] == [s.title for s in told if s.title != "work and memory"]
    assert [line for s in told for line in s.text()] == str(e).splitlines()[1:]
    assert len(e.to_dict()["graphs"][0]["collectives"]) == len(result.report.collectives) == len(measured.forward)
