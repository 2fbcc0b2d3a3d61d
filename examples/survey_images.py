"""Small transformers of diffusers for images, with random weights, for ``examples/survey.py``.

Rows as in ``survey_diffusers.py``: about 30 tokens of an image, 23 of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from survey_diffusers import IMAGE, TEXT, Row, angles, grid, mask, models_of, text

__all__ = ["MODELS"]


def joint(**more: Any) -> Callable[[], dict[str, Any]]:
    """What models of the kind of FLUX are called with."""
    return lambda: {
        "encoder_hidden_states": ...,
        "timestep": torch.tensor([0.3]),
        "img_ids": ...,
        "txt_ids": ...,
        **more,
    }


def sizes() -> dict[str, Any]:
    """What CogView knows of an image."""
    return {
        "original_size": torch.tensor([[80.0, 96.0]]),
        "target_size": torch.tensor([[80.0, 96.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


def bria_fibo() -> dict[str, Any]:
    states = torch.randn(1, TEXT, 64)
    return joint(encoder_hidden_states=states, text_encoder_layers=[states[..., :32]] * 3)()


def omnigen() -> dict[str, Any]:
    length = TEXT + 1 + IMAGE
    return {
        "timestep": torch.tensor([0.3]),
        "input_ids": torch.randint(3, 96, (1, TEXT)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, length, length).tril().maximum(torch.arange(length)[None, None] > TEXT),
        "position_ids": torch.arange(length)[None],
    }


def ideogram() -> dict[str, Any]:
    from diffusers.models.transformers import transformer_ideogram4 as module

    kinds = torch.full((1, TEXT + IMAGE), module.OUTPUT_IMAGE_INDICATOR)
    kinds[:, :TEXT] = module.LLM_TOKEN_INDICATOR
    places = torch.cat([torch.arange(TEXT)[:, None].expand(TEXT, 3), grid(5, 6).long() + 65536])
    return {
        "encoder_hidden_states": torch.randn(1, TEXT + IMAGE, 32),
        "timestep": torch.tensor([0.3]),
        "position_ids": places[None],
        "segment_ids": torch.ones(1, TEXT + IMAGE, dtype=torch.long),
        "indicator": kinds,
    }


def qwen21() -> dict[str, Any]:
    shown = torch.zeros(1, TEXT + 6, dtype=torch.bool)
    shown[:, TEXT:] = True
    return {
        "encoder_hidden_states_mask": mask(pads=0).long(),
        "timestep": torch.tensor([0.3]),
        "img_shapes": [[(1, 4, 6)]],
        "img_mask": shown,
    }


def hunyuan_dit() -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(1, 9, 32),
        "text_embedding_mask": mask(9),
        "encoder_hidden_states_t5": torch.randn(1, 14, 32),
        "text_embedding_mask_t5": mask(14),
        "image_meta_size": torch.tensor([[96.0, 80.0, 96.0, 80.0, 0.0, 0.0]]),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": angles(IMAGE, 16),
    }


IDS4 = {"img_ids": grid(5, 6, axes=4), "txt_ids": torch.zeros(TEXT, 4)}

ROWS: dict[str, Row] = {
    # Images: tokens and a text in joint attention.
    "flux": ("FluxTransformer2DModel", (1, IMAGE, 8), {}, joint(pooled_projections=...)),
    "flux2": (
        "Flux2Transformer2DModel",
        (1, IMAGE, 8),
        {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        joint(guidance=..., **IDS4),
    ),
    "flux3": ("Flux3Transformer2DModel", (1, IMAGE, 8), {"axes_dims_rope": (4, 4, 4, 4)}, joint(**IDS4)),
    "chroma": (
        "ChromaTransformer2DModel",
        (1, IMAGE, 8),
        {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1},
        joint(),
    ),
    "bria": ("BriaTransformer2DModel", (1, IMAGE, 8), {"pooled_projection_dim": None}, joint()),
    "bria_fibo": (
        "BriaFiboTransformer2DModel",
        (1, IMAGE, 8),
        {"pooled_projection_dim": None, "joint_attention_dim": 64, "text_encoder_dim": 32},
        bria_fibo,
    ),
    "bria_fibo2": (
        "BriaFibo2Transformer2DModel",
        (1, 8, 10, 12),
        {
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "cap_feat_dim": 32,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 16, 16),
        },
        lambda: {"encoder_hidden_states": torch.randn(1, 2, TEXT, 32)},
    ),
    "longcat_image": ("LongCatImageTransformer2DModel", (1, IMAGE, 8), {}, joint(guidance=...)),
    "ovis_image": ("OvisImageTransformer2DModel", (1, IMAGE, 8), {}, joint()),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        (1, IMAGE, 8),
        {"out_channels": 2},
        text(encoder_hidden_states_mask=..., img_shapes=[[(1, 5, 6)]]),
    ),
    "qwen_image21": ("QwenImage21Transformer2DModel", (1, 24, 8), {"context_in_dim": 32, "mlp_ratio": 2}, qwen21),
    "nucleus_moe": (
        "NucleusMoEImageTransformer2DModel",
        (1, IMAGE, 8),
        {
            "out_channels": 2,
            "num_experts": 4,
            "moe_intermediate_dim": 32,
            "capacity_factors": [2.0, 2.0],
            "dense_moe_strategy": "leave_first_block_dense",
        },
        text(encoder_hidden_states_mask=..., img_shapes=[(1, 5, 6)]),
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        (1, IMAGE, 8),
        {
            "num_key_value_heads": 2,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 32,
            "num_text_layers": 3,
            "text_num_attention_heads": 4,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 48,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
        },
        lambda: {
            "encoder_hidden_states": torch.randn(1, TEXT, 3, 32),
            "timestep": torch.tensor([0.3]),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), grid(5, 6)]),
            "encoder_attention_mask": ...,
        },
    ),
    "ideogram4": (
        "Ideogram4Transformer2DModel",
        (1, TEXT + IMAGE, 8),
        {"adaln_dim": 16, "llm_features_dim": 32, "mrope_section": (4, 2, 2)},
        ideogram,
    ),
    # Images in patches.
    "sd3": (
        "SD3Transformer2DModel",
        (1, 8, 10, 12),
        {"caption_projection_dim": 64, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        text(pooled_projections=...),
    ),
    "aura_flow": (
        "AuraFlowTransformer2DModel",
        (1, 8, 10, 12),
        {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "caption_projection_dim": 64, "pos_embed_max_size": 256},
        text(timestep=torch.tensor([0.3])),
    ),
    "dit": (
        "DiTTransformer2DModel",
        (1, 8, 12, 12),
        {"num_embeds_ada_norm": 1000},
        lambda: {"timestep": ..., "class_labels": torch.tensor([3])},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        (1, 8, 10, 12),
        {"use_additional_conditions": False},
        text(encoder_attention_mask=mask().float(), added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "hunyuan_dit": (
        "HunyuanDiT2DModel",
        (1, 8, 10, 12),
        {"patch_size": 2, "cross_attention_dim": 32, "cross_attention_dim_t5": 32, "text_len": 9, "text_len_t5": 14},
        hunyuan_dit,
    ),
    "lumina_next": (
        "LuminaNextDiT2DModel",
        (1, 8, 10, 12),
        {"num_kv_heads": 2, "multiple_of": 16, "cross_attention_dim": 32},
        lambda: {"image_rotary_emb": torch.randn(384, 384, 8), "cross_attention_kwargs": {}},
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        (1, 8, 10, 12),
        {
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 16, 16),
            "cap_feat_dim": 32,
        },
        dict,
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        (1,),
        {
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 16, 16],
        },
        lambda: {
            "x": [torch.randn(8, 1, 10, 12)],
            "cap_feats": [torch.randn(TEXT, 32)],
            "t": torch.tensor([0.3]),
        },
    ),
    "omnigen": (
        "OmniGenTransformer2DModel",
        (1, 8, 10, 12),
        {
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "vocab_size": 96,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        omnigen,
    ),
    "cogview3": ("CogView3PlusTransformer2DModel", (1, 8, 10, 12), {}, sizes),
    "cogview4": ("CogView4Transformer2DModel", (1, 8, 10, 12), {"rope_axes_dim": (16, 16)}, sizes),
    "glm_image": (
        "GlmImageTransformer2DModel",
        (1, 8, 10, 12),
        {"prior_vq_quantizer_codebook_size": 64},
        lambda: {
            **{key: value for key, value in sizes().items() if key != "original_size"},
            "prior_token_id": torch.randint(0, 64, (1, IMAGE)),
            "prior_token_drop": torch.zeros(1, dtype=torch.bool),
        },
    ),
    "ernie_image": (
        "ErnieImageTransformer2DModel",
        (1, 8, 5, 6),
        {"ffn_hidden_size": 96, "text_in_dim": 32},
        lambda: {"text_bth": torch.randn(1, TEXT, 32), "text_lens": torch.tensor([TEXT - 2])},
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        (1, 8, 12, 12),
        {
            "patch_size": 2,
            "caption_channels": [32, 16],
            "text_emb_dim": 32,
            "num_routed_experts": 4,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (12, 12),
            "llama_layers": (0, 1, 1),
            "force_inference_output": True,
        },
        lambda: {
            "timesteps": torch.tensor([300]),
            "encoder_hidden_states_t5": torch.randn(1, 11, 32),
            "encoder_hidden_states_llama3": torch.randn(2, 1, 11, 16),
            "pooled_embeds": torch.randn(1, 32),
        },
    ),
    "hunyuan_image": ("HunyuanImageTransformer2DModel", (1, 8, 5, 6), {"rope_axes_dim": (8, 8)}, dict),
    "prx": (
        "PRXTransformer2DModel",
        (1, 8, 10, 12),
        {"context_in_dim": 32, "mlp_ratio": 2, "num_heads": 4, "depth": 2, "axes_dim": [8, 8]},
        lambda: {"timestep": torch.tensor([0.3])},
    ),
    "sana": (
        "SanaTransformer2DModel",
        (1, 8, 5, 6),
        {"num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "patch_size": 1},
        lambda: {"encoder_attention_mask": ...},
    ),
}

#: Name -> a function that builds a model in evaluation mode, and the keyword arguments of its forward.
MODELS = models_of(ROWS)
