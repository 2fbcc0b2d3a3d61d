"""What is known of ATen's operators: one table, operator -> traits, which all passes read by the name of a trait.

A row of :data:`TABLE` gives traits to operators; an operator may be in several rows.  ``add.Tensor`` is an overload,
``outer`` the default one, ``add.*`` every overload of tensors that maps elements and writes to none.  Older and newer
versions of torch lack a few, which are left out.

A trait that is the name of a rule function says which rule an operator has (:mod:`fxsp.passes.rules.table`); the others
are facts that passes ask for::

    cheap            recomputing it on whole operands beats any communication
    view             the same elements, in other dimensions
    linear           in all operands together: gradients need none of them, and a sum of results is the result of sums
    scale            linear in each operand alone
    work             so much arithmetic per element that it is worth running on shards for its own sake
    in_sdpa          ``scaled_dot_product_attention`` has an argument for it: scaling, masks, casts
    keeps_zero       of zero it makes zero
    by_strides       it reads memory, not values: its operand must lie in memory as the program's own does
    keeps_strides    it refuses an operand that does not lie in memory as it expects
    moves_memory     in place, it changes which memory a tensor has, or how much
    writes_statistics  it writes to running statistics, which its schema does not say

Everything else is a family whose name says what it is.  No other file classifies operators of ATen.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

__all__ = ["TABLE", "family", "names_of", "overloads", "traits_of"]

aten = torch.ops.aten

#: What a trait implies.
_IMPLIED = {
    "elementwise": "cheap",
    "type_as": "cheap",
    "reshape": "view cheap",
    "permute": "view cheap",
    "expand": "view cheap",
    "copy": "same_values",
    "cast": "same_values",
}

#: Traits, and the operators that have them.
TABLE: tuple[tuple[str, str], ...] = (
    # Elementwise: dimensions are aligned from the right, a size of 1 broadcasts.
    ("elementwise", """
        pow.* float_power.* atan2.* true_divide.* floor_divide.* remainder.* fmod.* fmax.* fmin.* copysign.* hypot.*
        xlogy.* lerp.* addcmul.* addcdiv.* bitwise_left_shift.* bitwise_right_shift.* logaddexp.* logaddexp2.*
        heaviside.* ldexp.* gcd.* lcm.* nextafter.* max.other min.other isclose.* maximum.* minimum.* eq.* ne.* lt.*
        le.* gt.* ge.* __and__.* __or__.* __xor__.* bitwise_and.* bitwise_or.* bitwise_xor.* logical_and.* logical_or.*
        logical_xor.* bitwise_not.* logical_not.* rsub.*
        abs.* sign.* exp.* exp2.* expm1.* log.* log2.* log10.* log1p.* sin.* cos.* tan.* asin.* acos.* atan.* sinh.*
        cosh.* tanh.* asinh.* acosh.* atanh.* sigmoid.* silu.* gelu.* relu.* relu6.* leaky_relu.* elu.* selu.* celu.*
        mish.* hardtanh.* hardswish.* hardsigmoid.* softplus.* log_sigmoid.* threshold.* erf.*
        erfc.* erfinv.* reciprocal.* square.* floor.* ceil.* round.* trunc.* frac.* clamp.* clip.* clamp_min.*
        clamp_max.* isnan.* isinf.* isfinite.* nan_to_num.* sinc.* digamma.* lgamma.* polar.* complex.* real.* imag.*
        conj.* _conj.* resolve_conj.* resolve_neg.* angle.* signbit.* positive.* sgn.* deg2rad.* rad2deg.* hardshrink.*
        softshrink.* logit.* isposinf.* isneginf.* i0.* detach_copy.* alias_copy.* lift_fresh.*
        lift_fresh_copy.* zeros_like.* ones_like.* empty_like.* full_like.*
    """),
    ("elementwise linear in_sdpa", "add.* sub.* to.*"),
    ("elementwise in_sdpa", "mul.* div.* where.* masked_fill.*"),
    ("elementwise linear keeps_zero turns_pair", "neg.*"),
    ("turns_pair", "sub.Tensor rsub.Scalar view_as_complex"),
    ("scale", "mul.Tensor mul.Scalar div.Scalar"),
    ("elementwise root", "sqrt rsqrt"),
    ("bitwise", "bitwise_and.* bitwise_or.* bitwise_xor.* __and__.* __or__.* __xor__.*"),
    ("negation", "neg logical_not bitwise_not"),
    # Copies and casts.
    ("elementwise copy linear in_sdpa keeps_zero moves", "clone contiguous"),
    ("elementwise copy linear in_sdpa moves", "alias"),
    ("elementwise same_values detached moves", "detach"),
    ("same_values", "lift_fresh lift_fresh_copy to.device to.other"),
    ("elementwise cast linear in_sdpa keeps_zero", "to.dtype _to_copy"),
    ("elementwise cast linear in_sdpa", "to.dtype_layout"),
    ("elementwise linear in_sdpa keeps_zero", "to.device"),
    ("type_as cast in_sdpa", "type_as"),
    ("type_as linear in_sdpa", "to.other"),
    # Made of a shape.
    ("constant detached", "zeros_like ones_like empty_like"),
    ("constant", "full_like"),
    ("drawn", """
        rand_like rand_like.generator randn_like randn_like.generator randint_like randint_like.low_dtype
        randint_like.generator randint_like.low_generator_dtype bernoulli.p uniform normal_functional exponential
        geometric cauchy log_normal random random.from random.to
    """),
    ("factory", "new_zeros new_ones new_full new_empty new_empty_strided"),
    ("full", "full new_full full_like scalar_tensor"),
    ("ones", "ones new_ones ones_like"),
    ("zeros", "zeros new_zeros zeros_like"),
    ("arange", "arange arange.start arange.start_step"),
    ("dropout", "native_dropout feature_dropout"),
    ("dropout in_sdpa moves", "dropout"),
    # Views.
    ("reshape linear", "reshape flatten.using_ints unflatten.int unsqueeze squeeze squeeze.dim squeeze.dims"),
    ("reshape linear keeps_strides", "view"),
    ("reshape keeps_strides", "_unsafe_view"),
    ("reshape", "view_copy view_as reshape_as ravel"),
    ("permute linear", "permute transpose.int"),
    ("permute", "swapaxes swapdims"),
    ("permute move linear", "movedim.intlist movedim.int"),
    ("permute move", "moveaxis.int moveaxis.intlist"),
    ("permute reversal", "t numpy_T"),
    ("permute matrix_transpose", "mT"),
    ("permute matrix_transpose conjugates", "mH adjoint matrix_H"),
    ("expand linear", "expand"),
    ("expand", "expand_as broadcast_to"),
    ("view_as_complex cheap moves pairs", "view_as_complex"),
    ("view_as_real cheap moves", "view_as_real"),
    ("by_strides", "as_strided as_strided_copy as_strided_scatter"),
    # Cuts, joins, repetitions and look-ups.
    ("cut slice linear moves", "slice.Tensor narrow"),
    ("cut split linear moves", "split.Tensor split_with_sizes chunk"),
    ("cut split linear", "split.sizes"),
    ("cut split", "tensor_split.sections"),
    ("unsafe_split", "unsafe_chunk unsafe_split.Tensor"),
    ("cut", "tensor_split.indices"),
    ("cut cheap repeat_interleave", "repeat_interleave.self_int"),
    ("select cheap linear moves", "select.int"),
    ("select linear moves", "unbind.int"),
    ("cat join linear", "cat"),
    ("cat join", "concat concatenate"),
    ("stack join linear cheap pairs", "stack"),
    ("pad linear", "constant_pad_nd"),
    ("pad", "pad"),
    ("repeat cheap", "repeat"),
    ("repeat", "tile"),
    ("embedding", "embedding"),
    ("one_hot", "one_hot"),
    ("index_select", "index_select"),
    ("index", "index.Tensor"),
    ("gather", "gather"),
    ("scatter_into moves", "slice_scatter select_scatter"),
    ("scatter", """
        scatter.src scatter.value scatter.reduce scatter.value_reduce scatter_add scatter_reduce.two
    """),
    ("index_add", "index_add index_copy index_fill.int_Scalar index_fill.int_Tensor index_reduce"),
    ("index_put", "index_put _unsafe_index_put"),
    # Products.
    ("linear_layer work row_product", "linear"),
    ("matmul product work row_product", "mm matmul"),
    ("matmul product work", "bmm"),
    ("matmul product", "linalg_matmul"),
    ("matmul", "dot mv"),
    ("outer cheap", "outer"),
    ("addmm product work", "addmm baddbmm"),
    ("einsum product work", "einsum"),
    ("int_mm", "_int_mm"),
    ("scaled_mm", "_scaled_mm"),
    ("cdist", "cdist _cdist_forward"),
    ("convolution work", "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding"),
    ("convolution", "convolution conv_transpose1d conv_transpose2d.input conv_transpose3d.input"),
    # Reductions: sums; those that another all-reduce combines; those that need all tokens at once.
    ("total sum linear", "sum"),
    ("total sum linear statistic", "sum.dim_IntList"),
    ("total mean linear", "mean"),
    ("total mean linear statistic", "mean.dim"),
    ("combined largest", "amax"),
    ("combined", "amin aminmax logsumexp"),
    ("combined largest whole_gradient", "max"),
    ("combined whole_gradient", "min"),
    ("combined largest with_index", "max.dim"),
    ("combined with_index", "min.dim"),
    ("combined largest position", "argmax"),
    ("combined position", "argmin"),
    ("combined logical largest", "any any.dim any.dims"),
    ("combined logical", "all all.dim all.dims"),
    ("combined norm statistic", "linalg_vector_norm"),
    ("combined norm", "norm.ScalarOpt_dim norm.Scalar norm.ScalarOpt_dim_dtype"),
    ("reduction", """
        prod prod.dim_int var var.dim std std.dim std.correction var_mean.dim var_mean.correction nansum median.dim mode
        std_mean.correction count_nonzero.dim_IntList count_nonzero kthvalue
    """),
    ("reduction statistic", "var.correction"),
    # Along some dimensions; the others pass.
    ("along softmax", "softmax.int _softmax"),
    ("along", """
        log_softmax.int _log_softmax cumprod logcumsumexp sort sort.stable argsort argsort.stable topk diff glu cummax
        cummin
    """),
    ("along linear", "cumsum flip roll"),
    ("along triangle", "triu tril"),
    ("layer_norm normalizes", "layer_norm rms_norm native_layer_norm _fused_rms_norm"),
    ("group_norm normalizes", "group_norm"),
    ("group_norm writes_statistics", "instance_norm"),
    ("batch_norm writes_statistics", "batch_norm"),
    # On the last dimension, the last two, the last three.
    ("last_dims last_1", """
        avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d
        upsample_nearest1d.vec upsample_linear1d upsample_linear1d.vec diag_embed
    """),
    ("last_dims last_2", """
        avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d
        upsample_nearest2d upsample_nearest2d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d
        upsample_bicubic2d.vec _upsample_nearest_exact2d.vec _upsample_bilinear2d_aa.vec linalg_qr linalg_inv inverse
        linalg_det linalg_svd matrix_exp linalg_matrix_exp
    """),
    ("last_dims last_3", """
        avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d upsample_nearest3d upsample_nearest3d.vec
        upsample_trilinear3d upsample_trilinear3d.vec pixel_shuffle pixel_unshuffle channel_shuffle
    """),
    ("prelu", "prelu _prelu_kernel"),
    ("meshgrid", "meshgrid meshgrid.indexing"),
    ("unfold", "unfold"),
    ("beside", "bucketize.Tensor cosine_similarity"),
    ("broadcast_tensors", "broadcast_tensors"),
    # Losses.
    ("elementwise_loss", """
        mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
        soft_margin_loss kl_div
    """),
    ("class_loss", "cross_entropy_loss nll_loss_nd nll_loss"),
    # In place.
    ("moves_memory", "set_.source_Tensor resize_ resize_as_ set_data"),
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
    for traits, operators in TABLE:
        given = {*traits.split()}
        given |= {implied for trait in given for implied in _IMPLIED.get(trait, "").split()}
        for op in overloads(*operators.split()):
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
