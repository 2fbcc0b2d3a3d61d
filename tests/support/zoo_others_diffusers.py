"""Tiny models of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxsp import SequenceParallelInput, SequenceParallelOutput
from models import Built, _padding_mask
from zoo_others_base import BATCH, CASES, HIDDEN, JOINT, TEXT, TOKENS, Other


def _diffuser(name: str, inputs: Callable[[], dict[str, Any]], **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, name)(**settings)
        for parameter in model.parameters():
            if not parameter.any():  # what begins as zero would hide everything before it
                torch.nn.init.normal_(parameter, std=0.1)
        return model, {**inputs(), "return_dict": False}

    return build


def _time() -> Tensor:
    return torch.arange(BATCH) * 100 + 300


def _case(
    name: str,
    build: Callable[[], Built],
    plan: dict[str, Any] | None,
    size: int,
    methods: tuple[str, ...],
    gathers: tuple[str, ...] = (),
    breaks: bool = False,
) -> None:
    CASES[name] = Other(build, plan, size, methods, gathers, breaks)


def _blocks(name: str, what: dict[str, Any], out: str = "proj_out") -> dict[str, Any]:
    return {f"{name}.0": what, out: SequenceParallelOutput(1)}


_HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8}
_ROPE: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16}
randn = torch.randn
_case(
    "lumina2",
    _diffuser(
        "Lumina2Transformer2DModel",
        lambda: {
            "hidden_states": randn(BATCH, 4, 6, 6),
            "timestep": torch.rand(BATCH),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
            "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        },
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=24,
    ),
    {"noise_refiner.0": HIDDEN, "layers.0": HIDDEN},
    3,
    ("gather_kv", "gather_kv"),
    ("aten.view",),
    breaks=True,
)
_case(
    "auraflow",
    _diffuser(
        "AuraFlowTransformer2DModel",
        lambda: {
            "hidden_states": randn(BATCH, 4, 6, 6),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
            "timestep": torch.rand(BATCH),
        },
        **_HEADS,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    ),
    _blocks("joint_transformer_blocks", JOINT),
    2,
    ("ulysses", "ulysses"),
)
_case(
    "sana",
    _diffuser(
        "SanaTransformer2DModel",
        lambda: {
            "hidden_states": randn(BATCH, 4, 3, 5),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
            "timestep": _time(),
            "encoder_attention_mask": _padding_mask(BATCH, TEXT),
        },
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
    ),
    _blocks("transformer_blocks", HIDDEN),
    3,
    ("linear", "local"),
    ("aten.unflatten",),  # tokens become rows and columns, for a convolution
)
_case(
    "mochi",
    _diffuser(
        "MochiTransformer3DModel",
        lambda: {
            "hidden_states": randn(BATCH, 4, 2, 6, 6),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
            "timestep": _time(),
            "encoder_attention_mask": _padding_mask(BATCH, TEXT).bool(),
        },
        **_HEADS,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    ),
    _blocks("transformer_blocks", JOINT),
    3,
    (),  # its attention is a loop over the batch that Dynamo does not trace
    breaks=True,
)
_case(
    "chroma",
    _diffuser(
        "ChromaTransformer2DModel",
        lambda: {
            "hidden_states": randn(BATCH, TOKENS, 8),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
            "timestep": torch.rand(BATCH),
            "img_ids": randn(TOKENS, 3),
            "txt_ids": randn(TEXT, 3),
            "attention_mask": torch.cat([_padding_mask(BATCH, TEXT), torch.ones(BATCH, TOKENS).long()], 1).bool(),
        },
        **_ROPE,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ),
    {"": JOINT, "proj_out": SequenceParallelOutput(1)},
    2,
    ("ulysses", "ulysses"),
)
_case(
    "skyreels",
    _diffuser(
        "SkyReelsV2Transformer3DModel",
        lambda: {
            "hidden_states": randn(BATCH, 4, 2, 6, 6),
            "timestep": _time(),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
        },
        **_ROPE,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=48,
        num_layers=1,
        rope_max_seq_len=32,
    ),
    _blocks("blocks", HIDDEN),
    8,
    ("hybrid", "local"),
)
_case(
    "stable_audio",
    _diffuser(
        "StableAudioDiTModel",
        lambda: {
            "hidden_states": randn(BATCH, 4, TOKENS),
            "timestep": torch.rand(BATCH),
            "encoder_hidden_states": randn(BATCH, TEXT, 16),
            "global_hidden_states": randn(BATCH, 1, 12),
            "rotary_embedding": (randn(TOKENS + 1, 4), randn(TOKENS + 1, 4)),
        },
        **_HEADS,
        sample_size=TOKENS,
        in_channels=4,
        num_layers=1,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=12,
        cross_attention_input_dim=16,
    ),
    {"transformer_blocks.0": HIDDEN},
    3,
    ("gather_kv", "local"),
    ("aten.slice",),  # the first token is dropped in the end
)
_case(
    "ltx2",
    _diffuser(
        "LTX2VideoTransformer3DModel",
        lambda: {
            "hidden_states": randn(BATCH, 18, 8),
            "audio_hidden_states": randn(BATCH, 7, 8),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
            "audio_encoder_hidden_states": randn(BATCH, TEXT, 24),
            "timestep": _time().float(),
            "encoder_attention_mask": _padding_mask(BATCH, TEXT),
            "audio_encoder_attention_mask": _padding_mask(BATCH, TEXT),
            "num_frames": 2,
            "height": 3,
            "width": 3,
            "audio_num_frames": 7,
        },
        **_HEADS,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=4,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=16,
        num_layers=1,
        caption_channels=24,
        rope_double_precision=False,
    ),
    {"": {"hidden_states": SequenceParallelInput(1), "audio_hidden_states": SequenceParallelInput(1)}},
    2,
    ("ulysses", "ulysses", "local", "local", "gather_kv", "ulysses"),
)
_case(
    "cogview4",
    _diffuser(
        "CogView4Transformer2DModel",
        lambda: {
            "hidden_states": randn(BATCH, 4, 6, 6),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
            "timestep": _time(),
            "original_size": torch.full((BATCH, 2), 6.0),
            "target_size": torch.full((BATCH, 2), 6.0),
            "crop_coords": torch.zeros(BATCH, 2),
        },
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        text_embed_dim=24,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    ),
    _blocks("transformer_blocks", JOINT),
    3,
    ("gather_kv",),
)
_case(
    "prx",
    _diffuser(
        "PRXTransformer2DModel",
        lambda: {
            "hidden_states": randn(BATCH, 4, 6, 6),
            "timestep": torch.rand(BATCH),
            "encoder_hidden_states": randn(BATCH, TEXT, 24),
            "attention_mask": _padding_mask(BATCH, TEXT).bool(),
        },
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=32,
        num_heads=4,
        depth=1,
        axes_dim=[4, 4],
    ),
    {"blocks.0": HIDDEN},
    2,
    ("ulysses",),
    ("aten.reshape",),  # tokens become an image
)
