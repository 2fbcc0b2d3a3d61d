"""Options, groups and meshes; several compiled models beside one another; what else than a model may be compiled."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fxsp
import fxsp.backend
from distributed import Pool
from fxsp import SequenceParallelInput, SequenceParallelOutput
from running import collectives, compiled, error_of, recorded
from small import SPLIT, Attention, Model, inputs

Ranks = Callable[[int], Pool]


def _seeded() -> Model:
    torch.manual_seed(1)
    return Model()


class Planned(Model):
    """A model with a plan of its own."""

    _sp_plan = SPLIT


def test_reports_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fxsp.backend._reports
    assert kept.maxlen == fxsp.backend.REPORTS_KEPT
    monkeypatch.setattr(fxsp.backend, "_reports", type(kept)(maxlen=2))
    for name in "abc":
        fxsp.backend.keep_report(fxsp.Report(root=name))
    assert [report.root for report in fxsp.reports()] == ["b", "c"], "the oldest is let go, the newest is last"


# --- the inner compiler and its mode ----------------------------------------------------------------------------------


def test_mode_alone_and_mode_in_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def compile_inner(gm: Any, args: Any, inner: str, mode: str | None, training: bool) -> Any:
        seen.append((inner, mode))
        return gm.forward

    monkeypatch.setattr(fxsp.backend, "compile_inner", compile_inner)
    model = Planned()
    for keywords in (
        {"mode": "max-autotune"},
        {"options": {"mode": "reduce-overhead"}},
        {"options": {"inner": "eager"}},
        {},
    ):
        torch.compile(model, backend="sp", **keywords)(inputs())  # type: ignore[call-overload]
    assert seen == [("inductor", "max-autotune"), ("inductor", "reduce-overhead"), ("eager", None), ("inductor", None)]
    with pytest.raises(fxsp.OptionError, match="'max-autotune-no-cudagraphs'"):
        torch.compile(model, backend="sp", options={"mode": "fastest"})(inputs())


def _inners(rank: int, size: int) -> list[tuple[float, dict[str, int]]]:
    model, found = _seeded(), []
    for options in ({"inner": "eager"}, {"inner": "aot_eager"}, {"inner": "aot_eager", "ulysses_degree": 2}):
        fast = compiled(model, plan=SPLIT, **options)
        with torch.no_grad():
            fast(inputs())
            with collectives() as ran:
                out = fast(inputs())
        found.append((error_of(out, model(inputs())), dict(ran)))
    return found


def test_inner_compilers_run_the_same_collectives(ranks: Ranks) -> None:
    for found in ranks(2).run(_inners):
        for error, ran in found:
            assert error < 1e-6
            assert ran == {"all_to_all": 4, "all_gather": 1}


# --- which ranks ------------------------------------------------------------------------------------------------------


def _two_axes() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))


def _mesh(rank: int, size: int) -> list[float]:
    """Ranks 0 and 1 share one input, ranks 2 and 3 another."""
    mesh, model = _two_axes(), _seeded()
    x = inputs(seed=mesh.get_local_rank("data"))
    errors = []
    for options in ({"mesh": mesh["sequence"]}, {"group": mesh["sequence"].get_group()}):
        fast = compiled(model, plan=SPLIT, check_inputs=True, **options)
        out = fast(x)
        errors.append(error_of(out, model(x)))
        out.sum().backward()
        gradient = model.blocks[0].qkv.weight.grad
        model.zero_grad()
        model(x).sum().backward()
        errors.append(error_of(gradient, model.blocks[0].qkv.weight.grad))
        model.zero_grad()
        torch.compiler.reset()
    with pytest.raises(fxsp.OptionError, match=r"mesh\['sequence'\]"):
        compiled(model, plan=SPLIT, mesh=mesh)(x)
    return errors


def test_a_mesh_or_group_names_the_ranks(ranks: Ranks) -> None:
    assert max(max(errors) for errors in ranks(4).run(_mesh)) < 1e-5


def _some(rank: int, size: int) -> str | float:
    group = dist.new_group([0, 2])
    model = _seeded()
    try:
        fast = compiled(model, plan=SPLIT, group=group)
        return error_of(fast(inputs()), model(inputs()))
    except fxsp.OptionError as error:
        return str(error)


def test_a_rank_outside_of_the_group_is_told_so(ranks: Ranks) -> None:
    zero, one, two = ranks(3).run(_some)
    assert zero < 1e-6
    assert two < 1e-6
    assert "no member of the group" in one


# --- several compiled models ------------------------------------------------------------------------------------------


def _twice(rank: int, size: int) -> None:
    model, other, x = _seeded(), Planned(), inputs()
    expected = model(x)
    first = compiled(model, plan=SPLIT)
    blocks = compiled(
        model, plan={"blocks.1": {"hidden": SequenceParallelInput(1)}, "blocks.1.out": SequenceParallelOutput(1)}
    )
    third = compiled(other)
    start = len(fxsp.reports())
    for _ in range(2):
        for fast, wanted in ((first, expected), (blocks, expected), (third, other(x))):
            torch.testing.assert_close(fast(x), wanted)
    methods = [[a.module for a in report.attentions] for report in fxsp.reports()[start:]]
    assert methods == [["blocks.0", "blocks.1"], ["blocks.1"], ["blocks.0", "blocks.1"]]


def test_one_model_compiled_twice_and_another_beside_it(ranks: Ranks) -> None:
    ranks(2).run(_twice)


class Stack(nn.Module):
    """One block twice, another called through ``forward`` and a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.direct, self.inner = Attention(), Attention(), Model()

    def forward(self, x: Tensor) -> Tensor:
        return self.direct.forward(self.shared(self.shared(x)))

    def embed(self, x: Tensor) -> Tensor:
        return self.shared(x) * 2


