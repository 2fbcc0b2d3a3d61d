"""Small transformers of diffusers as blocks of U-Nets and for sound, with random weights, for ``examples/survey.py``.

A row of :data:`ROWS` has the class, the shape of its main input, what it changes in the configuration, and further
inputs.  What rows have in common is in :data:`CONFIG` and :func:`inputs`, by the names of parameters: two layers of 64
features, about 30 tokens of an image and 23 of a text.  Images are in ``survey_images.py``, films in
``survey_video.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

__all__ = ["MODELS", "Built", "Row", "angles", "grid", "mask", "models_of", "ready", "text"]

Built = tuple[torch.nn.Module, dict[str, Any]]
#: Class, shape of the main input, changes of :data:`CONFIG`, inputs beside the usual ones.
Row = tuple[str, tuple[int, ...], dict[str, Any], Callable[[], dict[str, Any]]]

#: Values of a configuration, for the classes that have a parameter of that name.
CONFIG: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 8,
    "out_channels": 8,
    "joint_attention_dim": 32,
    "cross_attention_dim": 64,
    "text_dim": 32,
    "text_embed_dim": 32,
    "caption_channels": 32,
    "pooled_projection_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "freq_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "axes_dims_rope": (4, 6, 6),
    "rope_axes_dim": (4, 6, 6),
    "pos_embed_max_size": 16,
    "sample_size": 12,
    "rope_max_seq_len": 32,
    "norm_num_groups": 8,
}
IMAGE, TEXT = 30, 23


def mask(length: int = TEXT, pads: int = 2) -> torch.Tensor:
    """``[1, length]`` bool: all but the last ``pads`` tokens."""
    return torch.arange(length)[None] < length - pads


def grid(*sizes: int, axes: int = 3) -> torch.Tensor:
    """Positions of the tokens of an image or a film: ``[tokens, axes]`` float32, the sizes in the last axes."""
    axis = torch.meshgrid(*(torch.arange(float(n)) for n in sizes), indexing="ij")
    positions = torch.stack([a.flatten() for a in axis], 1)
    return torch.nn.functional.pad(positions, (axes - len(sizes), 0))


def inputs() -> dict[str, Any]:
    """What is given to a parameter that has no default, or that a row asks for by ``...``."""
    return {
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "encoder_attention_mask": mask(),
        "encoder_hidden_states_mask": mask(),
        "encoder_mask": mask(),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([300.0]),
        "guidance": torch.tensor([3.5]),
        "img_ids": grid(5, 6),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def ready(model: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode, with noise where weights begin as constants: those would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:  # weights of experts are allocated, and not initialized
                parameter.normal_(0, 0.1)
            if parameter.is_floating_point() and (parameter.ndim < 2 or not parameter.any()):
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def build(name: str, shape: tuple[int, ...], changes: dict[str, Any], more: Callable[[], dict[str, Any]]) -> Built:
    """A model in evaluation mode, and the keyword arguments of its forward."""
    import diffusers.models.transformers as classes
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

    torch.manual_seed(0)
    kind = TransformerSpatioTemporalModel if name == "TransformerSpatioTemporalModel" else getattr(classes, name)
    known = inspect.signature(kind.__init__).parameters
    model = kind(**{key: value for key, value in CONFIG.items() if key in known} | changes)
    forward = inspect.signature(kind.forward).parameters
    usual = {key: value for key, value in inputs().items() if key in forward}
    given = more()
    wanted = {key: usual[key] if value is ... else value for key, value in given.items()}
    needed = {key: value for key, value in usual.items() if forward[key].default is inspect.Parameter.empty}
    main = next(key for key in forward if key != "self")
    if "return_dict" in forward:
        wanted["return_dict"] = False
    return ready(model), {main: torch.randn(shape), **needed, **wanted}


def models_of(rows: dict[str, Row]) -> dict[str, Callable[[], Built]]:
    """Name -> a function that builds it."""
    return {name: partial(build, *row) for name, row in rows.items()}


def text(**more: Any) -> Callable[[], dict[str, Any]]:
    """A text and a time, where they have a default."""
    return lambda: {"encoder_hidden_states": ..., "timestep": ..., **more}


def angles(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotary table as pipelines make it: cosines and sines, ``[length, width]``."""
    phase = torch.randn(length, width // 2).repeat_interleave(2, 1)
    return phase.cos(), phase.sin()


def protein(length: int = 37) -> dict[str, Any]:
    return {
        "local_latents": torch.randn(1, length, 8),
        "bb_ca_time": torch.tensor([0.3]),
        "local_latents_time": torch.tensor([0.3]),
        "padding_mask": mask(length),
        "token_type": torch.zeros(1, length, dtype=torch.long),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(1, length, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, length, dtype=torch.bool),
        },
    }


