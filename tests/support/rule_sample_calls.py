"""Calls of operators in the rule table, by the names of the operators: positional arguments, then maybe keywords."""

from __future__ import annotations

from typing import Any

import torch

from rule_recorder import T

__all__ = ["CALLS", "X"]

X = T((2, 5, 6))
N = T((5, 6))
I64 = torch.int64
F32 = torch.float32
#: No bias and no scale of the result, which is fp32: the last arguments of ``_scaled_mm``.
_IN_FP32 = (None, None, F32)

#: Operators by name, and calls of them: positional arguments, then maybe keywords in a dict.
CALLS: dict[str, list[tuple[Any, ...]]] = {
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
    CALLS[_name] = [(_x, *_before.get(_name, ()), _dim)]
    if _name == "aminmax":
        CALLS[_name] = [(_x, {"dim": 1}), (_x,)]
    elif _name == "norm.ScalarOpt_dim_dtype":
        CALLS[_name] = [(_x, 2, [1], False, {"dtype": torch.float64}), (_x, 2, [0, 2], True, {"dtype": torch.float64})]
    elif _name != "count_nonzero.dim_IntList" and ".correction" not in _name:
        _more = (False,) if _name in ("var.dim", "std.dim", "var_mean.dim") else ()
        _last: Any = [0, 2] if _list else -1
        CALLS[_name].append((_x, *_before.get(_name, ()), _last, *_more, True))
    elif ".correction" in _name:
        CALLS[_name].append((_x, [0, 2], {"correction": 0, "keepdim": True}))
for _name in "prod max min all any argmax argmin var std norm.Scalar count_nonzero linalg_vector_norm".split():
    CALLS.setdefault(_name, []).append((T((4, 5), "bool") if _name in ("all", "any") else T((4, 5)),))
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
    CALLS[_name] += _more_calls
