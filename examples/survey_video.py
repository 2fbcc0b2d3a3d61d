"""Small transformers of diffusers for films, with random weights, for ``examples/survey.py``.

Rows as in ``survey_diffusers.py``: about 30 to 60 tokens of a film, 23 of a text.
"""

from __future__ import annotations

from typing import Any

import torch
from survey_diffusers import TEXT, Row, angles, grid, mask, models_of

__all__ = ["MODELS"]

#: Two frames of 8 channels, 10 times 12 pixels: 60 tokens in patches of four pixels.
FILM = (1, 8, 2, 10, 12)
TOKENS = 60


def frames_first() -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(1, TEXT, 32)}


def anyflow() -> dict[str, Any]:
    return {"timestep": torch.full((1, 2), 500.0), "r_timestep": torch.full((1, 2), 250.0)}


def helios() -> dict[str, Any]:
    def history(frames: int) -> torch.Tensor:
        return torch.randn(1, 8, frames, 16, 16)

    return {
        "indices_hidden_states": torch.arange(2.0)[None],
        "indices_latents_history_short": torch.ones(1, 1),
        "indices_latents_history_mid": torch.ones(1, 1),
        "indices_latents_history_long": torch.ones(1, 4),
        "latents_history_short": history(1),
        "latents_history_mid": history(1),
        "latents_history_long": history(4),
    }


def framepack() -> dict[str, Any]:
    def history(frames: int) -> torch.Tensor:
        return torch.randn(1, 8, frames, 8, 8)

    return {
        "image_embeds": torch.randn(1, 9, 32),
        "guidance": ...,
        "indices_latents": torch.arange(2.0),
        "latents_clean": history(2),
        "indices_latents_clean": torch.arange(2.0),
        "latents_history_2x": history(2),
        "indices_latents_history_2x": torch.arange(2.0),
        "latents_history_4x": history(4),
        "indices_latents_history_4x": torch.arange(4.0),
    }


def cosmos3() -> dict[str, Any]:
    film, text = 2 * 5 * 6, torch.arange(TEXT)
    places = torch.arange(TEXT, TEXT + film)
    return {
        "input_ids": torch.randint(3, 96, (TEXT,)),
        "text_indexes": text,
        "position_ids": torch.cat([text[:, None].expand(TEXT, 3), TEXT + grid(2, 5, 6).long()]).t(),
        "und_len": TEXT,
        "sequence_length": TEXT + film,
        "vision_tokens": [torch.randn(1, 8, 2, 5, 6)],
        "vision_token_shapes": [(2, 5, 6)],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.ones(film),
        "vision_noisy_frame_indexes": [torch.tensor([0, 1])],
    }


def ltx2() -> dict[str, Any]:
    return {
        "audio_hidden_states": torch.randn(1, 13, 8),
        "audio_encoder_hidden_states": torch.randn(1, TEXT, 32),
        "encoder_attention_mask": ...,
        "num_frames": 2,
        "height": 5,
        "width": 6,
        "audio_num_frames": 13,
        "fps": 25.0,
    }


def refiner() -> dict[str, Any]:
    return {
        "timestep": torch.full((1, TOKENS), 300.0),
        "video_rotary_emb": angles(TOKENS, 64),
        "encoder_attention_mask": ...,
    }


def sana_wm() -> dict[str, Any]:
    pose = torch.eye(4).repeat(1, 2, 1, 1)
    camera = torch.tensor([12.0, 10.0, 6.0, 5.0]).expand(1, 2, 4)
    return {
        "timestep": torch.full((1, 1, 2), 300.0),
        "encoder_hidden_states": torch.randn(1, 1, TEXT, 32),
        "encoder_attention_mask": mask().long(),
        "camera_conditions": torch.cat([pose.flatten(2), camera], -1),
        "chunk_plucker": torch.randn(1, 8, 2, 5, 6),
    }


def allegro() -> dict[str, Any]:
    return {
        "encoder_attention_mask": ...,
        "attention_mask": torch.ones(1, 2, 10, 12),
        "image_rotary_emb": (tuple(angles(n, 4) for n in (2, 5, 6)), tuple(grid(2, 5, 6).long().t()[:, None])),
    }


