"""Sample calls of every operator in the rule table: data for ``rule_validation``.

Sizes are small and of all kinds: 1; below the number of ranks; primes; with divisors, so that a factor can be an inner
or outer part of a dimension.  Elementwise operators get their samples from their schemas.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fxsp.passes.attention.operators import BANDED
from fxsp.passes.rules.families import TABLE, Row, family, overloads
from fxsp.passes.rules.notation import Pattern
from rule_validation import Sample, T

__all__ = ["SAMPLES", "elementwise_samples"]

X = T((2, 5, 6))
N = T((5, 6))
I64 = torch.int64
F32 = torch.float32
#: No bias and no scale of the result, which is fp32: the last arguments of ``_scaled_mm``.
_IN_FP32 = (None, None, F32)

#: Operators by name, and calls of them: positional arguments, then maybe keywords in a dict.
_CALLS: dict[str, list[tuple[Any, ...]]] = {
    # rules_elementwise
    "type_as": [(X, T((3, 3), "small")), (T((4, 5), "small"), T((2,)))],
    "to.other": [(X, T((3, 3), "small")), (X, T((3, 2, 5, 6), "small"))],
    "dropout": [(X, 0.5, False), (X, 0.0, True)],
    "native_dropout": [(X, 0.5, False)],
    "feature_dropout": [(X, 0.5, False)],
    # rules_reduce
    "linear": [(T((2, 5, 6)), T((4, 6))), (T((2, 5, 6)), T((4, 6)), T((4,))), (T((1, 6)), T((1, 6))), (T((5,)),
        T((4, 5)))],
    "mm": [(T((5, 6)), T((6, 4)))],
    "bmm": [(T((2, 5, 6)), T((2, 6, 4)))],
    "matmul": [
        (T((5, 6)), T((6, 4))),
        (T((2, 4, 5)), T((5, 3))),
        (T((3, 2, 4, 5)), T((2, 5, 6))),
        (T((3, 1, 4, 5)), T((1, 2, 5, 6))),
        (T((5,)), T((2, 5, 3))),
        (T((2, 3, 5)), T((5,))),
        (T((5,)), T((5,))),
    ],
    "linalg_matmul": [(T((2, 4, 5)), T((2, 5, 3)))],
    "dot": [(T((6,)), T((6,)))],
    "mv": [(T((5, 6)), T((6,)))],
    "outer": [(T((5,)), T((6,)))],
    "addmm": [(T((4,)), T((5, 6)), T((6, 4))), (T((5, 4)), T((5, 6)), T((6, 4))), (T((1, 4)), T((5, 2)), T((2, 4)))],
    "baddbmm": [(T((2, 5, 4)), T((2, 5, 6)), T((2, 6, 4))), (T((1, 5, 1)), T((2, 5, 6)), T((2, 6, 4)))],
    "_int_mm": [(T((5, 6), "int8"), T((6, 4), "int8")), (T((1, 6), "int8"), T((6, 5), "int8"))],
    "_scaled_mm": [
        (T((5, 6), "float8"), T((6, 4), "float8"), T((5, 1), "scale"), T((1, 4), "scale"), *_IN_FP32),
        (T((4, 6), "float8"), T((6, 5), "float8"), T((), "scale"), T((), "scale"), *_IN_FP32),
        (T((4, 6), "float8"), T((6, 5), "float8"), T((1, 1), "scale"), T((1, 1), "scale"), T((5,), "scale"), None, F32),
        (T((1, 6), "float8"), T((6, 5), "float8"), T((1, 1), "scale"), T((1, 5), "scale"), *_IN_FP32),
    ],
    "einsum": [
        ("bsc,bsd->bcd", [T((2, 5, 4)), T((2, 5, 3))]),
        ("bhnd,bhmd->bhnm", [T((2, 2, 4, 3)), T((2, 2, 5, 3))]),
        ("ab,c->c", [T((5, 2)), T((6,))]),
        ("bs,b->s", [T((2, 5)), T((1,))]),
        ("ij->ji", [T((4, 5))]),
        ("...sc,...dc", [T((2, 2, 4, 3)), T((2, 5, 3))]),
    ],
    "sum": [(X,), (T((2, 5), "small"),), (T((6, 2), "bool"),)],
    "sum.dim_IntList": [
        (X, [1]), (X, [0, -1], True), (X, []), (X, None), (T((5, 6), "bool"), [0]), (T((4, 6), "small"),
        [1], False, {"dtype": torch.float64}),
        (T((4, 5), "complex"), [0]),
    ],
    "mean": [(X,), (T((4,)),)],
    "mean.dim": [(X, [1]), (X, [0, -1], True), (X, None), (T((4, 6), "small"), [0], {"dtype": torch.float64})],
    "layer_norm": [(X, [6], T((6,)), T((6,))), (X, [6]), (T((4, 2, 6)), [2, 6], T((2, 6)), T((2, 6))),
        (X, [6], None, T((6,)))],
    "rms_norm": [(X, [6], T((6,)), 1e-6), (X, [6]), (T((4, 2, 3)), [2, 3], T((2, 3)))],
    "native_layer_norm": [(X, [6], T((6,)), T((6,)), 1e-5), (T((4, 2, 3)), [2, 3], None, None, 1e-5)],
    "_fused_rms_norm": [(X, [6], T((6,)), 1e-6)],
    "group_norm": [(T((4, 6, 5)), 3, T((6,)), T((6,))), (T((5, 4, 2, 2)), 2)],
    "instance_norm": [(T((4, 3, 5)), T((3,)), T((3,)), None, None, True, 0.1, 1e-5, False)],
    "softmax.int": [(X, 1), (X, -1)],
    "log_softmax.int": [(X, -1)],
    "_softmax": [(X, 2, False)],
    "_log_softmax": [(X, 1, False)],
    "cumsum": [(X, 1)],
    "cumprod": [(X, 2)],
    "logcumsumexp": [(X, 1)],
    "cummax": [(X, 1)],
    "cummin": [(X, -1)],
    "flip": [(X, [1]), (X, [0, 2])],
    "roll": [(X, [2], [1]), (X, [1, 1], [0, 2]), (X, [1])],
    "sort": [(X, 1), (X,)],
    "sort.stable": [(X, {"stable": True, "dim": 1})],
    "argsort": [(T((4, 5, 6), "order"), 1), (T((4, 6), "order"),)],
    "argsort.stable": [(T((4, 5, 6)), {"stable": True, "dim": 0})],
    "topk": [(X, 2), (X, 3, 1)],
    "diff": [(X, 1, 1), (X,), (X, 1, 1, T((2, 1, 6)))],
    "triu": [(T((4, 5, 6)), 1)],
    "tril": [(T((4, 5, 6)),), (T((5, 6)), -1)],
    "glu": [(X, -1), (T((4, 5)), 0)],
    "conv1d": [(T((5, 3, 6)), T((4, 3, 3)), T((4,)), [1], [1]), (T((3, 6)), T((4, 3, 3)))],
    "conv2d": [(T((4, 2, 5, 5)), T((3, 2, 3, 3)), T((3,)), [2, 2], [1, 1])],
    "conv3d": [
        (T((5, 2, 3, 3, 3)), T((3, 2, 2, 2, 2))),
        (T((2, 2, 5, 4, 4)), T((3, 2, 1, 2, 2)), T((3,)), [1, 2, 2]),
        (T((2, 2, 5, 3, 4)), T((3, 2, 1, 2, 1)), None, [1, 1, 2], [1, 0, 0]),
    ],
    "conv1d.padding": [(T((5, 3, 6)), T((4, 3, 3)), None, [1], "same")],
    "conv2d.padding": [(T((5, 2, 5, 5)), T((3, 2, 3, 3)), None, [1, 1], "same")],
    "conv3d.padding": [(T((5, 2, 3, 3, 3)), T((3, 2, 1, 1, 1)), None, [1, 1, 1], "valid")],
    "convolution": [(T((5, 3, 6)), T((4, 3, 3)), T((4,)), [1], [1], [1], False, [0], 1)],
    "conv_transpose1d": [(T((5, 3, 4)), T((3, 2, 3)), T((2,)))],
    "conv_transpose2d.input": [(T((5, 3, 4, 4)), T((3, 2, 3, 3)))],
    "conv_transpose3d.input": [(T((5, 3, 2, 2, 2)), T((3, 2, 2, 2, 2)))],
    # rules_views
    "view": [(X, [10, 6]), (X, [2, 5, 2, 3]), (X, [-1]), (T((4, 6)), [2, 2, 6]), (T((1, 6)), [6])],
    "reshape": [(X, [10, 2, 3]), (X, [4, 15]), (T((1, 5, 1)), [5, 1, 1]), (T((4, 1)), [2, 2]), (T((2, 12)), [4, 6])],
    "_unsafe_view": [(X, [10, 6])],
    "view_copy": [(X, [10, 6])],
    "ravel": [(X,), (T((5,)),)],
    "view_as": [(X, T((10, 6))), (T((4, 6)), T((2, 2, 6)))],
    "reshape_as": [(X, T((10, 6)))],
    "flatten.using_ints": [(X, 0, 1), (X,), (T((4, 2, 3)), 1, 2)],
    "unflatten.int": [(T((2, 12)), 1, [3, 4]), (X, -1, [-1, 2])],
    "squeeze": [(T((1, 5, 1)),), (T((5, 6)),)],
    "squeeze.dim": [(T((5, 1, 6)), 1), (T((5, 6)), 0)],
    "squeeze.dims": [(T((1, 5, 1)), [0, 2])],
    "unsqueeze": [(X, 1), (T((1,)), 0), (T((5,)), -1)],
    "transpose.int": [(X, 1, 2), (X, -1, 0)],
    "permute": [(X, [2, 0, 1]), (X, [0, -1, 1])],
    "t": [(N,), (T((5,)),)],
    "numpy_T": [(N,)],
    "mT": [(X,)],
    "mH": [(X,)],
    "adjoint": [(X,), (T((2, 5, 4), "complex"),)],
    "matrix_H": [(N,)],
    "movedim.int": [(X, 0, 2), (X, -1, 0)],
    "movedim.intlist": [(X, [0, 1], [2, 0])],
    "moveaxis.int": [(X, 1, 0)],
    "moveaxis.intlist": [(X, [2], [0])],
    "swapaxes": [(X, 0, 1)],
    "swapdims": [(X, 1, 2)],
    "expand": [(T((5, 1, 6)), [-1, 3, -1]), (T((5, 6)), [2, 5, 6]), (T((1, 4)), [1, 4])],
    "expand_as": [(T((5, 1)), T((2, 5, 6))), (T((4, 6)), T((4, 6)))],
    "broadcast_to": [(T((5, 1)), [2, 5, 6])],
    "view_as_complex": [(T((5, 6, 2)),)],
    "view_as_real": [(T((5, 6), "complex"),)],
    # rules_index
    "slice.Tensor": [(X, 1, 1, 4), (X, -1, 0, 6, 2), (X, 0)],
    "narrow": [(X, 1, 1, 3), (X, 2, 0, 6)],
    "chunk": [(X, 3, -1), (X, 2, 1)],
    "split.Tensor": [(X, 2, -1), (X, 3, 1)],
    "split.sizes": [(X, [2, 4], -1)],
    "split_with_sizes": [(X, [2, 4], 2), (X, [1, 4], 1)],
    "tensor_split.sections": [(X, 2, 1)],
    "tensor_split.indices": [(X, [1, 3], 2)],
    "repeat_interleave.self_int": [(X, 2, 1), (X, 2)],
    "select.int": [(X, 1, 2), (X, -1, -1)],
    "unbind.int": [(X, 0), (X, 1)],
    "cat": [([X, T((2, 5, 2))], -1), ([X, T((2, 1, 6))], 1), ([X, X, X], 0)],
    "concat": [([X, X], 0)],
    "concatenate": [([X, X], 0)],
    "stack": [([X, X], 1), ([T((5,)), T((5,))], -1)],
    "pad": [(X, [1, 2]), (X, [0, 0, 1, 1]), (T((4, 5, 6)), [1, 1], "reflect")],
    "constant_pad_nd": [(X, [0, 0, 2, 0], 1.0)],
    "repeat": [(X, [1, 2, 1]), (X, [2, 1, 1, 1])],
    "embedding": [(T((7, 4)), T((2, 5), "index", 7)), (T((7, 3)), T((6,), "index", 7), 2)],
    "one_hot": [(T((4, 5), "index", 6), 6)],
    "index_select": [(X, 1, T((4,), "index", 5)), (X, 0, T((3,), "index", 2))],
    "index.Tensor": [
        (X, [None, T((4,), "index", 5)]),
        (T((5, 4, 6)), [T((6,), "index", 5), T((1,), "index", 4)]),
        (X, [None, T((4, 1), "index", 5), T((6,), "index", 6)]),
        (T((5, 4)), [T((2, 6), "index", 5)]),
    ],
    "gather": [(X, 1, T((2, 3, 6), "index", 5)), (X, -1, T((2, 5, 4), "index", 6)), (T((4, 5)), 0, T((6, 2),
        "index", 4))],
    "slice_scatter": [(X, T((2, 2, 6)), 1, 1, 3), (X, T((2, 5, 3)), -1, 0, 6, 2)],
    "select_scatter": [(X, T((2, 6)), 1, 2)],
    "tile": [(X, [2]), (X, [2, 1, 1, 1])],
    # rules_scatter
    "scatter.src": [(X, 1, T((2, 3, 6), "index", 5), T((2, 3, 6))), (X, 0, T((2, 4, 6), "index", 2), T((2, 4, 6)))],
    "scatter.value": [(X, -1, T((2, 5, 1), "index", 6), 0.5)],
    "scatter.reduce": [(X, 1, T((2, 1, 6), "index", 5), T((2, 1, 6)), {"reduce": "add"})],
    "scatter.value_reduce": [(X, 1, T((2, 1, 6), "index", 5), 0.5, {"reduce": "multiply"})],
    "scatter_add": [(X, 1, T((2, 4, 6), "index", 5), T((2, 4, 6))), (T((5,)), 0, T((6,), "index", 5), T((6,)))],
    "scatter_reduce.two": [(X, 1, T((2, 4, 6), "index", 5), T((2, 4, 6)), "amax")],
    "index_add": [(X, 1, T((4,), "index", 5), T((2, 4, 6))), (T((5,)), 0, T((4,), "index", 5), T((4,)))],
    "index_copy": [(X, 1, T((5,), "order"), T((2, 5, 6)))],
    "index_fill.int_Scalar": [(X, 1, T((2,), "index", 5), 0.5)],
    "index_fill.int_Tensor": [(X, -1, T((2,), "index", 5), T(()))],
    "index_reduce": [(X, 1, T((4,), "index", 5), T((2, 4, 6)), "amax")],
    "index_put": [
        (X, [None, T((5,), "order")], T((2, 5, 6))),
        (X, [None, T((2,), "index", 5)], T((1, 6)), True),
        (T((5, 4, 6)), [T((3,), "index", 5), T((1,), "index", 4)], T((3, 6)), True),
        (T((5, 4)), [T((5,), "order")], T(())),
    ],
    "_unsafe_index_put": [(X, [None, T((5,), "order")], T((2, 5, 6)))],
    # rules_spatial
    "avg_pool1d": [(T((5, 2, 6)), [2]), (T((4, 6)), [3])],
    "max_pool1d": [(T((5, 2, 6)), [2])],
    "max_pool1d_with_indices": [(T((5, 2, 6)), [2])],
    "adaptive_avg_pool1d": [(T((5, 2, 6)), [3])],
    "adaptive_max_pool1d": [(T((5, 2, 6)), [3])],
    "upsample_nearest1d": [(T((5, 2, 3)), [6])],
    "upsample_nearest1d.vec": [(T((5, 2, 3)), None, [2.0])],
    "upsample_linear1d": [(T((5, 2, 3)), [6], False)],
    "upsample_linear1d.vec": [(T((5, 2, 3)), [6], False, None)],
    "diag_embed": [(T((4, 5)),), (T((5,)), 1)],
    "avg_pool2d": [(T((5, 2, 4, 4)), [2, 2])],
    "max_pool2d": [(T((5, 2, 4, 4)), [2, 2])],
    "max_pool2d_with_indices": [(T((5, 2, 4, 4)), [2, 2])],
    "adaptive_avg_pool2d": [(T((5, 2, 4, 4)), [2, 2])],
    "_adaptive_avg_pool2d": [(T((5, 2, 4, 4)), [2, 2])],
    "adaptive_max_pool2d": [(T((5, 2, 4, 4)), [2, 2])],
    **{f"upsample_{n}2d.vec": [(T((5, 2, 2, 3)), [4, 6], False, None)] for n in ("bilinear", "bicubic")},
    **{f"upsample_{n}2d": [(T((5, 2, 2, 3)), [4, 6], False)] for n in ("bilinear", "bicubic")},
    "_upsample_bilinear2d_aa.vec": [(T((5, 2, 2, 3)), [4, 6], False, None)],
    "upsample_nearest2d": [(T((5, 2, 2, 3)), [4, 6])],
    "upsample_nearest2d.vec": [(T((5, 2, 2, 3)), None, [2.0, 2.0])],
    "_upsample_nearest_exact2d.vec": [(T((5, 2, 2, 3)), [4, 6], None)],
    **{n: [(T((5, 3, 3)),)] for n in "linalg_qr linalg_inv inverse linalg_det matrix_exp linalg_matrix_exp".split()},
    "linalg_svd": [(T((5, 3, 2)), False)],
    "avg_pool3d": [(T((5, 2, 2, 2, 2)), [2, 2, 2])],
    "max_pool3d": [(T((5, 2, 2, 2, 2)), [2, 2, 2])],
    "max_pool3d_with_indices": [(T((5, 2, 2, 2, 2)), [2, 2, 2])],
    "adaptive_avg_pool3d": [(T((5, 2, 2, 2, 2)), [1, 1, 1])],
    "upsample_nearest3d": [(T((5, 2, 1, 2, 2)), [2, 4, 4])],
    "upsample_nearest3d.vec": [(T((5, 2, 1, 2, 2)), [2, 4, 4], None)],
    "upsample_trilinear3d": [(T((5, 2, 1, 2, 2)), [2, 4, 4], False)],
    "upsample_trilinear3d.vec": [(T((5, 2, 1, 2, 2)), [2, 4, 4], False, None)],
    "pixel_shuffle": [(T((5, 4, 2, 3)), 2)],
    "pixel_unshuffle": [(T((5, 2, 2, 4)), 2)],
    "channel_shuffle": [(T((5, 4, 2, 3)), 2)],
    "batch_norm": [(T((4, 5, 3)), T((5,)), T((5,)), T((5,), "buffer"), T((5,), "buffer"), False, 0.1, 1e-5, False)],
    "prelu": [(X, T((5,))), (X, T((1,)))],
    "_prelu_kernel": [(X, T((1, 5, 1)))],
    "broadcast_tensors": [([X, T((5, 1))],), ([X, X],), ([T((6,)), X, T(())],)],
    "meshgrid": [([T((5,)), T((6,))],)],
    "meshgrid.indexing": [([T((4,)), T((5,)), T((2,))], {"indexing": "xy"}), ([T((5,)), T(())], {"indexing": "ij"})],
    "unfold": [(X, 1, 2, 1), (T((5,)), 0, 2, 3)],
    "cdist": [(T((2, 5, 3)), T((2, 4, 3)))],
    "_cdist_forward": [(T((2, 5, 3)), T((2, 4, 3)), 2.0, None)],
    "bucketize.Tensor": [(T((4, 5)), T((3,), "order"))],
    "cosine_similarity": [(X, X, 2), (X, T((1, 5, 6)), 1)],
    # attention
    "scaled_dot_product_attention": [
        (T((2, 2, 5, 4)), T((2, 2, 6, 4)), T((2, 2, 6, 3))),
        (T((2, 4, 5, 4)), T((2, 4, 6, 4)), T((2, 4, 6, 4)), T((4, 5, 6))),
        (T((2, 4, 5, 4)), T((2, 2, 6, 4)), T((2, 2, 6, 4)), T((2, 1, 1, 6)), {"enable_gqa": True}),
        (T((4, 5, 2)), T((4, 5, 2)), T((4, 5, 2)), None, 0.0, True),
        (T((6, 2)), T((5, 2)), T((5, 2))),
    ],
}  # fmt: skip

#: Reductions over one dimension, with their other arguments before it.
for _name in (
    "prod.dim_int amax amin max.dim min.dim all.dim any.dim argmax argmin logsumexp median.dim mode "
    "count_nonzero.dim_IntList "
    "nansum linalg_vector_norm kthvalue norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype var.dim std.dim var.correction "
    "std.correction var_mean.dim var_mean.correction std_mean.correction all.dims any.dims aminmax"
).split():
    _x = T((2, 5, 6), "bool") if _name.startswith(("all", "any")) else T((2, 5, 6))
    _before = {
        "linalg_vector_norm": (2,),
        "kthvalue": (2,),
        "norm.ScalarOpt_dim": (2,),
        "norm.ScalarOpt_dim_dtype": (2,),
    }
    _list = _name in ("amax", "amin", "logsumexp", "nansum", "linalg_vector_norm", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype", "count_nonzero.dim_IntList") or _name.startswith(("var", "std", "all.dims", "any.dims"))  # fmt: skip # noqa: E501
    _dim: Any = [1] if _list else 1
    _CALLS[_name] = [(_x, *_before.get(_name, ()), _dim)]
    if _name == "aminmax":
        _CALLS[_name] = [(_x, {"dim": 1}), (_x,)]
    elif _name == "norm.ScalarOpt_dim_dtype":
        _CALLS[_name] = [(_x, 2, [1], False, {"dtype": torch.float64}), (_x, 2, [0, 2], True, {"dtype": torch.float64})]
    elif _name != "count_nonzero.dim_IntList" and ".correction" not in _name:
        _more = (False,) if _name in ("var.dim", "std.dim", "var_mean.dim") else ()
        _last: Any = [0, 2] if _list else -1
        _CALLS[_name].append((_x, *_before.get(_name, ()), _last, *_more, True))
    elif ".correction" in _name:
        _CALLS[_name].append((_x, [0, 2], {"correction": 0, "keepdim": True}))
for _name in "prod max min all any argmax argmin var std norm.Scalar count_nonzero linalg_vector_norm".split():
    _CALLS.setdefault(_name, []).append((T((4, 5), "bool") if _name in ("all", "any") else T((4, 5)),))
for _name, _more_calls in {
    "amax": [(T((5, 6), "ties"), [0]), (T((2, 4, 3), "ties"), [1, 2]), (T((5, 2), "small"), [0]), (T((4, 6), "bool"),)],
    "amin": [(T((4, 5), "ties"), [0], True)],
    "max": [(T((4, 6), "ties"),), (T((5, 3), "small"),)],
    "min": [(T((5, 4), "ties"),)],
    "max.dim": [(T((6, 4), "ties"), 0), (T((5, 6), "small"), 0, True)],
    "min.dim": [(T((2, 6), "ties"), 1)],
    "argmax": [(T((4, 6), "ties"), 0), (T((4, 6), "ties"),), (T((3, 4, 2), "small"), None, True)],
    "argmin": [(T((2, 6, 3), "ties"),)],
    "aminmax": [(T((4, 6), "ties"), {"dim": 0, "keepdim": True})],
    "any": [(T((5, 6), "small"),)],
    "all.dim": [(T((4, 6), "ties"), 0)],
    "linalg_vector_norm": [(X, order, [1]) for order in (0, 1, 3, float("inf"), float("-inf"))]
    + [(T((4, 5)), 2, [0], False, {"dtype": torch.float64})],
    "norm.ScalarOpt_dim": [(T((5, 6)), None, [0])],
    "logsumexp": [(T((5, 4)), [0, 1])],
}.items():
    _CALLS[_name] += _more_calls


_NO_DERIVATIVE = {
    "detach_copy", "floor_divide", "floor_divide.Scalar", "remainder.Scalar_Tensor", "scatter.reduce",
    "scatter.value_reduce",
    "heaviside", "nextafter", "histc", "searchsorted.Tensor",
}  # fmt: skip


def _sample(name: str, call: tuple[Any, ...]) -> Sample:
    (op,) = overloads(name)
    kwargs = call[-1] if call and isinstance(call[-1], dict) else {}
    return Sample(op, call[: len(call) - bool(kwargs)], kwargs, grads=name not in _NO_DERIVATIVE)


#: Operators defined on part of the numbers.
_UNIT = set("log log2 log10 sqrt rsqrt asin acos atanh erfinv log1p xlogy pow float_power digamma lgamma".split())
#: Arguments that the schema does not tell.
_GIVEN: dict[str, tuple[Any, ...]] = {
    "to.dtype": (X, torch.float32),
    "to.device": (X, torch.device("cpu"), torch.float64),
    "to.dtype_layout": (X, {"dtype": torch.float32}),
    "to.prim_dtype": (X, None),
    "_to_copy": (X, {"dtype": torch.float32}),
    "round.decimals": (X, {"decimals": 1}),
    "div.Tensor_mode": (X, T((5, 1)), {"rounding_mode": "floor"}),
    "div.Scalar_mode": (X, 0.3, {"rounding_mode": "trunc"}),
    "clamp": (X, -0.5, 0.5),
    "clip": (X, None, 0.5),
    "clamp.Tensor": (X, T((5, 1), "unit"), None),
    "clip.Tensor": (X, None, T((5, 1), "unit")),
    "threshold": (X, 0.5, 0.1),
    "where.self": (T((5, 1), "bool"), X, T((1, 6))),
    "where.ScalarSelf": (T((5, 1), "bool"), 1.0, X),
    "where.ScalarOther": (T((2, 5, 1), "bool"), T((5, 6)), 1.0),
    "where.Scalar": (T((5, 6), "bool"), 1.0, 2.0),
    "masked_fill.Scalar": (X, T((5, 1), "bool"), 0.5),
    "masked_fill.Tensor": (X, T((5, 1), "bool"), T(())),
    "polar": (X, T((5, 1))),
    "complex": (X, T((2, 1, 6))),
    "full_like": (X, 0.5),
    "bitwise_left_shift.Tensor_Scalar": (T((5, 6), "small"), 2),
    "bitwise_right_shift.Tensor_Scalar": (T((5, 6), "small"), 2),
    "lerp.Scalar": (X, T((5, 1)), 0.3),
    "relu6": (X,),
    "gelu": (X, {"approximate": "tanh"}),
    "isclose": (X, T((5, 1))),
    "logit": (T((2, 5, 6), "unit"), None),
    "max.other": (X, T((5, 1))),
    "min.other": (X, T((5, 1))),
}


def elementwise_samples() -> dict[Any, list[Sample]]:
    """A call of every elementwise operator, broadcast where it has several operands."""
    return {op: [_elementwise(op)] for op in sorted(family("elementwise"), key=str)}


def _elementwise(op: Any) -> Sample:
    name = op._schema.name.removeprefix("aten::")
    full = name if op._overloadname == "default" else f"{name}.{op._overloadname}"
    if full in _GIVEN:
        return _sample(full, _GIVEN[full])
    kinds = ["unit"] if name in _UNIT else ["above"] if name == "acosh" else ["normal"]
    if name in ("real", "imag", "conj", "_conj", "resolve_conj", "angle", "sgn"):
        kinds = ["complex"]
    shapes = iter([(2, 5, 6), (5, 1), (2, 1, 6)])
    for kind in (*kinds, "small", "bool"):
        args: list[Any] = []
        shapes = iter([(2, 5, 6), (5, 1), (2, 1, 6)])
        for argument in op._schema.arguments:
            if "Tensor" in str(argument.type):
                args.append(T(next(shapes), kind))
            elif argument.has_default_value() or argument.kwarg_only:
                break
            else:
                args.append(2)
        generator = torch.Generator().manual_seed(0)
        try:
            op(*(a.draw(generator) if isinstance(a, T) else a for a in args))
        except RuntimeError:  # not for operands of this dtype
            continue
        return Sample(op, tuple(args), grads=full not in _NO_DERIVATIVE, value=name != "empty_like")
    raise AssertionError(f"{op} needs an entry among the given arguments")


#: Calls without rule, of operators that need their operands whole, or that have no rule for this use.
WHOLE_SAMPLES = [
    _sample(name, call)
    for name, call in {
        "histc": (X, 4),
        "renorm": (T((4, 5)), 2, 0, 1.0),
        "rot90": (X, 1, [0, 1]),
        "diagonal": (T((4, 5, 6)), 0, 1, 2),
        "native_group_norm": (T((4, 6, 5)), T((6,)), T((6,)), 4, 6, 5, 3, 1e-5),
        "masked_select": (T((4, 5)), T((4, 5), "bool")),
        "repeat_interleave.Tensor": (T((5,), "small"),),
        "searchsorted.Tensor": (T((5,), "order"), T((4, 6))),
        "fft_rfft": (X, None, 1),
        "kron": (T((2, 3)), T((4, 1))),
        "embedding": (T((7, 3)), T((2, 5), "index", 7), -1, True),
        "index.Tensor": (T((4, 5)), [T((4, 5), "bool")]),
        "index_put": (T((4, 5)), [T((4, 5), "bool")], T(())),
        "conv1d": (T((3, 6)), T((4, 3, 3))),
    }.items()
]

#: Operator -> samples of it.
SAMPLES: dict[Any, list[Sample]] = {}
for _name, _calls in _CALLS.items():
    for _call in _calls:
        _made = _sample(_name, _call)
        SAMPLES.setdefault(_made.op, []).append(_made)
#: Attention under a mask that is known by positions, which masks become: see fxsp.kernels.attention.banded.
SAMPLES[BANDED] = [
    replace(_made, op=BANDED)
    for _made in (
        _sample("scaled_dot_product_attention", call)
        for call in (
            (T((2, 2, 5, 4)), T((2, 2, 5, 4)), T((2, 2, 5, 3)), None, True, 2, None, False),
            (T((2, 4, 5, 4)), T((2, 2, 5, 4)), T((2, 2, 5, 4)), T((2, 1, 1, 5), "bool"), True, None, 0.5, True),
        )
    )
]


def samples_of(op: Any, row: Row) -> list[Sample]:
    """Calls of an operator, made of its rule in notation: each alternative, on operands of two ranks."""
    found = []
    for alternative in row.rule.split("|"):
        rule = Pattern.parse(alternative).rule
        factors = dict.fromkeys(f for dims in rule.operands for d in dims or () for f in d)
        for star in ((2, 5), (5,)):
            sizes = {f: star if f[0] == "*" else (n,) for f, n in zip(factors, itertools.cycle((4, 6, 3, 5, 2)))}
            shapes = [tuple(n for d in dims or () for n in (sizes[d[0]] if d else (1,))) for dims in rule.operands]
            found.append(_call_of(op, shapes, row.given))
    return list({str(sample): sample for sample in found}.values())


def _call_of(op: Any, shapes: list[tuple[int, ...]], given: Mapping[str, Any]) -> Sample:
    left = iter(shapes)
    arguments: dict[str, Any] = {}
    for argument in op._schema.arguments:
        shape = next(left, None) if "Tensor" in str(argument.type) else None
        if shape is not None:
            arguments[argument.name] = T(shape)
        elif argument.name in given:
            arguments[argument.name] = given[argument.name]
    return Sample(op, (), arguments)


for _row in TABLE:
    for _op in overloads(*_row.operators.split()) if _row.rule and "elementwise" not in _row.traits else ():
        if _op not in SAMPLES:
            SAMPLES[_op] = samples_of(_op, _row)
