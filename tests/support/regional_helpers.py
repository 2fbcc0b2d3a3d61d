"""Models that are compiled block by block beside what people put around them: step caches, offloading, adapters."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fxsp
import models
from regional import compile_blocks, sent
from running import build, error_of, gradient_error, recorded

__all__ = ["HELPERS", "Calls", "run_adapters", "run_helper"]


def _first_block_cache(model: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.3))


def _taylor_seer(model: Any) -> None:
    from diffusers.hooks import TaylorSeerCacheConfig

    model.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1))


def _broadcast(model: Any) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1000),
            spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
            current_timestep_callback=lambda: 500,
        )
    )


def _group_offload(model: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def _faster_cache(model: Any) -> None:
    from diffusers.hooks import FasterCacheConfig

    steps = iter(range(900, 0, -100))
    now = [next(steps)]
    model.register_forward_hook(lambda *_: now.__setitem__(0, next(steps)))
    model.enable_cache(
        FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 901),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 641),
            spatial_attention_block_identifiers=("blocks.*attn1",),
            tensor_format="BCFHW",
            current_timestep_callback=lambda: now[0],
        )
    )


def _mag_cache(model: Any) -> None:
    from diffusers.hooks import MagCacheConfig

    model.enable_cache(MagCacheConfig(threshold=0.5, retention_ratio=0.0, num_inference_steps=5, mag_ratios=[1.0] * 5))


def _image_prompts(model: Any) -> None:
    """As ``load_ip_adapter`` does."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(5)
    width = model.config.joint_attention_dim
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, width, 4)])
    model.set_attn_processor(
        {
            name: processor
            if name.startswith("single")
            else FluxIPAdapterAttnProcessor(model.inner_dim, width, num_tokens=[4])
            for name, processor in model.attn_processors.items()
        }
    )


def _leaf_offload(model: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")


def _offload(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _model_offload(model: Any) -> None:
    """As ``enable_model_cpu_offload`` of a pipeline does with each of its models."""
    import accelerate

    accelerate.cpu_offload_with_hook(model, torch.device("cpu"))


#: What is done to a model, before it is compiled or afterwards.
HELPERS: dict[str, Callable[[Any], None]] = {
    "first block cache": _first_block_cache,
    "taylor seer": _taylor_seer,
    "attention broadcast": _broadcast,
    "faster cache": _faster_cache,
    "mag cache": _mag_cache,
    "image prompts": _image_prompts,
    "group offload": _group_offload,
    "leaf offload": _leaf_offload,
    "accelerate": _offload,
    "model offload": _model_offload,
}


@dataclass
class Calls:
    """What one rank saw of several calls: relative errors, and the collectives of each."""

    errors: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    compiles: list[int] = field(default_factory=list)
    ran: list[dict[str, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _images(helper: str) -> dict[str, Any]:
    """What image prompts add to a call; the model takes it out of the dictionary."""
    if helper != "image prompts":
        return {}
    images = [torch.linspace(-1, 1, 8).view(1, 1, 8)]
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": images}}


def _context(model: Any) -> Any:
    return model.cache_context("a") if hasattr(model, "cache_context") else contextlib.nullcontext()


def run_helper(rank: int, size: int, name: str, helper: str, first: bool, arguments: dict[str, Any]) -> Calls:
    """Five steps of denoising, the last one far from those before.  ``first``: it is compiled before it is helped."""
    model, inputs = build(name, arguments)
    whole = copy.deepcopy(model)
    HELPERS[helper](whole)
    for step in ("compile", "help") if first else ("help", "compile"):
        if step == "help":
            HELPERS[helper](model)
        else:
            compile_blocks(model, model._repeated_blocks)  # type: ignore[arg-type]
    found, noise = Calls(), torch.Generator().manual_seed(1)
    with recorded() as texts, torch.no_grad():
        for scale in (0.05, 0.05, 0.05, 0.05, 1.0):
            x = inputs["hidden_states"]
            now = {**inputs, "hidden_states": x + scale * torch.randn(x.shape, generator=noise)}
            now |= _images(helper)
            with _context(whole):
                wanted = models.first_tensor(whole(**now))
            now |= _images(helper)
            before = len(fxsp.reports())
            with sent() as (ran, _), _context(model):
                got = models.first_tensor(model(**now))
            assert type(got) is torch.Tensor
            found.compiles.append(len(fxsp.reports()) - before)
            found.errors.append(error_of(got, wanted))
            found.ran.append(dict(ran))
    found.warnings = texts
    dist.barrier()
    return found


def run_adapters(rank: int, size: int, name: str) -> Calls:
    """Two adapters in turn, trained alone."""
    from peft import LoraConfig

    model, inputs = build(name, {})
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"]
    for adapter in ("one", "other"):
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
        model.add_adapter(config, adapter_name=adapter)  # type: ignore[operator]
    whole = copy.deepcopy(model)
    compile_blocks(model, model._repeated_blocks)  # type: ignore[arg-type]
    found = Calls()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in ("one", "one", "other", "other", "one"):
            before, results = len(fxsp.reports()), []
            for one in (whole, model):
                one.set_adapter(adapter)  # type: ignore[operator]
                one.zero_grad()
                with sent() as (ran, _):
                    results.append(models.first_tensor(one(**inputs)))
                results[-1].square().sum().backward()
            found.compiles.append(len(fxsp.reports()) - before)
            found.ran.append(dict(ran))
            found.errors.append(error_of(results[1], results[0]))
            found.gradients.append(_worst(model, whole))
    dist.barrier()
    return found


def _worst(model: nn.Module, whole: nn.Module) -> float:
    """The worst error of a gradient; only adapters have one."""
    rows = [(name, p.grad, q.grad) for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True)]
    assert all((a is None) == (b is None) and ("lora" in name or b is None) for name, a, b in rows)
    usual = max(b.norm().item() for _, _, b in rows if b is not None)
    return max(gradient_error(a, b, usual) for _, a, b in rows if a is not None and b is not None)