def _callables(rank: int, size: int) -> dict[str, tuple[float, int, list[str]]]:
    torch.manual_seed(1)
    stack, x = Stack(), inputs()
    shared = {"shared": {"hidden": SequenceParallelInput(1)}, "": {"x": SequenceParallelInput(1)}}
    block = {"shared": {"hidden": SequenceParallelInput(1)}}

    def step(y: Tensor) -> Tensor:
        return stack(y).square().mean()

    cases: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
        "model": (stack, shared),
        "lambda": (lambda y: stack(y) + 1, block),
        "function": (step, block),
        "method": (stack.embed, block),
        "bound forward": (stack.forward, shared),
    }
    found = {}
    for name, (function, plan) in cases.items():
        torch.compiler.reset()
        before = len(fxsp.reports())
        with recorded() as texts:
            out = torch.compile(function, backend="sp", options={"inner": "aot_eager", "plan": plan})(x)
        reports = fxsp.reports()[before:]
        found[name] = (error_of(out, function(x)), sum(len(r.attentions) for r in reports), texts)
    torch.compiler.reset()
    # A submodule, compiled in place, inside of a model that is not.
    before = len(fxsp.reports())
    wanted = stack.inner(x)
    stack.inner = compiled(stack.inner, plan=SPLIT)
    found["submodule"] = (error_of(stack.inner(x), wanted), len(fxsp.reports()[before].attentions), [])
    torch.compiler.reset()
    # `nn.Module.compile` compiles the call of a module in place.
    model = _seeded()
    wanted = model(x)
    before = len(fxsp.reports())
    model.compile(backend="sp", options={"inner": "aot_eager", "plan": SPLIT})
    found["compiled in place"] = (error_of(model(x), wanted), len(fxsp.reports()[before].attentions), [])
    return found


def test_what_may_be_compiled(ranks: Ranks) -> None:
    attentions = {
        "model": 3,
        "lambda": 3,
        "function": 3,
        "method": 1,
        "bound forward": 3,
        "submodule": 2,
        "compiled in place": 2,
    }
    for found in ranks(2).run(_callables):
        for name, (error, rewritten, texts) in found.items():
            assert error < 1e-6, name
            assert rewritten == attentions[name], (name, texts)
            assert not texts, name


# --- beside data parallelism ------------------------------------------------------------------------------------------


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    clean = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in clean.items() if g is not None}


def _expected(mesh: DeviceMesh) -> tuple[Tensor, dict[str, Tensor]]:
    """What data parallelism on two data ranks computes: the mean of the gradients of two batches."""
    model = _seeded()
    for seed in range(2):
        (model(inputs(seed=seed)).square().mean() / 2).backward()
    return model(inputs(seed=mesh.get_local_rank("data"))), _gradients(model)


def _compare(out: Tensor, model: nn.Module, mesh: DeviceMesh) -> dict[str, float]:
    wanted, gradients = _expected(mesh)
    found = _gradients(model)
    assert found.keys() == gradients.keys()
    return {"output": error_of(out, wanted), **{name: error_of(found[name], g) for name, g in gradients.items()}}


def _ddp(rank: int, size: int) -> list[dict[str, float]]:
    mesh, found = _two_axes(), []
    x = inputs(seed=mesh.get_local_rank("data"))
    options = {"inner": "aot_eager", "plan": SPLIT, "mesh": mesh["sequence"]}
    for inside in (True, False):
        torch.compiler.reset()
        model = _seeded()
        group = mesh["data"].get_group()
        if inside:  # the compiled model inside of DDP
            run = wrapped = nn.parallel.DistributedDataParallel(
                torch.compile(model, backend="sp", options=options), process_group=group
            )
        else:
            wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)
            run = torch.compile(wrapped, backend="sp", options=options)
        out = run(x)
        out.square().mean().backward()
        assert fxsp.reports()[-1].attentions, fxsp.reports()[-1]
        found.append(_compare(out, model, mesh))
    return found


def test_data_parallelism(ranks: Ranks) -> None:
    for found in ranks(4).run(_ddp):
        for errors in found:
            assert max(errors.values()) < 1e-5, errors


def _fsdp(rank: int, size: int) -> dict[str, tuple[list[str], dict[str, float]]]:
    """Wrapped as a whole; block by block and then the rest; and resharded between forward and backward or not."""
    from torch.distributed.fsdp import fully_shard

    mesh, found = _two_axes(), {}
    x = inputs(seed=mesh.get_local_rank("data"))
    options = {"inner": "aot_eager", "plan": SPLIT, "mesh": mesh["sequence"]}
    for name, wrapped, reshard in (
        ("whole", lambda model: [model], True),
        ("blocks", lambda model: [*model.blocks, model], True),
        ("blocks and head, kept", lambda model: [*model.blocks, model.head, model], False),
    ):
        torch.compiler.reset()
        model = _seeded()
        for module in wrapped(model):
            fully_shard(module, mesh=mesh["data"], reshard_after_forward=reshard)
        before = len(fxsp.reports())
        with contextlib.redirect_stdout(io.StringIO()), recorded() as texts:
            fast = torch.compile(model, backend="sp", options=options)
            out = fast(x)
        out.square().mean().backward()
        methods = [record.method for report in fxsp.reports()[before:] for record in report.attentions]
        found[name] = [*methods, *texts], _compare(out, model, mesh)
    return found


def test_fully_sharded_data_parallelism(ranks: Ranks) -> None:
    for found in ranks(4).run(_fsdp):
        for name, (attentions, errors) in found.items():
            assert attentions == ["ulysses", "ulysses"], name
            assert max(errors.values()) < 1e-5, (name, errors)
