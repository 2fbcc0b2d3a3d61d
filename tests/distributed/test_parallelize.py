"""``fxsp.parallelize``: what is compiled of a model and of a pipeline, and that it computes the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxsp
import models
from distributed import Pool
from fxsp.parts import denoisers, repeated_blocks
from running import error_of

EAGER = {"inner": "aot_eager"}
PLAN = {"": {"x": fxsp.SequenceParallelInput(split_dim=1)}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Model(nn.Module):
    def __init__(self, blocks: int = 3, tables: int = 1, head: int = 8) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(50, 8) for _ in range(tables)])
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(8, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def compiled(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if part._compiled_call_impl is not None]


def flux_pipeline() -> Any:
    """Prompts come as embeddings, pictures stay latent: what is left is the loop over the denoiser."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=scheduler, transformer=models.flux(layers=2, single_layers=2)[0], **nothing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _picture(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 7, 32, generator=generator)
    picture: torch.Tensor = pipeline(
        prompt_embeds=prompt, pooled_prompt_embeds=prompt[:, 0], height=48, width=80, num_inference_steps=2,
        generator=generator, output_type="latent",
    ).images  # fmt: skip
    return picture


def _flux(rank: int, size: int) -> tuple[float, bool, str, int, list[str]]:
    pipeline = flux_pipeline()
    wanted = _picture(pipeline)
    same = fxsp.parallelize(pipeline, options=EAGER) is pipeline
    before = len(fxsp.reports())
    error = error_of(_picture(pipeline), wanted)
    report = fxsp.report_of(pipeline)
    return error, same, report.root, len(fxsp.reports()) - before, sorted(report.communication)


def test_a_pipeline_of_diffusers(ranks: Callable[[int], Pool]) -> None:
    for error, same, root, graphs, kinds in ranks(2).run(_flux):
        assert error <= 1e-5
        assert same
        assert (root, graphs) == ("FluxPipeline", 2), "one graph for each kind of block"
        assert "all_to_all" in kinds


def _llama(rank: int, size: int, regional: Any) -> tuple[float, list[str], int, set[str]]:
    model, inputs = models.llama(layers=2)
    whole = copy.deepcopy(model)
    assert fxsp.parallelize(model, regional=regional, options=EAGER) is model
    before = len(fxsp.reports())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsp.FxspWarning)
        error = error_of(models.first_tensor(model(**inputs)), models.first_tensor(whole(**inputs)))
    kinds = set(fxsp.report_of(model).communication)
    return error, [type(model.get_submodule(n)).__name__ for n in compiled(model)], len(fxsp.reports()) - before, kinds


@pytest.mark.parametrize(("regional", "parts"), [("auto", ["LlamaDecoderLayer"] * 2), (False, ["LlamaForCausalLM"])])
def test_a_model_of_transformers(regional: Any, parts: list[str], ranks: Callable[[int], Pool]) -> None:
    for error, found, graphs, kinds in ranks(2).run(_llama, regional):
        assert error <= 1e-5
        assert (found, graphs) == (parts, 1)
        assert "all_to_all" in kinds


def test_both_denoisers_of_wan() -> None:
    """Wan 2.2 has two, of which either may be missing."""
    pipeline = SimpleNamespace(transformer=models.wan(layers=2)[0], transformer_2=models.wan(layers=3)[0], vae=Block())
    assert fxsp.parallelize(pipeline, options=EAGER) is pipeline
    assert compiled(pipeline.transformer) == ["blocks.0", "blocks.1"]
    assert compiled(pipeline.transformer_2) == ["blocks.0", "blocks.1", "blocks.2"]
    assert compiled(pipeline.vae) == []
    assert fxsp.report_of(pipeline).graphs == ()
    assert list(denoisers(SimpleNamespace(transformer=None, transformer_2=Model()))) == ["transformer_2"]


@pytest.mark.parametrize(
    ("model", "arguments", "parts"),
    [
        (Model(), {}, ["blocks.0", "blocks.1", "blocks.2"]),
        (Model(), {"regional": False}, [""]),
        (Model(), {"plan": PLAN}, [""]),
        (Model(), {"plan": PLAN, "regional": True}, ["blocks.0", "blocks.1", "blocks.2"]),
        (Model(blocks=1), {}, [""]),
        (Model(blocks=2, tables=3), {}, ["blocks.0", "blocks.1"]),
        (Model(blocks=2, head=500), {}, [""]),
        (nn.Linear(2, 2), {}, [""]),
    ],
)
def test_what_is_compiled(model: nn.Module, arguments: dict[str, Any], parts: list[str]) -> None:
    model = copy.deepcopy(model)
    assert fxsp.parallelize(model, options=EAGER, **arguments) is model
    assert compiled(model) == parts


def test_blocks_inside_of_blocks_are_theirs() -> None:
    class Outer(Model):
        _no_split_modules = ("Stage", "Block", "Embedding")

    class Stage(Model):
        pass

    model = Outer()
    model.blocks = nn.ModuleList([Stage(), Stage()])
    model.tables = nn.ModuleList()
    assert repeated_blocks(model) == list(model.blocks)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        ("flux", {}, TypeError, "takes a torch.nn.Module, or a pipeline .* not str"),
        (lambda x: x, {}, TypeError, r'torch.compile\(function, backend="sp"\)'),
        (Model, {}, TypeError, "not the class Model"),
        (SimpleNamespace(prior=Model()), {}, TypeError, "transformer, transformer_2, unet"),
        (nn.Linear(2, 2), {"regional": True}, fxsp.OptionError, "no repeated blocks are known of Linear"),
        (nn.Linear(2, 2), {"regional": "yes"}, fxsp.OptionError, "regional is 'yes'"),
        (nn.Linear(2, 2), {"options": {"iner": "eager"}}, fxsp.OptionError, "inner"),
        (nn.Linear(2, 2), {"mesh": 2}, fxsp.OptionError, "DeviceMesh"),
    ],
)
def test_what_is_refused(model: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fxsp.parallelize(model, **arguments)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(TypeError, match="as it is"):
        fxsp.parallelize(torch.compile(Model(), backend="eager"))
