"""Models quantized by torchao: what quantizes an activation sees all the tokens that it sees on one device."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxsp
import models
from running import error_of
from subclasses import Block

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about kernels that it does not find
    quantization: Any = pytest.importorskip("torchao.quantization")

PLAN = {"": {"x": fxsp.SequenceParallelInput(1)}}


def _float8(granularity: Any) -> Callable[[nn.Module], None]:
    """``Float8DynamicActivationFloat8WeightConfig`` without its look at the device: operators of torch do it all."""
    module = importlib.import_module("torchao.quantization.quantize_.workflows.float8.float8_tensor")
    mm = importlib.import_module("torchao.float8.inference").Float8MMConfig(use_fast_accum=False)
    torch_kernels = module.KernelPreference.TORCH

    def quantize(model: nn.Module) -> None:
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            how = module.QuantizeTensorToFloat8Kwargs(
                granularity=granularity, mm_config=mm, kernel_preference=torch_kernels
            )
            weight = module.Float8Tensor.from_hp(
                layer.weight.detach(),
                granularity=granularity,
                mm_config=mm,
                act_quant_kwargs=how,
                kernel_preference=torch_kernels,
            )
            layer.weight = nn.Parameter(weight, requires_grad=False)

    return quantize


def _by(config: str, **arguments: Any) -> Callable[[nn.Module], None]:
    return lambda model: quantization.quantize_(model, getattr(quantization, config)(**arguments))


PER_TENSOR, PER_ROW = quantization.PerTensor(), quantization.PerRow()

#: name -> what quantizes a model.
WAYS: dict[str, Callable[[nn.Module], None]] = {
    "int8": _by("Int8WeightOnlyConfig"),
    "intx": _by("IntxWeightOnlyConfig"),
    "float8": _by("Float8WeightOnlyConfig"),
    "int8 per token": _by("Int8DynamicActivationInt8WeightConfig"),
    "int8 per tensor": _by("Int8DynamicActivationInt8WeightConfig", granularity=PER_TENSOR),
    "int8 asymmetric": _by("Int8DynamicActivationIntxWeightConfig"),
    "float8 per row": _float8(PER_ROW),
    "float8 per tensor": _float8(PER_TENSOR),
}


#: Ways that leave activations as they are.
EXACT = ("int8", "intx", "float8")


class Layer(nn.Module):
    """Nothing before it rounds, so its activations are rounded alike wherever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def _quantized(way: str, make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = make().eval()
    WAYS[way](model)
    x = torch.randn(2, 13, 64)
    x[:, -1] *= 30  # one token decides the scale of a tensor
    return model, x


def _block() -> nn.Module:
    return Block(64)


def _check(evidence: fxsp.offline.verify.Evidence, tolerance: float) -> None:
    for graph in evidence.graphs:
        assert not graph.unsharded
        assert max((*graph.outputs, *graph.gradients)) < tolerance, str(graph)


@pytest.mark.parametrize("way", WAYS)
def test_one_layer(way: str) -> None:
    model, x = _quantized(way, Layer)
    with torch.no_grad():
        evidence = fxsp.verify(model, x, world_size=(2, 3, 8), plan=PLAN)
        whole, parts = model(x), torch.cat([model(part) for part in x.split(7, 1)], 1)
    _check(evidence, 1e-5)
    gathers = [g for graph in evidence.graphs for g in graph.report.implicit_gathers if g.kind == "implicit"]
    assert {str(g).partition(" ")[0] for g in gathers} <= {"aten.amin.default", "aten.amax.default"}
    if way.endswith("per tensor"):
        assert error_of(parts, whole) > 1e-3  # what scales of a rank's own tokens would give
    else:
        assert not gathers


@pytest.mark.parametrize("way", ["int8", "intx", "float8", "int8 per token", "float8 per tensor"])
def test_one_block(way: str) -> None:
    """Behind other layers an activation may be rounded up on fewer rows, and down on more.

    One step of 255, or of 8 in a float8 number, is not an error of the partitioned program.
    """
    model, x = _quantized(way, _block)
    with torch.no_grad():
        evidence = fxsp.verify(model, x, world_size=(2, 8), plan=PLAN)
    _check(evidence, 1e-5 if way in EXACT else 1e-2)
    assert {graph.report.attentions[0].method for graph in evidence.graphs} <= {
        "ulysses",
        "gather_kv",
        "ring",
        "hybrid",
    }


@pytest.mark.parametrize("way", ["int8", "int8 per token"])
def test_training_beside(way: str) -> None:
    """What stands beside the frozen weights learns, as in an adapter."""
    model, x = _quantized(way, _block if way in EXACT else Layer)
    _check(fxsp.verify(model, x.requires_grad_(), world_size=(2, 3), plan=PLAN), 1e-5)


@pytest.mark.parametrize("way", ["int8", "int8 per token"])
@pytest.mark.parametrize("name", ["flux", "llama"])
def test_real_models(name: str, way: str) -> None:
    model, inputs = getattr(models, name)()
    WAYS[way](model.eval())
    assert any(type(p).__name__ == "Int8Tensor" for p in model.parameters())
    plan = None if name == "flux" else {"": {"input_ids": fxsp.SequenceParallelInput(1)}}
    with torch.no_grad():
        evidence = fxsp.verify(model, world_size=(2, 3), plan=plan, **inputs)
    _check(evidence, 1e-5 if way in EXACT else 1e-2)
    for graph in evidence.graphs:
        assert not [g for g in graph.report.implicit_gathers if g.kind == "implicit"]


def _on_ranks(rank: int, size: int) -> dict[str, float]:
    errors = {}
    for way in ("int8", "int8 per token", "int8 per tensor", "float8 per row", "float8 per tensor"):
        torch.compiler.reset()
        model, x = _quantized(way, Layer)
        with torch.no_grad():
            fast = torch.compile(model, backend="sp", options={"plan": PLAN, "inner": "aot_eager"})
            errors[way] = error_of(fast(x), model(x))
    return errors


@pytest.mark.filterwarnings("ignore::fxsp.errors.FxspWarning")
def test_on_real_ranks(ranks: Any) -> None:
    for errors in ranks(2).run(_on_ranks, timeout=240.0):
        assert len(errors) == 5
        assert max(errors.values()) < 1e-5, errors
