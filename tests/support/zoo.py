"""More tiny models of real classes, each with a small plan: the breadth beyond :mod:`models`.

Builders return ``(model, inputs)`` as those of :mod:`models` do; :data:`PLANS` has a plan for each of them, and for the
models of transformers there.
"""

from __future__ import annotations

from typing import Any

import torch

from fxsp import SequenceParallelInput, SequenceParallelOutput
from models import Built, _finish, _padding_mask

__all__ = ["PLANS", "cogvideox", "gemma", "hunyuan_video", "ltx", "mixtral", "pixart", "sd3", "vit"]


def sd3(batch: int = 1, size: int = 6, text: int = 5, layers: int = 2) -> Built:
    """diffusers' ``SD3Transformer2DModel``: ``(size/2)**2`` image tokens in joint attention, one dual attention."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, size, size),
        "encoder_hidden_states": torch.randn(batch, text, 32),
        "pooled_projections": torch.randn(batch, 16),
        "timestep": torch.arange(batch) * 100 + 300,
        "return_dict": False,
    }
    return _finish(model), inputs


def pixart(batch: int = 1, size: int = 6, text: int = 5, layers: int = 1) -> Built:
    """diffusers' ``PixArtTransformer2DModel``: ``(size/2)**2`` tokens, cross-attention with a text mask."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=32,
        sample_size=size,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, size, size),
        "encoder_hidden_states": torch.randn(batch, text, 24),
        "timestep": torch.arange(batch) * 100 + 300,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": _padding_mask(batch, text),
        "return_dict": False,
    }
    return _finish(model), inputs


def cogvideox(batch: int = 1, frames: int = 2, size: int = 6, text: int = 5, layers: int = 1) -> Built:
    """diffusers' ``CogVideoXTransformer3DModel``: text and ``frames * (size/2)**2`` tokens, rotary on the latter."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=layers,
        sample_width=size,
        sample_height=size,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=text,
        use_rotary_positional_embeddings=True,
    )
    tokens = frames * (size // 2) ** 2
    angles = torch.randn(tokens, 4).repeat_interleave(2, 1)
    inputs = {
        "hidden_states": torch.randn(batch, frames, 4, size, size),
        "encoder_hidden_states": torch.randn(batch, text, 24),
        "timestep": torch.arange(batch) * 100 + 300,
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }
    return _finish(model), inputs


def hunyuan_video(
    batch: int = 1, frames: int = 2, size: int = 6, text: int = 5, layers: int = 1, single_layers: int = 1
) -> Built:
    """diffusers' ``HunyuanVideoTransformer3DModel``: joint attention under a text mask, a refiner of the text."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=single_layers,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=24,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, frames, size, size),
        "timestep": torch.arange(batch) * 100 + 300,
        "encoder_hidden_states": torch.randn(batch, text, 24),
        "encoder_attention_mask": _padding_mask(batch, text),
        "pooled_projections": torch.randn(batch, 16),
        "guidance": torch.full((batch,), 1000.0),
        "return_dict": False,
    }
    return _finish(model), inputs


def ltx(batch: int = 1, frames: int = 2, size: int = 3, text: int = 5, layers: int = 1) -> Built:
    """diffusers' ``LTXVideoTransformer3DModel``: ``frames * size**2`` tokens, cross-attention with a text mask."""
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=24,
    )
    inputs = {
        "hidden_states": torch.randn(batch, frames * size * size, 8),
        "encoder_hidden_states": torch.randn(batch, text, 24),
        "timestep": torch.arange(batch) * 100 + 300,
        "encoder_attention_mask": _padding_mask(batch, text),
        "num_frames": frames,
        "height": size,
        "width": size,
        "return_dict": False,
    }
    return _finish(model), inputs


def gemma(batch: int = 1, tokens: int = 13, layers: int = 1) -> Built:
    """transformers' ``GemmaForCausalLM`` with SDPA: one key/value head, scaled embeddings, tied output weights."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    inputs: dict[str, Any] = {"input_ids": torch.randint(1, 64, (batch, tokens)), "use_cache": False}
    return _finish(GemmaForCausalLM(config)), inputs


def mixtral(batch: int = 1, tokens: int = 13, layers: int = 1) -> Built:
    """transformers' ``MixtralForCausalLM`` with SDPA: a mixture of four experts, of which each token takes two."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, 64, (batch, tokens)), "use_cache": False}
    return _finish(MixtralForCausalLM(config)), inputs


def vit(batch: int = 1, size: int = 12, layers: int = 1) -> Built:
    """transformers' ``ViTForImageClassification`` with SDPA: ``(size/4)**2`` patches and a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        image_size=size,
        patch_size=4,
        num_channels=3,
        num_labels=5,
        attn_implementation="sdpa",
    )
    return _finish(ViTForImageClassification(config)), {"pixel_values": torch.randn(batch, 3, size, size)}


_IDS = {"": {"input_ids": SequenceParallelInput(1)}}
_JOINT = {"hidden_states": SequenceParallelInput(1), "encoder_hidden_states": SequenceParallelInput(1)}

PLANS: dict[str, dict[str, Any]] = {
    "sd3": {"transformer_blocks.0": _JOINT, "proj_out": SequenceParallelOutput(1)},
    "pixart": {
        "transformer_blocks.0": {"hidden_states": SequenceParallelInput(1)},
        "proj_out": SequenceParallelOutput(1),
    },
    "cogvideox": {"transformer_blocks.0": _JOINT, "proj_out": SequenceParallelOutput(1)},
    "hunyuan_video": {"transformer_blocks.0": _JOINT, "proj_out": SequenceParallelOutput(1)},
    "ltx": {"": {"hidden_states": SequenceParallelInput(1)}, "proj_out": SequenceParallelOutput(1)},
    "llama": _IDS,
    "bert": _IDS,
    "gpt2": _IDS,
    "gemma": _IDS,
    "mixtral": _IDS,
    "vit": {"vit.embeddings": {0: SequenceParallelInput(1, split_output=True)}},
}
