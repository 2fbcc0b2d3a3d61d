"""Tiny models of many more real classes of diffusers and transformers, each with a small plan.

``CASES`` has a builder of ``(model, inputs)``, the plan (None: the model's own), and what is to be expected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsp import SequenceParallelInput, SequenceParallelOutput
from models import Built, _padding_mask

__all__ = ["CASES", "Other"]

TOKENS, TEXT, BATCH = 13, 5, 2
HIDDEN = {"hidden_states": SequenceParallelInput(1)}
JOINT = {**HIDDEN, "encoder_hidden_states": SequenceParallelInput(1)}
IDS = {"": {"input_ids": SequenceParallelInput(1)}}


@dataclass(frozen=True)
class Other:
    """A model, and what the report says of it on ``size`` ranks."""

    build: Callable[[], Built]
    plan: dict[str, Any] | None
    size: int
    #: Methods of the attentions.
    methods: tuple[str, ...]
    #: Operators that need all tokens.
    gathers: tuple[str, ...] = ()
    #: Whether the library's code breaks the graph, so that parts of it are no graph, or a small one.
    breaks: bool = False


CASES: dict[str, Other] = {}


# --- transformers -----------------------------------------------------------------------------------------------------


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


# --- diffusers --------------------------------------------------------------------------------------------------------


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
