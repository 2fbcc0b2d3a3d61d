"""Operators that need their operands whole, and why: documentation as data, checked by the tests.

An operator that has no rule and is not named here is handled the same way: its operands are gathered, it runs whole on
every rank, and the report says so.
"""

from __future__ import annotations

__all__ = ["WHOLE"]

_COUNTS = "what it gives depends on all elements together"
_SIZE = "how many elements it gives depends on data"
_DRAWS = "it draws for the whole value, so that every rank draws what one device draws"
_STATE = "its state runs along the tokens"
_CORNER = "it moves elements between dimensions"
_FREQUENCIES = "every frequency reads all tokens; along other dimensions it is rare in these models"

#: ``namespace::name`` of an operator (and the overload, if it is not all of them) -> why its operands are made whole.
WHOLE: dict[str, str] = {
    "aten::histc": _COUNTS,
    "aten::bincount": _COUNTS,
    "aten::native_group_norm": "it takes sizes as numbers; `group_norm`, which it comes from, has a rule",
    "aten::renorm": "every slice is scaled by its norm over all other dimensions",
    "aten::nonzero": _SIZE,
    "aten::masked_select": _SIZE,
    "aten::masked_scatter": "which element goes where depends on how many were written before it",
    "aten::unique_consecutive": _SIZE,
    "aten::_unique2": _SIZE,
    "aten::repeat_interleave.Tensor": _SIZE,
    "aten::pad_sequence": "it joins sequences of different lengths, each with pads of its own",
    "aten::diagonal": _CORNER,
    "aten::rot90": _CORNER,
    "aten::searchsorted": "it compares with the whole sorted sequence",
    "aten::lstm": _STATE,
    "aten::gru": _STATE,
    "aten::rnn_tanh": _STATE,
    "aten::ctc_loss": _STATE,
    "aten::multinomial": _DRAWS,
    "aten::bernoulli": _DRAWS,
    "aten::alpha_dropout": _DRAWS,
    "aten::feature_alpha_dropout": _DRAWS,
    "aten::rrelu": _DRAWS,
    "aten::fft_fft": _FREQUENCIES,
    "aten::fft_ifft": _FREQUENCIES,
    "aten::fft_rfft": _FREQUENCIES,
    "aten::fft_irfft": _FREQUENCIES,
    "aten::fft_fft2": _FREQUENCIES,
    "aten::fft_ifft2": _FREQUENCIES,
    "aten::fft_rfft2": _FREQUENCIES,
    "aten::fft_irfft2": _FREQUENCIES,
    "aten::fft_fftn": _FREQUENCIES,
    "aten::fft_ifftn": _FREQUENCIES,
    "aten::grid_sampler": "where it reads depends on data",
    "transformers::grouped_mm_fallback": "which weight a row meets depends on how many rows each group has",
    "flex_attention": "a higher-order operator: it stays whole",
}
