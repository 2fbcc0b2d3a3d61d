"""The rule table: one line per operator family, and every operator that models use is accounted for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxsp.passes.graph import Call
from fxsp.passes.pipeline import PIPELINE  # fills the table
from fxsp.passes.rules.dims import reshape_factors
from fxsp.passes.rules.families import family, overloads
from fxsp.passes.rules.rule import OpRule
from fxsp.passes.rules.table import RULES, rule, rule_of
from fxsp.passes.rules.whole import WHOLE
from fxsp.types import quotient
from rule_recorder import Sample, T
from rule_validation import rule_for

aten = torch.ops.aten
X = T((2, 5, 6))

#: Operator, arguments, what its rule prints.
GOLDEN: list[tuple[str, tuple[Any, ...], str]] = [
    ("add.Tensor", (X, T((5, 1))), "([d0, d1, d2], [d1, 1]) -> ([d0, d1, d2])"),
    ("add.Tensor", (X, T((1, 5, 6))), "([d0, d1, d2], [1, d1, d2]) -> ([d0, d1, d2])"),
    ("mul.Tensor", (T((5,)), T(())), "([d0], []) -> ([d0])"),
    ("where.self", (T((5, 1), "bool"), X, T((6,))), "([d1, 1], [d0, d1, d2], [d2]) -> ([d0, d1, d2])"),
    ("gelu", (X,), "([d0, d1, d2]) -> ([d0, d1, d2])"),
    ("to.dtype", (X, torch.float32), "([d0, d1, d2]) -> ([d0, d1, d2])"),
    ("type_as", (X, T((3,))), "([d0, d1, d2], -) -> ([d0, d1, d2])"),
    ("dropout", (X, 0.5, False), "([d0, d1, d2]) -> ([d0, d1, d2])"),
    ("dropout", (X, 0.5, True), "None"),
    ("native_dropout", (X, 0.5, None), "None"),
    ("linear", (X, T((4, 6))), "([d0, d1, i], [o, i]) -> ([d0, d1, o]) reduction={i}"),
    ("linear", (X, T((4, 6)), T((4,))), "([d0, d1, i], [o, i], [o]) -> ([d0, d1, o]) whole={i}"),
    ("mm", (T((5, 6)), T((6, 4))), "([m, k], [k, n]) -> ([m, n]) reduction={k}"),
    ("matmul", (T((3, 2, 4, 5)), T((2, 5, 6))), "([b0, b1, m, k], [b1, k, n]) -> ([b0, b1, m, n]) reduction={k}"),
    ("matmul", (T((5,)), T((2, 5, 3))), "([k], [b0, k, n]) -> ([b0, n]) reduction={k}"),
    ("outer", (T((5,)), T((6,))), "([m], [n]) -> ([m, n])"),
    ("addmm", (T((4,)), T((5, 6)), T((6, 4))), "([d1], [d0, k], [k, d1]) -> ([d0, d1]) whole={k}"),
    ("einsum", ("bsc,bsd->bcd", [X, T((2, 5, 3))]), "([b, s, c], [b, s, d]) -> ([b, c, d]) reduction={s}"),
    ("einsum", ("...sc,...sd->...cd", [X, X]), "([a, s, c], [a, s, d]) -> ([a, c, d]) reduction={s}"),
    ("einsum", ("bs...,bcs", [X, T((2, 3, 5))]), "([b, s, a], [b, c, s]) -> ([a, c]) reduction={b, s}"),
    ("einsum", ("bbc->bc", [T((3, 3, 5))]), "None"),
    ("sum.dim_IntList", (X, [1]), "([d0, d1, d2]) -> ([d0, d2]) reduction={d1}"),
    ("mean.dim", (X, [1], True), "([d0, d1, d2]) -> ([d0, 1, d2]) reduction={d1}"),
    ("amax", (X, [1]), "([d0, d1, d2]) -> ([d0, d2]) combined={d1}"),
    ("max.dim", (X, 1), "([d0, d1, d2]) -> ([d0, d2], [d0, d2]) combined={d1}"),
    ("var.correction", (X, [1]), "([d0, d1, d2]) -> ([d0, d2]) whole={d1}"),
    ("layer_norm", (X, [6], T((6,)), T((6,))), "([d0, d1, d2], [d2], [d2]) -> ([d0, d1, d2]) whole={d2}"),
    ("rms_norm", (X, [6]), "([d0, d1, d2]) -> ([d0, d1, d2]) whole={d2}"),
    ("group_norm", (X, 1, T((5,)), T((5,))), "([d0, d1, d2], [c], [c]) -> ([d0, d1, d2]) whole={c, d1, d2}"),
    ("softmax.int", (X, 1), "([d0, d1, d2]) -> ([d0, w1, d2]) whole={d1, w1}"),
    ("cumsum", (X, 0), "([d0, d1, d2]) -> ([w0, d1, d2]) whole={d0, w0}"),
    ("sort", (X,), "([d0, d1, d2]) -> ([d0, d1, w2], [d0, d1, w2]) whole={d2, w2}"),
    ("roll", (X, [1]), "([d0, d1, d2]) -> ([w0, w1, w2]) whole={d0, d1, d2, w0, w1, w2}"),
    (
        "conv1d",
        (X, T((4, 5, 3))),
        "([b, x1, x2], [p0_0, p0_1, p0_2]) -> ([b, y1, y2]) whole={p0_0, p0_1, p0_2, x1, x2, y1, y2}",
    ),
    ("flatten.using_ints", (X, 0, 1), "([f0, f1, f2]) -> ([f0 f1, f2])"),
    ("unflatten.int", (X, -1, [2, 3]), "([f0, f1, f2 f3]) -> ([f0, f1, f2, f3])"),
    ("view", (X, [10, 2, 3]), "([f0, f1, f2 f3]) -> ([f0 f1, f2, f3])"),
    ("reshape", (T((2, 12)), [4, 6]), "([f0, f1 f2]) -> ([f0 f1, f2])"),
    ("reshape", (X, [4, 15]), "([f0, f1, f2]) -> ([f0 f3, f4]) whole={f1, f2, f3, f4}"),
    ("view_as", (X, T((10, 6))), "([f0, f1, f2], -) -> ([f0 f1, f2])"),
    ("transpose.int", (X, 1, 2), "([d0, d1, d2]) -> ([d0, d2, d1])"),
    ("permute", (X, [2, 0, -2]), "([d0, d1, d2]) -> ([d2, d0, d1])"),
    ("movedim.int", (X, 0, 2), "([d0, d1, d2]) -> ([d1, d2, d0])"),
    ("expand", (T((2, 1, 6)), [-1, 5, -1]), "([d0, 1, d2]) -> ([d0, d1, d2])"),
    ("view_as_complex", (T((5, 6, 2)),), "([d0, d1, c]) -> ([d0, d1]) whole={c}"),
    ("view_as_real", (T((5, 6), "complex"),), "([d0, d1]) -> ([d0, d1, c]) whole={c}"),
    ("slice.Tensor", (X, 1, 0, 2), "([d0, d1, d2]) -> ([d0, w1, d2]) whole={d1, w1}"),
    ("chunk", (X, 2, 2), "([d0, d1, d2]) -> ([d0, d1, w2], [d0, d1, w2]) whole={d2, w2}"),
    ("select.int", (X, 1, 0), "([d0, d1, d2]) -> ([d0, d2]) whole={d1}"),
    ("unbind.int", (X, 0), "([d0, d1, d2]) -> ([d1, d2], [d1, d2]) whole={d0}"),
    ("cat", ([X, T((2, 5, 2))], -1), "([d0, d1, x0], [d0, d1, x1]) -> ([d0, d1, y]) whole={x0, x1, y}"),
    ("stack", ([X, X], 1), "([d0, d1, d2], [d0, d1, d2]) -> ([d0, n, d1, d2]) whole={n}"),
    ("pad", (X, [1, 1]), "([d0, d1, d2]) -> ([d0, d1, w2]) whole={d2, w2}"),
    ("repeat", (X, [2, 1, 3, 1]), "([d0, d1, d2]) -> ([n0, d0, w1, d2]) whole={d1, n0, w1}"),
    ("repeat_interleave.self_int", (X, 2, 1), "([d0, d1, d2]) -> ([d0, w1, d2]) whole={d1, w1}"),
    ("embedding", (T((7, 4)), T((2, 5), "index", 7)), "([v, c], [d0, d1]) -> ([d0, d1, c]) whole={v}"),
    ("embedding", (T((7, 4)), T((2, 5), "index", 7), -1, True), "None"),
    ("index_select", (X, 1, T((4,), "index", 5)), "([d0, w, d2], [n]) -> ([d0, n, d2]) whole={w}"),
    ("index.Tensor", (X, [None, T((4,), "index", 5)]), "([d0, w1, d2], [n0]) -> ([d0, n0, d2]) whole={w1}"),
    ("index.Tensor", (X, [None, T((5,), "bool")]), "None"),
    ("gather", (X, 1, T((2, 3, 6), "index", 5)), "([d0, w, d2], [d0, n, d2]) -> ([d0, n, d2]) whole={w}"),
    ("slice_scatter", (X, T((2, 2, 6)), 1, 1, 3), "([d0, x, d2], [d0, y, d2]) -> ([d0, x, d2]) whole={x, y}"),
    (
        "scatter_add",
        (X, 1, T((2, 4, 6), "index", 5), T((2, 4, 6))),
        "([d0, x1, d2], [d0, i1, d2], [d0, y1, d2]) -> ([d0, x1, d2]) whole={i1, x1, y1}",
    ),
    (
        "index_put",
        (X, [None, T((4,), "index", 5)], T((4, 6))),
        "([d0, w1, d2], [n0], [n0, d2]) -> ([d0, w1, d2]) whole={n0, w1}",
    ),
    (
        "index_add",
        (X, 1, T((4,), "index", 5), T((2, 4, 6))),
        "([d0, w, d2], [n], [d0, n, d2]) -> ([d0, w, d2]) whole={n, w}",
    ),
    ("avg_pool1d", (X, [2]), "([d0, d1, x2]) -> ([d0, d1, y2]) whole={x2, y2}"),
    ("linalg_qr", (T((5, 3, 3)),), "([d0, x1, x2]) -> ([d0, y1, y2], [d0, y1, y2]) whole={x1, x2, y1, y2}"),
    ("meshgrid.indexing", ([T((5,)), T((6,))], {"indexing": "xy"}), "([a0], [a1]) -> ([a1, a0], [a1, a0])"),
    ("unfold", (X, 1, 2, 1), "([d0, x, d2]) -> ([d0, y, d2, n]) whole={n, x, y}"),
    (
        "scaled_dot_product_attention",
        (T((2, 4, 5, 8)), T((2, 4, 6, 8)), T((2, 4, 6, 3)), T((4, 5, 6))),
        "([b0, b1, m, d], [b0, b1, n, d], [b0, b1, n, e], [b1, m, n]) -> ([b0, b1, m, e]) whole={d, e, n}",
    ),
    (
        "scaled_dot_product_attention",
        (T((2, 4, 5, 8)), T((2, 2, 5, 8)), T((2, 2, 5, 8)), None, 0.0, True, {"enable_gqa": True}),
        "([b0, b1, m, d], [b0, hk, n, d], [b0, hk, n, e]) -> ([b0, b1, m, e]) whole={b1, d, e, hk, m, n}",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "text"), GOLDEN, ids=[name for name, *_ in GOLDEN])
def test_rules_print_in_one_line(name: str, arguments: tuple[Any, ...], text: str) -> None:
    (op,) = overloads(name)
    kwargs = arguments[-1] if isinstance(arguments[-1], dict) else {}
    _, found = rule_for(Sample(op, arguments[: len(arguments) - bool(kwargs)], kwargs))
    assert str(found) == text


def test_rules_of_symbolic_shapes_add_no_guard() -> None:
    """The same lines for symbolic sizes: nothing is decided by comparing a size with a number."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        heads = torch.nn.functional.linear(x, w).view(b, s, 4, 3).transpose(1, 2)
        return heads.reshape(b * 4, s, 3).flatten(0, 1).unflatten(0, (b, 4, s)) + heads.mean(2, keepdim=True)

    gm = make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(torch.ones(3, 7, 5), torch.ones(12, 5))
    shape_env = gm.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode.shape_env
    before = len(shape_env.guards)
    lines = [f"{n.target}: {rule_of(n)}" for n in gm.graph.nodes if n.target in RULES]
    assert lines == [
        "aten.linear.default: ([d0, d1, i], [o, i]) -> ([d0, d1, o]) reduction={i}",
        "aten.view.default: ([f0, f1, f2 f3]) -> ([f0, f1, f2, f3])",
        "aten.transpose.int: ([d0, d1, d2, d3]) -> ([d0, d2, d1, d3])",
        "aten.reshape.default: ([f0, f1, f2, f3]) -> ([f0 f1, f2, f3])",
        "aten.flatten.using_ints: ([f0, f1, f2]) -> ([f0 f1, f2])",
        "aten.unflatten.int: ([f0 f1 f2, f3]) -> ([f0, f1, f2, f3])",
        "aten.mean.dim: ([d0, d1, d2, d3]) -> ([d0, d1, 1, d3]) reduction={d2}",
        "aten.add.Tensor: ([d0, d1, d2, d3], [d0, d1, 1, d3]) -> ([d0, d1, d2, d3])",
    ]
    assert len(shape_env.guards) == before


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ((2, 3, 4), (6, 4), "f0|f1|f2 -> f0 f1|f2"),
        ((6, 4), (2, 3, 4), "f0 f1|f2 -> f0|f1|f2"),
        ((4, 6), (6, 4), "f0|f1 -> f2|f3, whole f0 f1 f2 f3"),
        ((2, 4, 6, 5), (2, 6, 4, 5), "f0|f1|f2|f5 -> f0|f3|f4|f5, whole f1 f2 f3 f4"),
        ((5, 5), (25,), "f0|f1 -> f0 f1"),
        ((2, 1, 3), (2, 3), "f0|f1|f2 -> f0 f1|f2"),
        ((1,), (1, 1), "f0 f1 -> f0|f1"),
        ((), (1,), " -> f0"),
        ((8,), (2, 2, 2), "f0 f1 f2 -> f0|f1|f2"),
    ],
)
def test_reshape_factors(before: tuple[int, ...], after: tuple[int, ...], text: str) -> None:
    ins, outs, sizes, whole = reshape_factors(before, after)
    found = " -> ".join("|".join(" ".join(d) for d in dims) for dims in (ins, outs))
    assert found + (f", whole {' '.join(sorted(whole))}" if whole else "") == text
    for dims, shape in ((ins, before), (outs, after)):
        for factors, n in zip(dims, shape, strict=True):
            product = 1
            for f in factors:
                product *= int(sizes[f])
            assert product == n


