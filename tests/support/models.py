"""Tiny models of real classes, with random weights and inputs, for the tests.

Each function returns ``(model, inputs)``: an eval-mode float32 module and the keyword arguments of its forward.
Weights depend on the configuration only, inputs on the lengths too, so two calls agree.  Norm weights and biases are
random as well: at their initial ones and zeros they would hide mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "MODELS",
    "Built",
    "bert",
    "first_tensor",
    "flux",
    "flux2",
    "gpt2",
    "llama",
    "qwen_image",
    "wan",
    "wan_i2v",
]

Built = tuple[torch.nn.Module, dict[str, Any]]


def _finish(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Three even parts of a head dimension."""
    part = head_dim // 4 // 2 * 2
    return head_dim - 2 * part, part, part


def _image_ids(image: int, axes: int) -> torch.Tensor:
    """Positions of ``image`` tokens in rows of five: ``[image, axes]`` float32, row and column in the axes 1 and 2."""
    ids = torch.zeros(image, axes)
    ids[:, 1] = torch.arange(image) // 5
    ids[:, 2] = torch.arange(image) % 5
    return ids


def flux(
    batch: int = 1,
    image: int = 24,
    text: int = 7,
    heads: int = 4,
    head_dim: int = 16,
    layers: int = 1,
    single_layers: int = 1,
    guidance: bool = False,
) -> Built:
    """diffusers' ``FluxTransformer2DModel``: ``image`` and ``text`` tokens in joint attention."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=_rope_axes(head_dim),
    )
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, image, 8),
        "encoder_hidden_states": torch.randn(batch, text, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.linspace(0.2, 0.8, batch),
        "img_ids": _image_ids(image, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
    if guidance:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return _finish(model), inputs


def flux2(
    batch: int = 1,
    image: int = 24,
    text: int = 7,
    heads: int = 4,
    head_dim: int = 16,
    layers: int = 1,
    single_layers: int = 1,
) -> Built:
    """diffusers' ``Flux2Transformer2DModel``: joint attention, fused projections in its single blocks."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    quarter = head_dim // 4
    model = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(quarter,) * 4,
    )
    text_ids = torch.zeros(text, 4)
    text_ids[:, 3] = torch.arange(text)
    inputs = {
        "hidden_states": torch.randn(batch, image, 8),
        "encoder_hidden_states": torch.randn(batch, text, 32),
        "timestep": torch.linspace(0.2, 0.8, batch),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": _image_ids(image, 4),
        "txt_ids": text_ids,
        "return_dict": False,
    }
    return _finish(model), inputs


def wan(
    batch: int = 1,
    frames: int = 3,
    height: int = 4,
    width: int = 4,
    text: int = 7,
    heads: int = 4,
    head_dim: int = 12,
    layers: int = 1,
    image_tokens: int = 0,
    token_timesteps: bool = False,
) -> Built:
    """diffusers' ``WanTransformer3DModel``: ``frames * height/2 * width/2`` tokens, cross-attention to the text.

    ``image_tokens`` > 0 makes it image-to-video (the model then wants ``text=512``); ``token_timesteps`` gives
    every token its own timestep, as Wan 2.2's TI2V does.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=64,
        image_dim=24 if image_tokens else None,
        added_kv_proj_dim=heads * head_dim if image_tokens else None,
    )
    tokens = frames * (height // 2) * (width // 2)
    timestep = torch.arange(batch) * 100 + 300
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, frames, height, width),
        "timestep": timestep[:, None] + torch.arange(tokens) if token_timesteps else timestep,
        "encoder_hidden_states": torch.randn(batch, text, 32),
        "return_dict": False,
    }
    if image_tokens:
        inputs["encoder_hidden_states_image"] = torch.randn(batch, image_tokens, 24)
    return _finish(model), inputs


def wan_i2v(batch: int = 1, image_tokens: int = 9, **arguments: Any) -> Built:
    """:func:`wan` as image-to-video: ``image_tokens`` more tokens for the cross-attention, 512 text tokens."""
    return wan(batch=batch, text=512, image_tokens=image_tokens, **arguments)


def qwen_image(
    batch: int = 1,
    height: int = 4,
    width: int = 6,
    text: int = 7,
    heads: int = 4,
    head_dim: int = 16,
    layers: int = 1,
    mask: bool = False,
) -> Built:
    """diffusers' ``QwenImageTransformer2DModel``: ``height * width`` tokens; ``mask`` hides last text tokens."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        axes_dims_rope=_rope_axes(head_dim),
    )
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, height * width, 8),
        "encoder_hidden_states": torch.randn(batch, text, 32),
        "timestep": torch.linspace(0.2, 0.8, batch),
        "img_shapes": [[(1, height, width)]] * batch,
        "return_dict": False,
    }
    if mask:
        inputs["encoder_hidden_states_mask"] = _padding_mask(batch, text)
    return _finish(model), inputs


def _padding_mask(batch: int, length: int) -> torch.Tensor:
    """``[batch, length]`` int64: row b has its last ``min(2 + b, length - 1)`` tokens masked."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        pads = min(2 + row, length - 1)
        mask[row, length - pads :] = 0
    return mask


def llama(
    batch: int = 1,
    tokens: int = 13,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 8,
    layers: int = 2,
    mask: bool = False,
    attention: str = "sdpa",
) -> Built:
    """transformers' ``LlamaForCausalLM``, with SDPA if not told otherwise: causal, grouped heads, no cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=heads * head_dim,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, 64, (batch, tokens)), "use_cache": False}
    if mask:
        inputs["attention_mask"] = _padding_mask(batch, tokens)
    return _finish(model), inputs


def bert(
    batch: int = 1, tokens: int = 13, heads: int = 4, head_dim: int = 8, layers: int = 2, mask: bool = True
) -> Built:
    """transformers' ``BertModel`` with SDPA, no dropout, no pooler; ``mask`` is a padding mask."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=heads * head_dim,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    model = BertModel(config, add_pooling_layer=False)
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, 64, (batch, tokens))}
    if mask:
        inputs["attention_mask"] = _padding_mask(batch, tokens)
    return _finish(model), inputs


def gpt2(batch: int = 1, tokens: int = 13, heads: int = 4, head_dim: int = 8, layers: int = 2) -> Built:
    """transformers' ``GPT2LMHeadModel`` with SDPA, no dropout, no cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=256,
        n_embd=heads * head_dim,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config)
    return _finish(model), {"input_ids": torch.randint(0, 64, (batch, tokens)), "use_cache": False}


#: Name -> builder with default arguments; every builder takes ``batch``.
MODELS: dict[str, Callable[..., Built]] = {
    "flux": flux,
    "flux2": flux2,
    "wan": wan,
    "wan_i2v": wan_i2v,
    "qwen_image": qwen_image,
    "qwen_image_mask": lambda **arguments: qwen_image(mask=True, **arguments),
    "llama": llama,
    "bert": bert,
    "gpt2": gpt2,
}


def first_tensor(output: Any) -> torch.Tensor:
    """The main output of any of these models: a tensor, the head of a tuple, or of a ``ModelOutput``."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output