def minimax_h3(sound: int = 22, film: int = 240) -> dict[str, Any]:
    length = TEXT + sound + film
    kinds = torch.tensor([1] * TEXT + [2] * sound + [0] * film)
    places = torch.cat([torch.arange(float(TEXT + sound))[:, None].expand(-1, 3), TEXT + grid(film // 6, 6)])
    return {
        "audio_hidden_states": torch.randn(1, sound, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (kinds == 2).long(),
        "token_tags": kinds,
        "position_ids": places,
        "text_indices": torch.arange(TEXT),
        "audio_indices": torch.arange(TEXT, TEXT + sound),
        "video_indices": torch.arange(TEXT + sound, length),
    }


DUAL = {"cross_attention_dim": 32}

ROWS: dict[str, Row] = {
    # Blocks of U-Nets.
    "transformer_2d": ("Transformer2DModel", (1, 16, 5, 6), {"in_channels": 16, "out_channels": 16} | DUAL, text()),
    "dual_transformer": (
        "DualTransformer2DModel",
        (1, 16, 5, 6),
        {"in_channels": 16} | DUAL,
        lambda: {"encoder_hidden_states": torch.randn(1, 77 + 257, 32)},
    ),
    "dream_lite": (
        "DreamLiteTransformer2DModel",
        (1, 16, 5, 6),
        {"in_channels": 16, "out_channels": 16, "ff_mult": 2} | DUAL,
        text(),
    ),
    "transformer_temporal": (
        "TransformerTemporalModel",
        (8, 16, 5, 6),
        {"in_channels": 16, "cross_attention_dim": None},
        lambda: {"num_frames": 8},
    ),
    "transformer_spatio_temporal": (
        "TransformerSpatioTemporalModel",
        (4, 32, 5, 6),
        {"in_channels": 32, "cross_attention_dim": 32, "attention_head_dim": 8},
        lambda: {
            "encoder_hidden_states": torch.randn(4, 7, 32),
            "image_only_indicator": torch.zeros(1, 4),
        },
    ),
    "prior": (
        "PriorTransformer",
        (1, 32),
        {"embedding_dim": 32, "num_embeddings": TEXT, "time_embed_dim": 64},
        lambda: {"proj_embedding": torch.randn(1, 32), "encoder_hidden_states": ...},
    ),
    # Sound, and molecules.
    "ace_step": (
        "AceStepTransformer1DModel",
        (1, 60, 8),
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 16,
        },
        lambda: {
            "encoder_hidden_states": torch.randn(1, TEXT, 64),
            "timestep": torch.tensor([0.3]),
            "timestep_r": torch.tensor([0.2]),
            "context_latents": torch.randn(1, 60, 16),
        },
    ),
    "stable_audio": (
        "StableAudioDiTModel",
        (1, 8, 37),
        {
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 32,
            "time_proj_dim": 16,
            "global_states_input_dim": 32,
            "cross_attention_input_dim": 32,
        },
        text(global_hidden_states=torch.randn(1, 1, 32), rotary_embedding=angles(38, 8)),
    ),
    "stable_audio3": (
        "StableAudio3DiTModel",
        (1, 8, 37),
        {
            "io_channels": 8,
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 4,
            "cond_token_dim": 32,
            "global_cond_dim": 32,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
        },
        lambda: {"timestep": torch.tensor([0.3]), "global_hidden_states": torch.randn(1, 32)},
    ),
    "longcat_audio": (
        "LongCatAudioDiTTransformer",
        (1, 37, 8),
        {
            "dit_dim": 64,
            "dit_depth": 2,
            "dit_heads": 4,
            "dit_text_dim": 32,
            "latent_dim": 8,
            "use_latent_condition": False,
        },
        lambda: {"timestep": torch.tensor([0.3]), "attention_mask": mask(37)},
    ),
    "minimax_music3": (
        "MiniMaxMusic3Transformer1DModel",
        (1, 8, 37),
        {"condition_dim": 32, "ff_inner_dim": 96, "rotary_dim": 8, "fourier_embedding_dim": 16},
        lambda: {"encoder_hidden_states": torch.randn(1, 37, 32), "timestep": torch.tensor([0.3])},
    ),
    "minimax_h3": (
        "MiniMaxH3Transformer3DModel",
        (1, 240, 32),
        {
            "audio_in_channels": 8,
            "time_embed_hidden_dim": 32,
            "rope_freq_dim": 2,
        },
        minimax_h3,
    ),
    "minimax_depth": ("MiniMaxMusic3RVQDepthDecoder", (4, 13, 64), {"audio_vocab_size": 96}, dict),
    "t5_film": (
        "T5FilmDecoder",
        (1,),
        {"input_dims": 32, "targets_length": 64, "d_model": 64, "num_heads": 4, "d_kv": 16, "d_ff": 96},
        lambda: {
            "encodings_and_masks": [(torch.randn(1, TEXT, 64), mask().long())],
            "decoder_input_tokens": torch.randn(1, 37, 32),
            "decoder_noise_time": torch.tensor([0.3]),
        },
    ),
    "rfd4_proteina": (
        "RFD4ProteinaTransformer",
        (1, 37, 3),
        {
            "nlayers": 2,
            "token_dim": 64,
            "nheads": 4,
            "dim_cond": 32,
            "pair_repr_dim": 32,
            "latent_dim": 8,
            "tri_mult_c": 16,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        protein,
    ),
}

#: Name -> a function that builds a model in evaluation mode, and the keyword arguments of its forward.
MODELS = models_of(ROWS)
