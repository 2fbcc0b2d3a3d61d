"""Which operators are attentions, and what the compiler has to know of one: names of arguments, layout, masks.

``scaled_dot_product_attention`` is one of them; :func:`register_attention` adds others (those of flash-attention, or
your own).  An operator that is registered is never opened: it is called on each rank as it stands, on all tokens and
some of the heads (Ulysses), or on some of the queries and all keys (gathered, or local), and its own autograd formula,
if it has one, computes its gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxsp.errors import OptionError
from fxsp.kernels.ops import local_ops
from fxsp.passes.graph import Call, tensor_nodes
from fxsp.passes.rules.families import overloads
from fxsp.passes.rules.notation import written
from fxsp.passes.rules.rule import OpRule
from fxsp.passes.rules.table import RULES
from fxsp.plan import did_you_mean, listing
from fxsp.torch_internals import overload_of
from fxsp.types import Length

__all__ = ["ATTENTION_OPS", "BANDED", "SDPA", "AttentionOp", "register_attention"]

SDPA = torch.ops.aten.scaled_dot_product_attention.default
#: What *masks* makes of an attention whose mask it has seen through.
BANDED = local_ops.banded_attention.default


@dataclass(frozen=True)
class AttentionOp:
    """What is known of an attention operator; see :func:`register_attention`."""

    op: Any
    query: str = "query"
    key: str = "key"
    value: str = "value"
    #: The name of the mask, if the operator takes one that means what SDPA's does.
    mask: str | None = None
    #: The name of the causal flag; True for an operator that is always causal.
    causal: str | bool = False
    dropout: str | None = None
    #: Whether tensors are ``[B, H, S, D]``, else ``[B, S, H, D]``.
    heads_first: bool = True
    #: Which of several results is the attention's.
    output: int = 0
    constants: frozenset[str] = frozenset()
    positional: frozenset[str] = frozenset()
    #: Tensor arguments with an entry for each query head, and the dimension of the heads.
    per_head: Mapping[str, int] = field(default_factory=dict, hash=False)
    strided: bool = True
    #: Whether its mask may be boolean.
    boolean: bool = True
    #: Whether its blocks can be merged, as a ring does.
    blocks: bool = False

    @property
    def builtin(self) -> bool:
        """Whether the lowering knows what it computes, and writes something else for it."""
        return self.op in (SDPA, BANDED)

    def causal_in(self, call: Call) -> bool:
        """Whether this call is causal."""
        return bool(call.get(self.causal)) if isinstance(self.causal, str) else self.causal

    def window_in(self, call: Call) -> int | None:
        """How many tokens before a query it sees, if that is known; None: all."""
        return call.get("window") if self.op is BANDED else None

    def mask_in(self, call: Call) -> Node | None:
        """The mask of this call, if it has one."""
        mask = call.get(self.mask) if self.mask is not None else None
        return mask if isinstance(mask, Node) else None

    def laid(self, shape: tuple[Length, ...]) -> tuple[Length, ...]:
        """A shape in the operator's layout as ``[B, H, S, D]``, or the other way round."""
        return shape if self.heads_first or len(shape) != 4 else (shape[0], shape[2], shape[1], shape[3])

    def refusal(self, call: Call) -> str:
        """Why this call cannot be split at all, or nothing."""
        name = f"{self.op}"
        known = {self.query, self.key, self.value, self.mask, *self.per_head}
        for argument, value in call.arguments.items():
            if argument in known:
                continue
            if tensor_nodes(value):
                return f"{name}: the compiler is not told what its tensor argument {argument!r} means"
            if argument in {self.causal, self.dropout} | self.constants | self.positional:
                continue
            if not call.is_default(argument):
                return f"{name}: the compiler is not told what {argument}={value} means for a part of the tokens"
        for user in call.node.users:
            index = user.args[1] if user.target is operator.getitem else None
            if isinstance(call.node.meta["val"], (tuple, list)) and index != self.output and user.users:
                return f"{name}: its result {index} is used, and only result {self.output} is known to be the attention"
        return ""

    def rows_refusal(self, call: Call, q: tuple[Length, ...], k: tuple[Length, ...]) -> str:
        """Why it cannot run on some of the queries, or nothing; the shapes are ``[B, H, S, D]``."""
        moved = [n for n in sorted(self.positional) if call[n] is not None and not call.is_default(n)]
        if not self.builtin and any(isinstance(call.get(n), Node) for n in self.per_head):
            moved += [n for n in self.per_head if isinstance(call.get(n), Node)]
        if moved:
            return f"{listing(moved)} of {self.op} would count positions from a rank's first query"
        if self.causal_in(call) and not self.builtin:
            if self.mask is None or not self.boolean or self.mask_in(call) is not None or self.causal is True:
                return f"{self.op} is causal, and takes no mask that says so for a part of the queries"
            if q[-2] != k[-2]:
                return f"which corner the causal flag of {self.op} means is not known"
        return ""


#: The operators that are attentions.
ATTENTION_OPS: dict[Any, AttentionOp] = {
    SDPA: AttentionOp(
        SDPA, mask="attn_mask", causal="is_causal", dropout="dropout_p",
        constants=frozenset({"scale", "enable_gqa"}), blocks=True,
    ),
    BANDED: AttentionOp(
        BANDED, mask="attn_mask", causal="is_causal",
        constants=frozenset({"window", "scale", "enable_gqa"}), blocks=True,
    ),
}  # fmt: skip


