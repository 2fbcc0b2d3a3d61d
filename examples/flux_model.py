"""A small Flux: diffusers' own class, random weights.  What the demo and the benchmark run."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["build", "inputs", "self_attentions"]


def build(blocks: int = 2, single_blocks: int = 2, heads: int = 4, head_dim: int = 64) -> torch.nn.Module:
    """diffusers' ``FluxTransformer2DModel``, the same weights at each call and on each rank."""
    from diffusers import FluxTransformer2DModel

    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    axis = head_dim // 8 * 3  # of the rows and columns of the image
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=blocks,
        num_single_layers=single_blocks,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(head_dim - 2 * axis, axis, axis),
    )
    torch.random.set_rng_state(state)
    return model.eval().requires_grad_(False)


def inputs(image: int = 1024, text: int = 128, batch: int = 1) -> dict[str, Any]:
    """Arguments of the model's forward: ``image`` and ``text`` tokens, float32, the same on each rank."""
    generator = torch.Generator().manual_seed(1)
    columns = max(1, int(image**0.5))
    img_ids = torch.zeros(image, 3)
    img_ids[:, 1] = torch.arange(image) // columns
    img_ids[:, 2] = torch.arange(image) % columns
    return {
        "hidden_states": torch.randn(batch, image, 64, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 128, generator=generator),
        "pooled_projections": torch.randn(batch, 64, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": img_ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def self_attentions(model: torch.nn.Module) -> int:
    """Attentions of one forward pass: one in each block."""
    return len(model.transformer_blocks) + len(model.single_transformer_blocks)  # type: ignore[arg-type]
