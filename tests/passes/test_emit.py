"""Emitted graphs: numbers as on one process, collectives counted, gradients in buckets, one graph for all lengths."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from test_adjoints import PROGRAMS, Tokens, cases, values_and_gradients
from torch.fx.experimental.proxy_tensor import make_fx

import fxsp.inner
from distributed import run_ranks
from fxsp.errors import OptionError, VerificationError
from fxsp.inner import compile_inner
from fxsp.inspection.profiler_names import named_collective
from fxsp.passes.emit import emit as emit_pass

fx = torch.ops.fxsp
GROUP = "0"


class Recorder:
    """Compiles with an inner compiler; counts graphs, and collectives in each emitted graph."""

    def __init__(self, inner="aot_eager", training=False):
        self.inner, self.training = inner, training
        self.graphs = 0
        self.collectives: list[Counter] = []

    def __call__(self, gm, inputs):
        self.graphs += 1
        return compile_inner(gm, inputs, self.inner, None, self.training)

    def emit(self, graph, **options):
        emit_pass.emit(graph, **options)
        self.collectives.append(collectives_of(graph))

    def __enter__(self):
        """While calls are made and gradients are asked for: AOTAutograd compiles a backward graph when it is needed."""
        self.patch = mock.patch.object(fxsp.inner, "emit", self.emit)
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()

    def compile(self, fn, **options):
        return torch.compile(fn, backend=self, fullgraph=True, **options)


def collectives_of(graph) -> Counter:
    names = [str(n.target).split(".")[1] for n in graph.nodes if str(n.target).startswith("_c10d_functional")]
    named = [n.args[1:3] for n in graph.nodes if n.target is named_collective]
    names += [name for namespace, name in named if namespace == "_c10d_functional"]
    return Counter(name for name in names if name != "wait_tensor")


def test_unknown_inner():
    with pytest.raises(OptionError, match=r"'nope' is not known; valid are 'inductor', 'aot_eager', 'eager'"):
        compile_inner(torch.fx.symbolic_trace(torch.nn.Identity()), [], "nope")


def traced(fn, *args):
    return make_fx(fn, tracing_mode="fake")(*args).graph


def test_no_fxsp_op_is_left_and_lines_are_kept():
    graph = traced(lambda x: fx.gather(fx.use(x, GROUP), 1, [7], [False], 0, 2, GROUP) + 1, torch.randn(2, 4, 3))
    for node in graph.nodes:
        node.meta["stack_trace"] = f"line of {node.name}"
    emit_pass.emit(graph)
    graph.lint()
    assert not any("fxsp" in str(node.target) for node in graph.nodes)
    assert collectives_of(graph) == {"all_gather_into_tensor": 1}
    gather = next(n for n in graph.nodes if "all_gather" in str(n.target))
    assert gather.meta["stack_trace"] == "line of gather"
    assert gather.meta["val"].shape == (8, 2, 3)
    assert "wait_tensor" in {n.target.__name__.split(".")[0] for n in gather.users}


def test_what_emit_cannot_replace_is_an_error():
    graph = traced(lambda x: fx.use(x, GROUP) + 1, torch.randn(2))
    with (
        mock.patch.object(emit_pass, "_replace", return_value=None),
        pytest.raises(VerificationError, match="emit left fxsp ops in the graph: use"),
    ):
        emit_pass.emit(graph)


def test_identical_nodes_are_traced_once_and_do_not_share_memory():
    def fn(x):
        for _ in range(20):
            x = fx.all_to_all(x, GROUP) + 1
        return x

    graph = traced(fn, torch.randn(2, 3))
    with mock.patch.object(emit_pass, "make_fx", wraps=make_fx) as trace:
        emit_pass.emit(graph)
    assert trace.call_count == 1
    assert collectives_of(graph) == {"all_to_all_single": 20}
    storages = {n.meta["val"].untyped_storage()._cdata for n in graph.nodes if "all_to_all" in str(n.target)}
    assert len(storages) == 20


def test_results_that_were_their_own_tensor_stay_so():
    def fn(x):
        y = x + 1
        return fx.use(x, GROUP), y, fx.use(y, GROUP), fx.take(x, 0, 1, 2), fx.use(y * 2, GROUP)

    graph = traced(fn, torch.randn(4, 3))
    emit_pass.emit(graph)
    outputs = graph.output_node().args[0]
    assert [str(n.target) for n in outputs] == [
        "aten.clone.default",
        "aten.add.Tensor",
        "aten.clone.default",
        "aten.clone.default",
        "aten.mul.Tensor",
    ]


def test_buckets_of_gradients():
    def fn(a, b, c, h, x):
        big = [fx.reduce_grad(t * 2, GROUP) for t in (a, b, c)]
        half = fx.reduce_grad(h + h, GROUP)
        inner = fx.reduce_grad(x, GROUP) * 3  # not a result of the graph
        return (*big, half, inner)

    inputs = (torch.randn(2, 3), torch.randn(5), torch.randn(4, 1), torch.randn(7).bfloat16(), torch.randn(2))
    for limit, expected in ((25 * 2**20, 2), (4 * (6 + 5), 3), (0, 5)):
        graph = traced(fn, *inputs)
        shapes = [(n.meta["val"].shape, n.meta["val"].dtype) for n in graph.output_node().args[0]]
        emit_pass.emit(graph, limit)
        graph.lint()
        assert collectives_of(graph) == {"all_reduce": expected}, limit
        assert [(n.meta["val"].shape, n.meta["val"].dtype) for n in graph.output_node().args[0]] == shapes
        started = [n for n in graph.nodes if "all_reduce" in str(n.target)]
        assert all(n.args[0].meta["val"].dtype == torch.float32 for n in started)


def run_programs(rank, size, inner, inputs):
    group = GROUP if size > 1 else ""
    answers = []
    for tokens, args in inputs:
        for _, local in PROGRAMS.values():
            with Recorder(inner, training=True) as recorder:
                fn = recorder.compile(lambda x, w, v, f=local, t=tokens: f(x, w, v, t, rank, group))
                answers.append((values_and_gradients(fn, *args), recorder.collectives))
            torch.compiler.reset()
    return answers


@pytest.mark.parametrize(
    ("size", "inner", "which"), [(2, "aot_eager", (2, 7)), (3, "aot_eager", (4,)), (3, "eager", (2, 4, 7))]
)
def test_compiled_programs_equal_one_process(ranks, size, inner, which):
    torch.manual_seed(1)
    chosen = [cases(size)[i] for i in which]
    inputs = [
        (t, [torch.randn(*shape, dtype=torch.float64) for shape in ((2, t.total(), 4), (4, 4), (4, 4))]) for t in chosen
    ]
    plain = [(name, t, values_and_gradients(f, *args)) for t, args in inputs for name, (f, _) in PROGRAMS.items()]
    for answers in ranks(size).run(run_programs, inner, inputs):
        for (name, tokens, expected), (got, collectives) in zip(plain, answers, strict=True):
            torch.testing.assert_close(got, expected, msg=lambda m, s=f"{name}, {tokens}": f"{s}: {m}")
            if inner == "aot_eager" and name == "mlp" and not any(tokens.whole):
                # forward: the result; backward: x whole, and both weights in one bucket
                assert collectives == [{"all_gather_into_tensor": 1}, {"all_gather_into_tensor": 1, "all_reduce": 1}]


def run_dynamic(rank, size, lengths):
    """One training graph and one inference graph for all lengths."""

    def fn(x, w):
        n = x.shape[1]
        at = (1, [n], [False], rank, size)
        y = fx.shard(x, *at[:3], False, rank, size, GROUP) @ fx.use(w, GROUP)
        mean = fx.all_reduce(fx.mask_pads(y, *at).sum(1, keepdim=True), GROUP) / n
        where = fx.positions([n], [False], rank, size, x.device)
        y = torch.tanh(y + fx.use(mean, GROUP)) * where[None, :, None]
        y = y @ fx.gather_used(y, *at, GROUP).mT @ fx.gather_used(y, *at, GROUP)
        return fx.gather(y, *at, GROUP)

    def plain(x, w):
        y = x @ w
        y = torch.tanh(y + y.mean(1, keepdim=True)) * torch.arange(x.shape[1])[None, :, None]
        return y @ y.mT @ y

    recorder = Recorder(training=True)
    compiled = recorder.compile(fn)
    graphs = []
    for n in lengths:
        x, w = torch.randn(2, n, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
        answers = []
        for each in (compiled, plain):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            torch._dynamo.maybe_mark_dynamic(a, 1)
            y = each(a, b)
            answers.append([y.detach(), *torch.autograd.grad((y * torch.linspace(0, 1, 4)).sum(), (a, b))])
            with torch.no_grad():
                z = x.clone()
                torch._dynamo.maybe_mark_dynamic(z, 1)
                answers[-1].append(each(z, w))
        torch.testing.assert_close(*answers)
        graphs.append(recorder.graphs)
    return graphs


@pytest.mark.parametrize("size", [2, 3])
def test_one_graph_serves_dividing_and_other_lengths(ranks, size):
    for graphs in ranks(size).run(run_dynamic, [12, 7, 13, 5, size - 1]):
        assert graphs[:4] == [2] * 4
        assert graphs[-1] <= 4  # one row on each rank: sizes of one are special to torch


def run_segments(rank, size, pairs):
    """Two dynamic segments in one sequence, the second whole or split."""
    graphs = []
    for whole in (False, True):

        def fn(a, b, whole=whole):
            lengths, entire = [a.shape[1], b.shape[1]], [False, whole]
            x = torch.cat([a, b], 1)
            y = fx.shard(x, 1, lengths, entire, False, rank, size, GROUP).sin()
            return fx.gather(y, 1, lengths, entire, rank, size, GROUP)

        recorder = Recorder(training=True)
        compiled = recorder.compile(fn, dynamic=True)
        for n, m in pairs:
            a, b = torch.randn(2, n, 4, requires_grad=True), torch.randn(2, m, 4, requires_grad=True)
            y = compiled(a, b)
            torch.testing.assert_close(y, torch.cat([a, b], 1).sin())
            ga, gb = torch.autograd.grad(y.sum(), (a, b))
            torch.testing.assert_close((ga, gb), (a.cos(), b.cos()))
        graphs.append(recorder.graphs)
    return graphs


def test_dynamic_segments(ranks):
    assert ranks(2).run(run_segments, [(5, 8), (6, 3), (9, 10)]) == [[1, 1]] * 2


def run_inductor(rank, size):
    tokens = cases(size)[4]
    torch.manual_seed(1)
    args = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, tokens.total(), 4), (4, 4), (4, 4))]
    with Recorder("inductor", training=True) as recorder:
        fn = recorder.compile(lambda x, w, v: PROGRAMS["attention"][1](x, w, v, tokens, rank, GROUP))
        got = values_and_gradients(fn, *args)
    expected = values_and_gradients(PROGRAMS["attention"][0], *args)
    torch.testing.assert_close(got, expected)
    return recorder.collectives


def run_eager_inference(rank, size):
    """From a graph with fakes (emitted) and without."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w, v = torch.randn(2, 7, 4), torch.randn(4, 4), torch.randn(4, 4)
    tokens = Tokens((7,), (False,), size)

    def fn(x, w, v):
        return PROGRAMS["attention"][1](x, w, v, tokens, rank, GROUP)

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, w, v)]
        with_fakes = make_fx(fn)(*fakes)
    without = torch.fx.GraphModule(with_fakes, torch.fx.Graph())
    without.graph.output(without.graph.graph_copy(with_fakes.graph, {}))
    for node in without.graph.nodes:
        node.meta.pop("val", None)
    for gm in (with_fakes, without):
        run = compile_inner(gm, fakes, "eager")
        torch.testing.assert_close(run(x, w, v), PROGRAMS["attention"][0](x, w, v))
    return collectives_of(with_fakes.graph), collectives_of(without.graph)


def test_eager_inference(ranks):
    assert ranks(2).run(run_eager_inference) == [({"all_gather_into_tensor": 3}, {})] * 2


@pytest.mark.slow
def test_inductor(tmp_path, monkeypatch):
    """Right, and the collectives are visible to it.  Its caches: test_caches.py."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for collectives in run_ranks(2, run_inductor, timeout=600):
        assert collectives == [
            {"all_gather_into_tensor": 3},
            {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 2, "all_reduce": 1},
        ]
