"""Small models of the families of transformers, with random weights, for ``examples/survey.py``.

A row of :data:`FAMILIES` has the automatic class, the type of the configuration, what it changes in it, and what the
model is called with.  All have two layers of 32 or 64 features; lengths are odd where nothing forbids it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from survey_diffusers import ready

__all__ = ["MODELS"]

Built = tuple[torch.nn.Module, dict[str, Any]]

#: What configurations of text have in common.
TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GPT = {"vocab_size": 96, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 4,
}
PYRAMID = {"image_size": 32, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4}
SPEECH = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 4, 4),
    "num_conv_pos_embeddings": 15,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 96,
}
SEQ2SEQ = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MAMBA = {"vocab_size": 96, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "pad_token_id": 0}


def ids(length: int = 37) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 96, (1, length))}


def uncached(length: int = 37) -> dict[str, Any]:
    return {**ids(length), "use_cache": False}


def padded(length: int = 37) -> dict[str, Any]:
    """Text of which the last tokens are pads."""
    return {**ids(length), "attention_mask": (torch.arange(length) < length - 3).long()[None]}


def both(encoder: int = 37, decoder: int = 29) -> dict[str, Any]:
    return {**ids(encoder), "decoder_input_ids": torch.randint(3, 96, (1, decoder)), "use_cache": False}


def pixels(size: int = 28, channels: int = 3) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, channels, size, size)}


def frames(number: int = 4, size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, number, 3, size, size)}


def pairs(size: int = 28, length: int = 23) -> dict[str, Any]:
    return {**ids(length), **pixels(size)}


def wave(length: int = 3000) -> dict[str, Any]:
    return {"input_values": torch.randn(1, length)}


def spectrogram(length: int = 94) -> dict[str, Any]:
    return {
        "input_features": torch.randn(1, 16, length),
        "decoder_input_ids": torch.randint(3, 96, (1, 29)),
        "use_cache": False,
    }


#: Name -> automatic class, type, changes of the configuration, inputs.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    # Decoders.
    "llama": ("AutoModelForCausalLM", "llama", GROUPED, uncached),
    "mistral": ("AutoModelForCausalLM", "mistral", {**GROUPED, "sliding_window": 16}, uncached),
    "qwen2": ("AutoModelForCausalLM", "qwen2", GROUPED, uncached),
    "qwen3": ("AutoModelForCausalLM", "qwen3", {**GROUPED, "head_dim": 16}, uncached),
    "gemma2": ("AutoModelForCausalLM", "gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 16}, uncached),
    "gemma3_text": ("AutoModelForCausalLM", "gemma3_text", {**GROUPED, "head_dim": 16, "sliding_window": 16}, uncached),
    "phi3": ("AutoModelForCausalLM", "phi3", GROUPED, uncached),
    "gpt2": ("AutoModelForCausalLM", "gpt2", GPT, uncached),
    "gptj": ("AutoModelForCausalLM", "gptj", {**GPT, "rotary_dim": 8}, uncached),
    "gpt_neox": ("AutoModelForCausalLM", "gpt_neox", TEXT, uncached),
    "opt": ("AutoModelForCausalLM", "opt", {**TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64}, uncached),
    "falcon": ("AutoModelForCausalLM", "falcon", TEXT, uncached),
    "bloom": (
        "AutoModelForCausalLM",
        "bloom",
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        uncached,
    ),
    "olmo2": ("AutoModelForCausalLM", "olmo2", GROUPED, uncached),
    "cohere": ("AutoModelForCausalLM", "cohere", GROUPED, uncached),
    "stablelm": ("AutoModelForCausalLM", "stablelm", GROUPED, uncached),
    "granite": ("AutoModelForCausalLM", "granite", GROUPED, uncached),
    "smollm3": ("AutoModelForCausalLM", "smollm3", GROUPED, uncached),
    "mamba": ("AutoModelForCausalLM", "mamba", MAMBA, uncached),
    "mamba2": (
        "AutoModelForCausalLM",
        "mamba2",
        {**MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
        uncached,
    ),
    # Mixtures of experts.
    "mixtral": ("AutoModelForCausalLM", "mixtral", {**GROUPED, "num_local_experts": 4}, uncached),
    "qwen3_moe": (
        "AutoModelForCausalLM",
        "qwen3_moe",
        {**EXPERTS, "head_dim": 16, "num_experts": 4},
        uncached,
    ),
    "olmoe": ("AutoModelForCausalLM", "olmoe", {**EXPERTS, "num_experts": 4}, uncached),
    "gpt_oss": (
        "AutoModelForCausalLM",
        "gpt_oss",
        {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        uncached,
    ),
    "deepseek_v3": (
        "AutoModelForCausalLM",
        "deepseek_v3",
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
        uncached,
    ),
    # Encoders of text.
    "bert": ("AutoModelForMaskedLM", "bert", TEXT, padded),
    "roberta": ("AutoModelForMaskedLM", "roberta", TEXT, padded),
    "electra": ("AutoModel", "electra", {**TEXT, "embedding_size": 32}, padded),
    "albert": ("AutoModel", "albert", {**TEXT, "embedding_size": 32}, padded),
    "distilbert": (
        "AutoModel",
        "distilbert",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
        padded,
    ),
    "deberta_v2": (
        "AutoModel",
        "deberta-v2",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        padded,
    ),
    "mpnet": ("AutoModel", "mpnet", TEXT, padded),
    "modernbert": ("AutoModelForMaskedLM", "modernbert", {**TEXT, "local_attention": 16}, padded),
    "esm": ("AutoModel", "esm", {**TEXT, "position_embedding_type": "rotary", "token_dropout": False}, padded),
    "fnet": ("AutoModel", "fnet", {k: v for k, v in TEXT.items() if "heads" not in k}, ids),
    "clip_text": ("AutoModel", "clip_text_model", {**TEXT, "projection_dim": 32}, padded),
    # Encoders with decoders.
    "t5": ("AutoModelForSeq2SeqLM", "t5", T5, both),
    "mt5": ("AutoModelForSeq2SeqLM", "mt5", {**T5, "feed_forward_proj": "gated-gelu"}, both),
    "bart": ("AutoModelForSeq2SeqLM", "bart", SEQ2SEQ, both),
    "mbart": ("AutoModelForSeq2SeqLM", "mbart", SEQ2SEQ, both),
    "marian": ("AutoModelForSeq2SeqLM", "marian", {**SEQ2SEQ, "decoder_vocab_size": 96}, both),
    "pegasus": ("AutoModelForSeq2SeqLM", "pegasus", SEQ2SEQ, both),
    # Audio.
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        "whisper",
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 47, "max_target_positions": 64},
        spectrogram,
    ),
    "wav2vec2": ("AutoModelForCTC", "wav2vec2", SPEECH, wave),
    "hubert": ("AutoModel", "hubert", SPEECH, wave),
    "wavlm": ("AutoModel", "wavlm", {**SPEECH, "num_buckets": 32}, wave),
    "ast": (
        "AutoModel",
        "audio-spectrogram-transformer",
        {
            **{k: v for k, v in VISION.items() if k != "image_size"},
            "max_length": 36,
            "num_mel_bins": 24,
            "frequency_stride": 3,
            "time_stride": 4,
        },
        lambda: {"input_values": torch.randn(1, 36, 24)},
    ),
    # Vision.
    "vit": ("AutoModelForImageClassification", "vit", VISION, pixels),
    "deit": ("AutoModel", "deit", VISION, pixels),
    "beit": ("AutoModel", "beit", {**VISION, "use_relative_position_bias": True}, pixels),
    "dinov2": ("AutoModel", "dinov2", VISION, pixels),
    "dinov3": ("AutoModel", "dinov3_vit", VISION, pixels),
    "clip_vision": ("AutoModel", "clip_vision_model", {**VISION, "projection_dim": 32}, pixels),
    "siglip_vision": ("AutoModel", "siglip_vision_model", VISION, pixels),
    "clip": (
        "AutoModel",
        "clip",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 32},
        pairs,
    ),
    "vit_mae": (
        "AutoModel",
        "vit_mae",
        VISION,
        lambda: {**pixels(), "noise": torch.rand(1, 49)},
    ),
    "videomae": ("AutoModel", "videomae", {**VISION, "image_size": 16, "num_frames": 4}, frames),
    "timesformer": ("AutoModel", "timesformer", {**VISION, "image_size": 16, "num_frames": 4}, frames),
    "swin": ("AutoModel", "swin", PYRAMID, partial(pixels, 32)),
    "swinv2": ("AutoModel", "swinv2", PYRAMID, partial(pixels, 32)),
    "segformer": (
        "AutoModelForSemanticSegmentation",
        "segformer",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
        partial(pixels, 44),
    ),
    "convnext": (
        "AutoModel",
        "convnext",
        {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2},
        partial(pixels, 32),
    ),
}


def _build(auto: str, kind: str, changes: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Built:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **changes)
    model = getattr(transformers, auto).from_config(config)
    return ready(model), {**inputs(), "return_dict": False}


#: Name -> a function that builds a model in evaluation mode, and the keyword arguments of its forward.
MODELS: dict[str, Callable[[], Built]] = {name: partial(_build, *row) for name, row in FAMILIES.items()}
