"""Tiny models of transformers: language models, encoders, and one with a decoder beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxsp import SequenceParallelInput
from models import Built, _padding_mask
from zoo_others_base import BATCH, CASES, IDS, TOKENS, Other


def _transformer(name: str, config: str, mask: bool = False, **settings: Any) -> Callable[[], Built]:
    """A model of transformers on token ids; a setting None is left to the configuration."""

    def build() -> Built:
        import transformers

        usual: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "attn_implementation": "sdpa",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        given = {key: value for key, value in {**usual, **settings}.items() if value is not None}
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**given))
        inputs: dict[str, Any] = {"input_ids": torch.randint(3, 64, (BATCH, TOKENS))}
        if "CausalLM" in name:
            inputs["use_cache"] = False
        if mask:
            inputs["attention_mask"] = _padding_mask(BATCH, TOKENS)
        return model, inputs

    return build


_BERT = {"num_key_value_heads": None, "head_dim": None, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MODELS: dict[str, tuple[Callable[[], Built], int, tuple[str, ...], tuple[str, ...]]] = {
    "phi": (_transformer("PhiForCausalLM", "PhiConfig"), 2, ("ulysses",), ()),
    "qwen3": (_transformer("Qwen3ForCausalLM", "Qwen3Config", mask=True), 8, ("hybrid",), ()),
    "gemma3": (
        _transformer("Gemma3ForCausalLM", "Gemma3TextConfig", sliding_window=4, layer_types=["sliding_attention"]),
        3,
        ("gather_kv",),
        (),
    ),
    "llama4": (
        _transformer(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            num_local_experts=2,
            intermediate_size_mlp=48,
            attention_chunk_size=8,
        ),
        2,
        ("gather_kv",),
        ("aten.repeat",),
    ),
    "gpt_neox": (_transformer("GPTNeoXForCausalLM", "GPTNeoXConfig"), 8, ("hybrid",), ()),
    "opt": (
        _transformer("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
        3,
        ("gather_kv",),
        (),
    ),
    "falcon_alibi": (
        _transformer(
            "FalconForCausalLM", "FalconConfig", alibi=True, multi_query=True, num_key_value_heads=None, head_dim=None
        ),
        2,
        ("gather_kv",),
        (),
    ),
    "bloom": (
        _transformer(
            "BloomForCausalLM", "BloomConfig", n_layer=1, n_head=4, hidden_dropout=0.0, attn_implementation="eager"
        ),
        3,
        ("gather_kv (written out)",),
        ("aten.baddbmm", "aten.bmm", "autograd_function_apply"),
    ),
    "deepseek_v3": (
        _transformer(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            num_key_value_heads=4,
            head_dim=None,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        2,
        ("ulysses",),
        (),
    ),
    "mamba2": (
        _transformer(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            state_size=4,
            conv_kernel=3,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=4,
            attn_implementation=None,
        ),
        2,
        (),
        ("aten.conv1d", "aten.pad"),
    ),
    "roberta": (_transformer("RobertaModel", "RobertaConfig", mask=True, **_BERT), 3, ("gather_kv",), ()),
    "modernbert": (
        _transformer("ModernBertModel", "ModernBertConfig", mask=True, local_attention=4, **_BERT),
        2,
        ("ulysses",),
        (),
    ),
    "deberta_v2": (
        _transformer(
            "DebertaV2Model",
            "DebertaV2Config",
            mask=True,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            **{**_BERT, "attn_implementation": "eager"},
        ),
        3,
        ("gather_kv (written out)",),
        ("aten.bmm", "aten.add"),  # scores of positions by key are gathered, to be added to those by query
    ),
    "clip_text": (_transformer("CLIPTextModel", "CLIPTextConfig", **_BERT), 8, ("hybrid",), ()),
}
for _name, (_build, _size, _methods, _gathers) in _MODELS.items():
    CASES[_name] = Other(_build, IDS, _size, _methods, _gathers)


def _t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))
    ids, targets = torch.randint(3, 64, (BATCH, TOKENS)), torch.randint(3, 64, (BATCH, 7))
    labels = targets.masked_fill(torch.arange(7) > 4, -100)
    return model, {"input_ids": ids, "decoder_input_ids": targets, "labels": labels, "use_cache": False}


def _whisper() -> Built:
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=TOKENS,
        max_target_positions=32,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        attn_implementation="sdpa",
    )
    features, ids = torch.randn(BATCH, 8, 2 * TOKENS), torch.randint(3, 64, (BATCH, 7))
    return WhisperModel(config), {"input_features": features, "decoder_input_ids": ids, "use_cache": False}


def _dinov3() -> Built:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        num_register_tokens=2,
        attn_implementation="sdpa",
    )
    return DINOv3ViTModel(config), {"pixel_values": torch.randn(BATCH, 3, 12, 12)}


CASES["t5"] = Other(
    _t5,
    {"": {"input_ids": SequenceParallelInput(1), "decoder_input_ids": SequenceParallelInput(1)}},
    3,
    ("gather_kv",) * 3,
)
CASES["whisper"] = Other(  # the encoder begins with convolutions over time, so its blocks are named
    _whisper,
    {
        "encoder.layers.0": {"hidden_states": SequenceParallelInput(1)},
        "": {"decoder_input_ids": SequenceParallelInput(1)},
    },
    2,
    ("ulysses",) * 3,
)
CASES["dinov3"] = Other(  # rotates all tokens but the first three
    _dinov3,
    {"embeddings": {0: SequenceParallelInput(1, split_output=True)}},
    3,
    ("gather_kv",),
    ("aten.split_with_sizes",),
)