def register_attention(
    op: Any,
    *,
    query: str = "q",
    key: str = "k",
    value: str = "v",
    layout: str = "BHSD",
    scale: str | None = None,
    causal: str | bool = False,
    mask: str | None = None,
    dropout: str | None = None,
    output: int = 0,
    constants: Iterable[str] = (),
    positional: Iterable[str] = (),
    per_head: Mapping[str, int] | None = None,
    strided: bool = False,
    boolean: bool = True,
) -> None:
    """Let the compiler split an attention that is an operator of its own.

    ``op`` is an overload (``torch.ops.flash_attn._flash_attn_forward.default``), a packet with one overload, or what
    ``torch.library.custom_op`` returned; it needs a fake implementation, and an autograd formula where gradients are
    asked for.  It must not write to its arguments.  The names are those in its schema.

    ``layout``
        of queries, keys, values and result: ``"BHSD"`` (batch, heads, tokens, width) or ``"BSHD"``.  There may be fewer
        key/value heads than query heads.
    ``causal``
        the name of the causal flag, or True for an operator that is always causal.
    ``mask``
        a mask that means what that of ``scaled_dot_product_attention`` does: boolean (True: look) or added to the
        scores, and broadcast to ``[B, H, S, S]`` in either layout.  Leave it out if the operator's means another thing.
    ``dropout``
        the probability of dropout; if it is not 0, that is an error.
    ``output``
        which of several results is the attention's.  If another is used, the operator runs whole, and is reported.
    ``constants``
        further arguments that mean the same for some of the queries and some of the heads (a softcap, a switch);
        ``scale`` is one of them.
    ``positional``
        arguments that mean the same for some of the heads, but count tokens (the size of a window): at another value
        than their default, heads are exchanged or the operator runs whole.
    ``per_head``
        tensor arguments with an entry for each query head, and the dimension of the heads in them (slopes of ALiBi).
    ``strided``
        whether the operator takes tensors with gaps; else they are made contiguous for it.
    ``boolean``
        whether its mask may be boolean; else it is what is added to the scores.

    An argument that is not named must be at its default where the operator is to be split.  Registering an operator
    again replaces what was known.  Raises :class:`~fxsp.errors.OptionError` for what its schema contradicts.
    """
    overload = overload_of(op)
    if overload is None:
        raise OptionError(
            f"register_attention: {op!r} is no operator with one overload; give what torch.library.custom_op returned, "
            "or torch.ops.<namespace>.<name>.<overload>"
        )
    arguments = {a.name: a for a in overload._schema.arguments}
    heads = dict(per_head or {})
    tensors = [query, key, value, *([mask] if mask is not None else []), *heads]
    flags = [causal] if isinstance(causal, str) else []
    others = [n for n in (scale, dropout) if n is not None]
    for name in (*tensors, *flags, *others, *constants, *positional):
        if name not in arguments:
            hint = did_you_mean(name, arguments)
            raise OptionError(f"{overload} has no argument {name!r}; it has {listing(arguments)}.{hint}")
    for name in tensors:
        if "Tensor" not in str(arguments[name].type):
            raise OptionError(f"argument {name!r} of {overload} is no tensor but {arguments[name].type}")
    if layout not in ("BHSD", "BSHD"):
        raise OptionError(f"layout is {layout!r}; it must be 'BHSD' or 'BSHD'")
    if any(a.alias_info is not None and a.alias_info.is_write for a in arguments.values()):
        raise OptionError(f"{overload} writes to its arguments; it cannot be split")
    results = overload._schema.returns
    if not 0 <= output < len(results) or "Tensor" not in str(results[output].type):
        raise OptionError(f"{overload} has {len(results)} results; result {output} is no tensor among them")
    if overload in RULES and overload not in ATTENTION_OPS:
        raise OptionError(f"{overload} has a rule already")
    ATTENTION_OPS[overload] = AttentionOp(
        overload, query, key, value, mask, causal, dropout, layout == "BHSD", output,
        frozenset(constants) | ({scale} if scale is not None else frozenset()), frozenset(positional), heads, strided,
        boolean,
    )  # fmt: skip
    RULES[overload] = _batch_rule


_BATCH = written(
    "[b, q0, q1, q2], [b, k0, k1, k2], [b, v0, v1, v2] -> [b, o0, o1, o2]"
    " whole={q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2}"
)


def _batch_rule(call: Call) -> OpRule | None:
    """Of an operator that is registered: the batch passes, all else is whole."""
    op, operands = ATTENTION_OPS[call.op], call.operands
    if op.refusal(call) or len(operands) != 3 or {*operands} != {call[n] for n in (op.query, op.key, op.value)}:
        return None
    alike = len({shape[:1] for shape in call.operand_shapes()}) == 1 and isinstance(call.node.meta["val"], torch.Tensor)
    return _BATCH(call) if alike else None


def _kernel(name: str, **facts: Any) -> None:
    """A kernel of ATen that a program may call by name, if this version of torch has it."""
    for op in overloads(name):
        register_attention(
            op, query="query", key="key", value="value", scale="scale", causal="is_causal", dropout="dropout_p",
            strided=True, **facts,
        )  # fmt: skip


# The names of their masks, and further arguments that change nothing.
_kernel("_scaled_dot_product_attention_math", mask="attn_mask", constants=("enable_gqa",))
_kernel("_scaled_dot_product_flash_attention_for_cpu", mask="attn_mask", boolean=False)
_kernel("_scaled_dot_product_flash_attention")
_kernel("_scaled_dot_product_efficient_attention", mask="attn_bias", boolean=False, constants=("compute_log_sumexp",))
_kernel("_scaled_dot_product_cudnn_attention", mask="attn_bias", boolean=False, constants=("compute_log_sumexp",))
_kernel("_scaled_dot_product_fused_attention_overrideable", mask="attn_bias", boolean=False)
_kernel(
    "_flash_attention_forward", layout="BSHD", constants=("cum_seq_q", "cum_seq_k", "return_debug_mask"),
    positional=("max_q", "max_k", "window_size_left", "window_size_right"),
)  # fmt: skip