def test_quotient_is_exact() -> None:
    import sympy

    s = sympy.Symbol("s0", positive=True, integer=True)
    assert quotient(12, 4) == 3
    assert quotient(12, 5) is None
    assert quotient(8 * s, 4) == 2 * s
    assert quotient(8 * s, s) == 8
    assert quotient(s, 2 * s) is None
    assert quotient(s, 2) is None
    assert quotient(s * s + s, s + 1) == s


def test_contradictory_rules_cannot_be_made() -> None:
    dims = (("a",), ("b",))
    with pytest.raises(ValueError, match=r"factors \['c'\] are in no dimension"):
        OpRule((dims,), (dims,), whole=frozenset("c"))
    with pytest.raises(ValueError, match=r"reduction factors \['a'\] appear in a result"):
        OpRule((dims,), (dims,), reduction=frozenset("a"))
    with pytest.raises(ValueError, match="has a rule already"):
        rule([aten.add.Tensor])(lambda call: None)


def test_call_binds_arguments_by_name() -> None:
    recorder = torch.fx.Graph()
    x = recorder.placeholder("x")
    x.meta["val"] = torch.ones(2, 3)
    node = recorder.call_function(aten.sum.dim_IntList, (x, [1]), {"dtype": torch.float64})
    node.meta["val"] = torch.ones(2)
    call = Call(node)
    assert (call["self"], call["dim"], call["keepdim"], call["dtype"]) == (x, [1], False, torch.float64)
    assert call.rebuild() == ((x, [1]), {"dtype": torch.float64})
    assert call.rebuild(keepdim=True) == ((x, [1], True), {"dtype": torch.float64})
    assert call.operands == [x]