def consisid() -> dict[str, Any]:
    return {"id_vit_hidden": [torch.randn(1, 5, 32)], "id_cond": torch.randn(1, 32)}


def wan_animate() -> dict[str, Any]:
    return {
        "encoder_hidden_states_image": torch.randn(1, 9, 32),
        "pose_hidden_states": torch.randn(1, 8, 2, 10, 12),
        "face_pixel_values": torch.randn(1, 3, 5, 16, 16),
    }


def wan_animate2() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [torch.randn(8, 2, 10, 12)],
        "encoder_hidden_states": [torch.randn(TEXT, 32)],
        "condition_latents": [torch.randn(12, 2, 10, 12)],
        "encoder_hidden_states_image": torch.randn(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": TOKENS,
        "offset_grid_sizes": torch.tensor([[2, 5, 6]]),
    }


WAN = {"attention_head_dim": 12}
AUDIO = {
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "rope_double_precision": False,
}
KANDINSKY = {
    "in_visual_dim": 8,
    "out_visual_dim": 8,
    "time_dim": 16,
    "model_dim": 64,
    "ff_dim": 96,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}
KANDINSKY_TEXT = {**KANDINSKY, "in_text_dim": 32, "in_text_dim2": 32, "num_text_blocks": 1}

ROWS: dict[str, Row] = {
    "wan": ("WanTransformer3DModel", FILM, WAN, dict),
    "wan_i2v": (
        "WanTransformer3DModel",
        (1, 8, 5, 32, 32),  # more than the 512 tokens of its text
        {**WAN, "image_dim": 32, "added_kv_proj_dim": 48},
        lambda: {
            "encoder_hidden_states": torch.randn(1, 512, 32),
            "encoder_hidden_states_image": torch.randn(1, 9, 32),
        },
    ),
    "wan_vace": (
        "WanVACETransformer3DModel",
        FILM,
        {**WAN, "vace_layers": [0], "vace_in_channels": 24},
        lambda: {"control_hidden_states": torch.randn(1, 24, 2, 10, 12)},
    ),
    "wan_animate": (
        "WanAnimateTransformer3DModel",
        (1, 20, 3, 10, 12),
        {
            **WAN,
            "in_channels": 20,
            "latent_channels": 8,
            "image_dim": 32,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        wan_animate,
    ),
    "wan_animate2": (
        "WanAnimate2Transformer3DModel",
        (1,),
        {"text_len": 32, "in_dim": 20, "dim": 64, "out_dim": 8, "num_heads": 4},
        wan_animate2,
    ),
    "skyreels": ("SkyReelsV2Transformer3DModel", FILM, WAN, dict),
    "chrono_edit": ("ChronoEditTransformer3DModel", FILM, {**WAN, "rope_temporal_skip_len": 8}, dict),
    "anyflow": ("AnyFlowTransformer3DModel", (1, 2, 8, 10, 12), WAN, anyflow),
    "anyflow_far": (
        "AnyFlowFARTransformer3DModel",
        (1, 4, 8, 8, 8),
        WAN,
        lambda: {
            "timestep": torch.full((1, 4), 500.0),
            "r_timestep": torch.full((1, 4), 250.0),
            "chunk_partition": [2, 2],
        },
    ),
    "helios": ("HeliosTransformer3DModel", (1, 8, 2, 16, 16), {**WAN, "rope_dim": (4, 4, 4)}, helios),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", FILM, {}, lambda: {"guidance": ...}),
    "hunyuan_video15": (
        "HunyuanVideo15Transformer3DModel",
        (1, 8, 2, 5, 6),
        {"text_embed_2_dim": 16, "image_embed_dim": 16, "target_size": 96, "task_type": "t2v"},
        lambda: {
            "encoder_hidden_states_2": torch.randn(1, 9, 16),
            "encoder_attention_mask": mask().float(),
            "encoder_attention_mask_2": mask(9).float(),
            "image_embeds": torch.zeros(1, 5, 16),
        },
    ),
    "framepack": (
        "HunyuanVideoFramepackTransformer3DModel",
        (1, 8, 2, 8, 8),
        {"has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True},
        framepack,
    ),
    "motif_video": (
        "MotifVideoTransformer3DModel",
        (1, 17, 2, 10, 12),
        {"in_channels": 17, "image_embed_dim": 16},
        dict,
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        (1, 2, 8, 10, 12),
        {
            "sample_width": 12,
            "sample_height": 10,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
            "use_rotary_positional_embeddings": True,
        },
        lambda: {"image_rotary_emb": angles(TOKENS, 16)},
    ),
    "consisid": (
        "ConsisIDTransformer3DModel",
        (1, 2, 8, 10, 12),
        {
            "sample_width": 12,
            "sample_height": 10,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 16,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 32,
            "LFE_vit_dim": 32,
            "LFE_depth": 5,
            "LFE_dim_head": 16,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 42,
            "LFE_ff_mult": 2,
            "LFE_num_scale": 1,
        },
        consisid,
    ),
    "easy_animate": (
        "EasyAnimateTransformer3DModel",
        FILM,
        {"patch_size": 2, "mmdit_layers": 1},
        frames_first,
    ),
    "mochi": ("MochiTransformer3DModel", FILM, {"max_sequence_length": TEXT}, dict),
    "allegro": (
        "AllegroTransformer3DModel",
        FILM,
        {**WAN, "cross_attention_dim": 48, "sample_height": 10, "sample_width": 12, "sample_frames": 2},
        allegro,
    ),
    "latte": (
        "LatteTransformer3DModel",
        (1, 8, 4, 12, 12),
        {
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 4,
        },
        lambda: {"encoder_hidden_states": ..., "timestep": ...},
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        (1, TOKENS, 8),
        {},
        lambda: {"num_frames": 2, "height": 5, "width": 6},
    ),
    "ltx2": ("LTX2VideoTransformer3DModel", (1, TOKENS, 8), AUDIO, ltx2),
    "sana_wm_refiner": ("SanaWMLTX2RefinerTransformer3DModel", (1, TOKENS, 8), AUDIO, refiner),
    "sana_video": (
        "SanaVideoTransformer3DModel",
        FILM,
        {
            "attention_head_dim": 12,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 48,
        },
        lambda: {"encoder_attention_mask": ...},
    ),
    "sana_wm": (
        "SanaWMTransformer3DModel",
        (1, 8, 2, 5, 6),
        {
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "mlp_ratio": 2.0,
            "chunk_plucker_channels": 8,
            "chunk_plucker_post_attn_blocks": 2,
        },
        sana_wm,
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        FILM,
        {"mlp_ratio": 2, "adaln_lora_dim": 8, "max_size": (4, 16, 16), "concat_padding_mask": False},
        lambda: {"fps": 30, "attention_mask": mask().float()},
    ),
    "cosmos3": (
        "Cosmos3OmniTransformer",
        (1,),
        {
            "dtype": torch.float32,
            "head_dim": 16,
            "latent_channel": 8,
            "latent_patch_size": 1,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "patch_latent_dim": 8,
            "vocab_size": 96,
            "rope_axes_dim": [4, 2, 2],
        },
        cosmos3,
    ),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        (1, 2, 10, 12, 8),
        KANDINSKY_TEXT,
        lambda: {
            "visual_rope_pos": [torch.arange(2), torch.arange(5), torch.arange(6)],
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    "kandinsky6": (
        "Kandinsky6Transformer3DModel",
        (1, 2, 10, 12, 17),
        {**KANDINSKY_TEXT, "in_audio_dim": 8, "out_audio_dim": 8},
        lambda: {"audio_hidden_states": torch.randn(1, 13, 8)},
    ),
    "kandinsky6_sr": (
        "Kandinsky6SRTransformer3DModel",
        (1, 2, 16, 16, 17),
        {**KANDINSKY, "patch_size": (1, 2, 2)},
        dict,
    ),
    "joy_image_edit": (
        "JoyImageEditTransformer3DModel",
        (1, 8, 1, 10, 12),
        {"rope_dim_list": [4, 6, 6]},
        lambda: {"encoder_hidden_states": ...},
    ),
    "joy_image_edit_plus": (
        "JoyImageEditPlusTransformer3DModel",
        (1, 30, 8, 1, 2, 2),
        {"rope_dim_list": [4, 6, 6]},
        lambda: {"shape_list": [[(1, 3, 6), (1, 3, 4)]]},
    ),
}

#: Name -> a function that builds a model in evaluation mode, and the keyword arguments of its forward.
MODELS = models_of(ROWS)
