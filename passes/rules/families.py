"""What is known of ATen's operators: one table, operator -> traits, which all passes read by the name of a trait.

A row of :data:`TABLE` gives traits to operators; an operator may be in several rows.  ``add.Tensor`` is an overload,
``outer`` the default one, ``add.*`` every overload of tensors that maps elements and writes to none.  Older and newer
versions of torch lack a few, which are left out.

A row may have a rule (:mod:`fxsp.passes.rules.notation`), which the tests prove on samples that they make of it.  Where
a rule has to compute, a trait with the name of its function says so (:mod:`fxsp.passes.rules.table`).  The other traits
are facts that passes ask for::

    cheap            recomputing it on whole operands beats any communication
    view             the same elements, in other dimensions
    affine           in all operands together: gradients need none of them
    linear           affine, and of zeros it makes zeros: a sum of results is the result of a sum
    joins            linear, of several operands
    scale            linear in each operand alone
    work             so much arithmetic per element that it is worth running on shards for its own sake
    in_sdpa          ``scaled_dot_product_attention`` has an argument for it: scaling, masks, casts
    same_memory      another name of its operand, all of it
    keeps_zero       of zero it makes zero
    by_strides       it reads memory, not values: its operand must lie in memory as the program's own does
    keeps_strides    it refuses an operand that does not lie in memory as it expects
    moves_memory     in place, it changes which memory a tensor has, or how much
    writes_statistics  it writes to running statistics, which its schema does not say

Everything else is a family whose name says what it is.  No other file classifies operators of ATen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

__all__ = ["TABLE", "Row", "family", "names_of", "overloads", "traits_of"]

aten = torch.ops.aten

#: What a trait implies.
_IMPLIED = {
    "linear": "affine",
    "reshape": "view cheap",
    "permute": "view cheap",
    "expand": "view cheap",
    "copy": "same_values",
    "cast": "same_values",
}


class Row(NamedTuple):
    """Traits, and the operators that have them; maybe their rule, in the notation of fxsp.passes.rules.notation."""

    traits: str
    operators: str
    rule: str = ""
    #: Arguments: a call that gives one of them as true has no rule.
    unless: str = ""
    #: Arguments that a sample call needs beside its tensors, for the tests.
    given: Mapping[str, Any] = {}


#: What is known: rows add up.
TABLE: tuple[Row, ...] = (
    # Elementwise: dimensions are aligned from the right, a size of 1 broadcasts.
    Row("elementwise cheap", """
        add.* sub.* mul.* div.* where.* masked_fill.* neg.* to.* sqrt.* rsqrt.* clone.* contiguous.* alias.* detach.*
        _to_copy.* pow.* float_power.* atan2.* true_divide.* floor_divide.* remainder.* fmod.* fmax.* fmin.*
        copysign.* hypot.* xlogy.* lerp.* addcmul.* addcdiv.* bitwise_left_shift.* bitwise_right_shift.* logaddexp.*
        logaddexp2.* heaviside.* ldexp.* gcd.* lcm.* nextafter.* max.other min.other isclose.* maximum.* minimum.*
        eq.* ne.* lt.* le.* gt.* ge.* __and__.* __or__.* __xor__.* bitwise_and.* bitwise_or.* bitwise_xor.*
        logical_and.* logical_or.* logical_xor.* bitwise_not.* logical_not.* rsub.* abs.* sign.* exp.* exp2.* expm1.*
        log.* log2.* log10.* log1p.* sin.* cos.* tan.* asin.* acos.* atan.* sinh.* cosh.* tanh.* asinh.* acosh.*
        atanh.* sigmoid.* silu.* gelu.* relu.* relu6.* leaky_relu.* elu.* selu.* celu.* mish.* hardtanh.* hardswish.*
        hardsigmoid.* softplus.* log_sigmoid.* threshold.* erf.* erfc.* erfinv.* reciprocal.* square.* floor.* ceil.*
        round.* trunc.* frac.* clamp.* clip.* clamp_min.* clamp_max.* isnan.* isinf.* isfinite.* nan_to_num.* sinc.*
        digamma.* lgamma.* polar.* complex.* real.* imag.* conj.* _conj.* resolve_conj.* resolve_neg.* angle.*
        signbit.* positive.* sgn.* deg2rad.* rad2deg.* hardshrink.* softshrink.* logit.* isposinf.* isneginf.* i0.*
        detach_copy.* alias_copy.* lift_fresh.* lift_fresh_copy.* zeros_like.* ones_like.* empty_like.* full_like.*
    """, "[*d], ... -> [*d]"),
    Row("affine in_sdpa", "add.* sub.*"),
    Row("linear in_sdpa", "to.* to.other"),
    Row("joins", "add.Tensor sub.Tensor cat stack"),
    Row("in_sdpa", "mul.* div.* where.* masked_fill.*"),
    Row("linear keeps_zero turns_pair", "neg"),
    Row("turns_pair", "sub.Tensor rsub.Scalar view_as_complex"),
    Row("scale", "mul.Tensor mul.Scalar div.Scalar"),
    Row("root", "sqrt rsqrt"),
    Row("bitwise", "bitwise_and.* bitwise_or.* bitwise_xor.* __and__.* __or__.* __xor__.*"),
    Row("negation", "neg logical_not bitwise_not"),
    # Copies and casts.
    Row("copy linear in_sdpa keeps_zero moves", "clone contiguous"),
    Row("copy linear in_sdpa moves", "alias"),
    Row("same_values detached moves", "detach"),
    Row("same_memory", "detach alias"),
    Row("same_values", "lift_fresh lift_fresh_copy to.device to.other"),
    Row("cast linear in_sdpa keeps_zero", "to.dtype _to_copy"),
    Row("cast linear in_sdpa", "to.dtype_layout"),
    Row("linear in_sdpa keeps_zero", "to.device"),
    Row("cheap", "type_as to.other", "[*d], - -> [*d]"),
    Row("cast in_sdpa", "type_as"),
    # Made of a shape.
    Row("constant detached", "zeros_like ones_like empty_like"),
    Row("constant", "full_like"),
    Row("drawn", """
        rand_like rand_like.generator randn_like randn_like.generator randint_like randint_like.low_dtype
        randint_like.generator randint_like.low_generator_dtype bernoulli.p uniform normal_functional exponential
        geometric cauchy log_normal random random.from random.to
    """),
    Row("factory", "new_zeros new_ones new_full new_empty new_empty_strided"),
    Row("full", "full new_full full_like scalar_tensor"),
    Row("ones", "ones new_ones ones_like"),
    Row("zeros", "zeros new_zeros zeros_like"),
    Row("arange", "arange arange.start arange.start_step"),
    Row("dropout", "dropout native_dropout feature_dropout", "[*d] -> [*d], ..."),
    Row("in_sdpa moves", "dropout"),
    # Views.
    Row("reshape linear", "reshape flatten.using_ints unflatten.int unsqueeze squeeze squeeze.dim squeeze.dims"),
    Row("reshape linear keeps_strides", "view"),
    Row("reshape keeps_strides", "_unsafe_view"),
    Row("reshape", "view_copy view_as reshape_as ravel"),
    Row("permute linear", "permute transpose.int"),
    Row("permute", "swapaxes swapdims"),
    Row("permute move linear", "movedim.intlist movedim.int"),
    Row("permute move", "moveaxis.int moveaxis.intlist"),
    Row("permute reversal", "t numpy_T"),
    Row("permute matrix_transpose", "mT"),
    Row("permute matrix_transpose conjugates", "mH adjoint matrix_H"),
    Row("expand", "expand expand_as broadcast_to", "[*d] -> [*d] | [*d], - -> [*d]"),
    Row("linear", "expand"),
    Row("cheap moves pairs", "view_as_complex", "[*d, c] -> [*d] whole={c}"),
    Row("cheap moves", "view_as_real", "[*d] -> [*d, c] whole={c}"),
    Row("by_strides", "as_strided as_strided_copy as_strided_scatter"),
    # Cuts, joins, repetitions and look-ups.
    Row("cut slice linear moves", "slice.Tensor narrow"),
    Row("cut split linear moves", "split.Tensor split_with_sizes chunk"),
    Row("cut split linear", "split.sizes"),
    Row("cut split", "tensor_split.sections"),
    Row("unsafe_split", "unsafe_chunk unsafe_split.Tensor"),
    Row("cut", "tensor_split.indices"),
    Row("cut cheap repeat_interleave", "repeat_interleave.self_int"),
    Row("select cheap linear moves", "select.int"),
    Row("select linear moves", "unbind.int"),
    Row("cat join linear", "cat"),
    Row("cat join", "concat concatenate"),
    Row("stack join linear cheap pairs", "stack"),
    Row("pad affine", "constant_pad_nd"),
    Row("pad", "pad"),
    Row("repeat cheap", "repeat"),
    Row("repeat", "tile"),
    # Its gradient counts all ids, or is sparse and cannot be summed over the ranks.
    Row("", "embedding", "[v, c], [*d] -> [*d, c] whole={v}", unless="scale_grad_by_freq sparse"),
    Row("one_hot", "one_hot"),
    Row("index_select", "index_select"),
    Row("index", "index.Tensor"),
    Row("gather", "gather"),
    Row("scatter_into moves", "slice_scatter select_scatter"),
    Row("scatter", """
        scatter.src scatter.value scatter.reduce scatter.value_reduce scatter_add scatter_reduce.two
    """),
    Row("index_add", "index_add index_copy index_fill.int_Scalar index_fill.int_Tensor index_reduce"),
    Row("index_put", "index_put _unsafe_index_put"),
    # Products.
    # The bias would be added once per rank: the contraction must stay whole where there is one.
    Row(
        "work row_product", "linear",
        "[*d, i], [o, i] -> [*d, o] reduction={i} | [*d, i], [o, i], [o] -> [*d, o] whole={i}",
    ),
    Row(
        "matmul", "mm bmm matmul dot mv linalg_matmul",
        "[*b, m, k], [*b, k, n] -> [*b, m, n] reduction={k} | [k], [*b, k, n] -> [*b, n] reduction={k}"
        " | [*b, m, k], [k] -> [*b, m] reduction={k} | [k], [k] -> [] reduction={k}",
    ),
    Row("product work", "mm bmm matmul"),
    Row("product", "linalg_matmul"),
    Row("row_product", "mm matmul"),
    Row("cheap", "outer", "[m], [n] -> [m, n]"),
    Row("addmm product work", "addmm baddbmm"),
    Row("einsum product work", "einsum"),
    Row("", "_int_mm", "[m, k], [k, n] -> [m, n] whole={k}"),
    Row("scaled_mm", "_scaled_mm"),
    Row("", "cdist _cdist_forward", "[*b, m, c], [*b, n, c] -> [*b, m, n] whole={c}"),
    Row("convolution work", "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding"),
    Row("convolution", "convolution conv_transpose1d conv_transpose2d.input conv_transpose3d.input"),
    # Reductions: sums; those that another all-reduce combines; those that need all tokens at once.
    Row("total sum linear", "sum"),
    Row("total sum linear statistic", "sum.dim_IntList"),
    Row("total mean linear", "mean"),
    Row("total mean linear statistic", "mean.dim"),
    Row("combined largest", "amax"),
    Row("combined", "amin aminmax logsumexp"),
    Row("combined largest whole_gradient", "max"),
    Row("combined whole_gradient", "min"),
    Row("combined largest with_index", "max.dim"),
    Row("combined with_index", "min.dim"),
    Row("combined largest position", "argmax"),
    Row("combined position", "argmin"),
    Row("combined logical largest", "any any.dim any.dims"),
    Row("combined logical", "all all.dim all.dims"),
    Row("combined norm statistic", "linalg_vector_norm"),
    Row("combined norm", "norm.ScalarOpt_dim norm.Scalar norm.ScalarOpt_dim_dtype"),
    Row("reduction", """
        prod prod.dim_int var var.dim std std.dim std.correction var_mean.dim var_mean.correction nansum median.dim mode
        std_mean.correction count_nonzero.dim_IntList count_nonzero kthvalue
    """),
    Row("reduction statistic", "var.correction"),
    # Along some dimensions; the others pass.
    Row("along softmax", "softmax.int _softmax"),
    Row("along", """
        log_softmax.int _log_softmax cumprod logcumsumexp sort sort.stable argsort argsort.stable topk diff glu cummax
        cummin
    """),
    Row("along linear", "cumsum flip roll"),
    Row("along triangle", "triu tril"),
    Row("layer_norm normalizes", "layer_norm rms_norm native_layer_norm _fused_rms_norm"),
    Row("group_norm normalizes", "group_norm"),
    Row("group_norm writes_statistics", "instance_norm"),
    # In training it mixes the batch.
    Row("writes_statistics", "batch_norm", "[b, c, *d], [c], ... -> [b, c, *d]", unless="training"),
    # On the last dimension, the last two, the last three.
    Row("last_dims last_1", """
        avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d
        upsample_nearest1d.vec upsample_linear1d upsample_linear1d.vec diag_embed
    """),
    Row("last_dims last_2", """
        avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d
        upsample_nearest2d upsample_nearest2d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d
        upsample_bicubic2d.vec _upsample_nearest_exact2d.vec _upsample_bilinear2d_aa.vec linalg_qr linalg_inv inverse
        linalg_det linalg_svd matrix_exp linalg_matrix_exp
    """),
    Row("last_dims last_3", """
        avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d upsample_nearest3d upsample_nearest3d.vec
        upsample_trilinear3d upsample_trilinear3d.vec pixel_shuffle pixel_unshuffle channel_shuffle
    """),
    # A slope for each channel, or one for all.
    Row("", "prelu _prelu_kernel", "[b, c, *d], [c] -> [b, c, *d] | [*d], [*d] -> [*d]"),
    Row("meshgrid", "meshgrid meshgrid.indexing"),
    Row("unfold", "unfold"),
    Row("", "bucketize.Tensor", "[*d], [n] -> [*d] whole={n}"),
    Row("cosine_similarity", "cosine_similarity"),
    Row("", "broadcast_tensors", "[*d], ... -> [*d], ..."),
    # Losses.
    Row("elementwise_loss", """
        mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
        soft_margin_loss kl_div
    """),
    Row("class_loss", "cross_entropy_loss nll_loss_nd nll_loss"),
    # In place.
    Row("moves_memory", "set_.source_Tensor resize_ resize_as_ set_data"),
)  # fmt: skip

#: Overloads that ``name.*`` means.
_MAPPING = (
    "default Tensor Scalar Tensor_Scalar Scalar_Tensor Tensor_Tensor Tensor_mode Scalar_mode self other ScalarOther "
    "ScalarSelf dtype dtype_layout device prim_dtype this decimals TensorScalar Tensor_float"
).split()


def overloads(*paths: str) -> list[Any]:
    """The operator overloads named ``"add.Tensor"`` that this torch has (older and newer ones lack a few)."""
    found: list[Any] = []
    for path in paths:
        packet, _, overload = path.partition(".")
        if overload == "*":
            found += _mapping(packet)
            continue
        try:
            found.append(getattr(getattr(aten, packet), overload or "default"))
        except AttributeError:
            continue
    return found


def _mapping(name: str) -> Iterator[Any]:
    """Overloads that have tensor operands and one tensor result, and write to no argument."""
    packet = getattr(aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        op = getattr(packet, overload)
        schema = op._schema
        tensors = [str(a.type) for a in schema.arguments if "Tensor" in str(a.type)]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        results = [str(r.type) for r in schema.returns]
        # `to.other` reads its second operand's dtype only; `where(x)` gives positions.
        if overload in _MAPPING and results == ["Tensor"] and tensors and not writes and op is not aten.to.other:
            if set(tensors) <= {"Tensor", "Optional[Tensor]"}:
                yield op


@cache
def _traits() -> dict[Any, frozenset[str]]:
    found: dict[Any, set[str]] = {}
    for row in TABLE:
        given = {*row.traits.split()}
        given |= {implied for trait in given for implied in _IMPLIED.get(trait, "").split()}
        for op in overloads(*row.operators.split()):
            found.setdefault(op, set()).update(given)
    return {op: frozenset(traits) for op, traits in found.items()}


def traits_of(op: Any) -> frozenset[str]:
    """The traits of an operator overload; none of anything else."""
    return _traits().get(op, frozenset())


@cache
def family(*traits: str) -> frozenset[Any]:
    """The operator overloads that have one of these traits, each of which some operator must have."""
    found = [{op for op, known in _traits().items() if trait in known} for trait in traits]
    if not all(found):
        raise KeyError(f"no operator has the trait {traits[found.index(set())]}")
    return frozenset().union(*found)


@cache
def names_of(*traits: str) -> frozenset[str]:
    """The names of operators, whatever the overload: ``to`` for ``to.dtype``."""
    return frozenset(op._schema.name.removeprefix("aten::") for op in family(*traits))