# Every operator that models use: measured on 80 public models at tiny size, re-traced to pre-dispatch ATen.
MODELS = """
add.Tensor linear scaled_dot_product_attention mul.Tensor to.dtype unsqueeze slice.Tensor reshape cat sin cos view silu
transpose.int layer_norm dropout to.dtype_layout chunk flatten.using_ints div.Tensor exp permute gelu arange.start neg
expand arange unflatten.int mean.dim pow.Tensor_Scalar rsqrt select.int unbind.int pow.Scalar reciprocal type_as
arange.start_step sub.Tensor embedding stack split_with_sizes index.Tensor outer to.device __and__.Tensor pad contiguous
alias rms_norm repeat_interleave.self_int new_ones copy_ squeeze.dim cumsum cross_entropy_loss conv2d repeat conv3d
eq.Tensor ne.Scalar meshgrid.indexing diff le.Tensor einsum tanh lift_fresh_copy sum.dim_IntList zeros matmul ones
view_as_complex view_as_real empty_like new_zeros detach_ ones_like linspace rsub.Scalar zeros_like softmax.int conv1d
index_put_ ge.Scalar relu where.self clamp clone polar concat div_.Tensor fill_.Tensor eq.Scalar gather gt.Tensor
leaky_relu numpy_T sigmoid avg_pool3d masked_fill.Scalar where.ScalarOther floor_divide topk lt.Tensor split.Tensor abs
le.Scalar ge.Tensor gt.Scalar any.dim max.dim index_select linalg_qr diag_embed addmm movedim.int avg_pool1d
pad_sequence argsort.stable square logical_not real imag sqrt complex index_copy argsort clip sort histc softplus bmm
full masked_fill_.Scalar conv_transpose1d __or__.Tensor bitwise_not lt.Scalar scatter_add mul_.Tensor all maximum max
group_norm conv2d.padding
""".split()
#: Those that are no ATen operators.
OTHERS = ["transformers::grouped_mm_fallback", "flex_attention"]
#: What `functionalize` makes of an in-place operator, where it is not the operator without its underscore.
FUNCTIONAL = {"copy_": "copy", "detach_": "detach", "fill_.Tensor": "fill"}


