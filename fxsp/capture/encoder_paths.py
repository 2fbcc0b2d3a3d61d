"""What of torch's own transformer modules Dynamo cannot trace as one graph, in a form that it can.

While a compilation of ours traces, these stand for functions of ``torch.nn`` (see
:func:`fxsp.torch_internals.substitute_functions`); eager code and other compilers see nothing of them.

* ``nn.TransformerEncoder.forward`` makes a nested tensor of a batch with padding, in evaluation without gradients,
  where it runs eagerly: the layers do not see the pads, and the rows of the pads are zero at the end.  Traced, that is
  a graph break or (``mask_check=True``) does not happen, so that those rows are something else.  Here a mask keeps the
  pads out and their rows are filled with zeros: what the eager module gives.
* Whether a mask is causal is compared element by element, which needs its values.  It only chooses a kernel: the mask
  is applied either way.
* Masks of unlike dtypes raise a deprecation warning, which breaks the graph.  The masks are made alike, as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsp import torch_internals

__all__ = ["SUBSTITUTES"]

#: Ranks of the tensor that an encoder takes with a batch.
_BATCHED = 3


def encoder_forward(
    self: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """``nn.TransformerEncoder.forward`` without nested tensors; arguments and result are those of the original."""
    padding = canonical_mask(src_key_padding_mask, "src_key_padding_mask", None, "mask", src.dtype)
    mask = canonical_mask(mask, "mask", None, "", src.dtype)
    empty = None
    if padding is not None and mask is None and _nests(self, src):
        seen = padding.logical_not()
        first = torch.arange(seen.shape[1], device=seen.device) < seen.sum(1, keepdim=True)
        if getattr(self, "mask_check", True):
            empty = seen.logical_not() & (seen == first).all()
        else:  # unchecked, a nested tensor has the first rows, as many as the mask allows
            empty = first.logical_not()
            padding = torch.zeros_like(padding).masked_fill(empty, -math.inf)
    output = src
    for layer in self.layers:
        output = layer(output, src_mask=mask, is_causal=is_causal is True, src_key_padding_mask=padding)
    if empty is not None:
        output = output.masked_fill(empty[:, :, None], 0.0)
    return output if self.norm is None else self.norm(output)


def _nests(self: nn.TransformerEncoder, src: Tensor) -> bool:
    """Whether the eager module makes a nested tensor of ``src`` where there is a mask of pads, and no other."""
    first = self.layers[0]
    if not torch.backends.mha.get_fastpath_enabled() or not getattr(self, "use_nested_tensor", False):
        return False
    if first.training or src.dim() != _BATCHED or src.is_nested or torch.is_autocast_enabled():
        return False
    if not torch.is_grad_enabled():
        return True
    attention = first.self_attn
    parts = (attention.out_proj, first.norm1, first.norm2, first.linear1, first.linear2)
    tensors = [src, attention.in_proj_weight, attention.in_proj_bias]
    tensors += [tensor for part in parts for tensor in (part.weight, part.bias)]
    return not any(tensor.requires_grad for tensor in tensors)


def canonical_mask(
    mask: Tensor | None,
    mask_name: str,
    other_type: torch.dtype | None,
    other_name: str,
    target_type: torch.dtype,
    check_other: bool = True,
) -> Tensor | None:
    """A boolean mask (true: not seen) as one that is added to scores, of ``target_type``; others as they are."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise AssertionError(f"only bool and floating types of {mask_name} are supported")
    return torch.zeros_like(mask, dtype=target_type).masked_fill_(mask, -math.inf)


def is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether a mask is said to be causal."""
    return is_causal is True


#: Functions of torch -> what is traced in their place, with the same arguments.
SUBSTITUTES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    nn.TransformerEncoder.forward: encoder_forward,
    **torch_internals.mask_helpers(canonical_mask, is_causal_mask),
}