@pytest.mark.parametrize("name", MODELS)
def test_operators_of_models_are_accounted_for(name: str) -> None:
    """Each has a rule, or its own decision, or is named with the reason why its operands are made whole."""
    assert PIPELINE
    (op,) = overloads(name)
    schema = op._schema
    packet, _, overload = name.partition(".")
    if packet.endswith("_") and not packet.endswith("__"):
        assert name in FUNCTIONAL or any(o in RULES for o in overloads(f"{packet[:-1]}.{overload}".rstrip(".")))
    elif not any("Tensor" in str(a.type) for a in schema.arguments):
        assert op not in RULES  # a factory: nothing to split
    elif schema.name in ("aten::new_ones", "aten::new_zeros"):
        assert op not in RULES  # reads no data
    else:
        assert (op in RULES or op in family("elementwise_loss", "class_loss")) != (schema.name in WHOLE), name


def test_the_operators_of_models_are_all_there() -> None:
    """149 targets were measured: these, ``getitem`` (which takes a result apart), and two that surround autocast."""
    assert len({*MODELS, *OTHERS}) + 3 == 149


def test_the_list_of_whole_operators_is_tidy() -> None:
    assert {*OTHERS} <= WHOLE.keys()
    with_rule = {op._schema.name for op in RULES} | {f"{op._schema.name}.{op._overloadname}" for op in RULES}
    for name, reason in WHOLE.items():
        assert name not in with_rule
        assert reason[0].islower()
        if name.startswith("aten::"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            assert overload in ("", *getattr(aten, packet).overloads()), name
