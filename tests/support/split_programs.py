"""Eager programs on split values, on real ranks, beside the same programs on plain tensors."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

import fxsp
from fxsp.split_values.conversions import from_local
from fxsp.split_values.convert import sharded
from fxsp.split_values.forward import Forward, record_to
from fxsp.split_values.one_call import _programs
from fxsp.split_values.value import Placed, SplitTensor
from fxsp.types import Ranks, Segment, Sequence, Shard
from rule_recorder import T
from rule_samples import SAMPLES, elementwise_samples
from running import error_of

__all__ = ["PROGRAMS", "run_gathers", "run_programs", "run_samples", "run_strangers"]


def split(x: Tensor, rank: int, size: int, dim: int, lengths: tuple[int, ...] = (), layout: Any = "contiguous") -> Any:
    """A whole value as a split one: its gradient is that of the whole value."""
    sequence = Sequence(tuple(Segment(n, layout=layout) for n in lengths or (x.shape[dim],)))
    placed = Placed(Shard(dim, sequence), Ranks(rank, size, torch.distributed.group.WORLD.group_name))
    return (
        _Split.apply(x, placed)
        if x.requires_grad
        else from_local(sharded(x, placed.type, placed.ranks), placed, x.shape)
    )


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, placed: Placed) -> Tensor:
        return SplitTensor(sharded(x, placed.type, placed.ranks), placed, x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return fxsp.whole(grad), None


W = torch.linspace(-1, 1, 64).view(8, 8)


def _inplace_on_view(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3].mul_(2)
    y[0, 0] = 5.0
    return y + 1


def _inplace_after_view(x: Tensor) -> Tensor:
    y = x.clone().view(x.shape)
    y += x
    y.add_(1).relu_()
    return y.transpose(0, 1)


def _out(x: Tensor) -> Tensor:
    out = torch.empty_like(x.detach() * 1)
    return torch.mul(x.detach(), 2, out=out) + x


def _data(x: Tensor) -> Tensor:
    y = x.clone()
    y.data.mul_(2)
    with torch.no_grad():
        y.copy_(y.data * 2)
    return y * x


def _loop(x: Tensor) -> Tensor:
    total = x.new_zeros(x.shape[-1])
    for row in x[0]:
        total = total + row
    return total * x.shape[1] / len(x)


def _branch(x: Tensor) -> Tensor:
    return x * 2 if bool((x.sum() > 0).item()) else x * 3


def _attention(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


def _hooked(x: Tensor) -> Tensor:
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 3)
    return y


def _detached(x: Tensor) -> Tensor:
    y = x.clone()
    z = y.detach()
    z.mul_(3)
    return y * x.detach()


def _mixed(x: Tensor) -> Tensor:
    other = torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]
    return x * other + other.expand_as(x) - x.mean(dim=1, keepdim=True)


#: What models do between their blocks: ``x`` is ``[2, n, 8]``, its tokens along dimension 1.
PROGRAMS: dict[str, Callable[[Tensor], Any]] = {
    "residual": lambda x: x + 0.5 * x.relu(),
    "norm and projection": lambda x: F.linear(F.layer_norm(x, (8,)) * (1 + W[0]) + W[1], W),
    "rms norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "slice": lambda x: (x[:, 1:], x[:, :-1] * 2),
    "chunk": lambda x: [c * 2 for c in x.chunk(2, dim=-1)],
    "cat": lambda x: torch.cat([x, x * 2], dim=1),
    "unpatchify": lambda x: x.reshape(2, -1, 2, 4).permute(0, 2, 1, 3).flatten(2),
    "cumsum": lambda x: x.cumsum(1),
    "softmax": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "attention": _attention,
    "mixed": _mixed,
    "loss": lambda x: F.mse_loss(x, torch.zeros(x.shape)),
    "mean": lambda x: x.mean(),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "loop": _loop,
    "branch": _branch,
    "write to a view": _inplace_on_view,
    "write after a view": _inplace_after_view,
    "out": _out,
    "data": _data,
    "detached": _detached,
    "hook on a gradient": _hooked,
    "cast": lambda x: x.double().to(torch.float32) * 2,
    "compare": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "index": lambda x: x[:, torch.tensor([1, 0, 1])],
    "stack": lambda x: torch.stack([x, x], dim=0).sum(0),
    "einsum": lambda x: torch.einsum("bnc,cd->bnd", x, W),
    "conv": lambda x: F.conv1d(x.transpose(1, 2), torch.ones(4, 8, 3), padding=1),
    "repeat": lambda x: x.repeat(1, 2, 1).unsqueeze(0).expand(2, -1, -1, -1),
    "functions": lambda x: operator.neg(abs(x)) ** 2 / 3 - 1 + (1 - x),
    "deepcopy": lambda x: copy.deepcopy(x.detach()) + x,
    "vmap": lambda x: torch.func.vmap(lambda row: row * 2)(fxsp.whole(x)),
}


def run_programs(rank: int, size: int, tokens: int, lengths: tuple[int, ...], layout: str) -> list[str]:
    """What differs between a program on a split value and on a plain one: values, gradients, what an input is after."""
    problems = []
    generator = torch.Generator().manual_seed(3)
    for name, program in PROGRAMS.items():
        for training in (False, True):
            data = torch.randn(2, tokens, 8, generator=generator)
            found, wanted = (_run(program, data, training, of) for of in ((rank, size, 1, lengths, layout), None))
            for what, a, b in zip(("value", "gradient", "input"), found, wanted, strict=True):
                problems += [f"{name} {what}: {p}" for p in _differences(a, b)]
    return problems


def _run(program: Callable[[Tensor], Any], data: Tensor, training: bool, how: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    leaf = data.clone().requires_grad_(training)
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = leaf * 1 if how is None else split(leaf, *how)
        result = tree_map_only(Tensor, fxsp.whole, program(x))
        if training:
            sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in tree_leaves(result)).backward()
    return result, leaf.grad, fxsp.whole(x.detach())


def _differences(found: Any, wanted: Any) -> Iterator[str]:
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        if not isinstance(b, Tensor):
            continue
        if type(a) is not Tensor or a.dtype != b.dtype:
            yield f"is a {type(a).__name__} of {a.dtype}, not of {b.dtype}"
        elif not error_of(a, b) <= 1e-5:
            yield f"differs by {error_of(a, b):.1e}"


def run_samples(rank: int, size: int, part: int, parts: int) -> tuple[list[str], int]:
    """Every sample of the rule table with operands split along each dimension in turn; problems, and how many of the
    calls ran as a program of their own.
    """
    problems, ran = [], 0
    samples = [s for of in (*SAMPLES.values(), *elementwise_samples().values()) for s in of]
    for number, sample in enumerate(samples[part::parts]):
        generator = torch.Generator().manual_seed(number)
        args, kwargs = tree_map_only(T, lambda t: t.draw(generator), (sample.args, sample.kwargs))  # noqa: B023
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wanted = sample.op(*args, **kwargs)
        if any(x.is_complex() or (x.dtype.itemsize == 1 and x.is_floating_point()) for x in tensors):
            continue  # gloo does not send them
        for chosen in tensors:
            for dim in range(chosen.ndim):
                one = lambda x: split(x, rank, size, dim) if x is chosen else x  # noqa: B023, E731
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    before = len(_programs)
                    given = tree_map_only(Tensor, one, (args, kwargs))
                    found = tree_map_only(Tensor, fxsp.whole, sample.op(*given[0], **given[1]))
                    ran += len(_programs) > before and next(reversed(_programs.values())) is not None
                if sample.value:
                    problems += [f"{sample} split along {dim}: {p}" for p in _differences(found, wanted)]
    return problems, ran


def run_gathers(rank: int, size: int) -> tuple[list[str], list[tuple[str, str, int]]]:
    """What is said of operators that gather, and what the report of a forward pass records."""
    forward = Forward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record_to(forward)
        for _ in range(2):
            x = split(torch.arange(24.0).view(1, 6, 4), rank, size, 1)
            x[0, 1] = 7  # written to: line 1
            y = split(torch.arange(24.0).view(1, 6, 4), rank, size, 1)
            assert y.tolist()[0][5][3] == 23
            assert y.tolist()[0][5][2] == 22  # is known by now
            fxsp.whole(split(torch.ones(1, 6, 4), rank, size, 1))
        record_to(None)
    rows = [(record.op, record.kind, record.bytes) for record in forward.gathers]
    return [f"{type(w.message).__name__} {w.filename}:{w.lineno} {w.message}" for w in said], rows


def run_strangers(rank: int, size: int) -> dict[str, Any]:
    """What is no operator: copies in bytes, other libraries, printing."""
    x = split(torch.arange(24.0).view(1, 6, 4), rank, size, 1)
    found: dict[str, Any] = {"repr": repr(x), "shape": tuple(x.shape), "strides": x.stride(), "len": len(x)}
    found["list"] = x.tolist()
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    found["saved"] = torch.load(file)["x"]
    found["pickled"] = pickle.loads(pickle.dumps(x))
    for name, ask in {
        "numpy": lambda: x.numpy().tolist(),
        "dlpack": lambda: torch.from_dlpack(x).tolist(),
        "data_ptr": x.data_ptr,
        "compiled": lambda: torch.compile(lambda y: y * 2 + y.cumsum(1), backend="aot_eager")(x).tolist(),
        "vmap": lambda: fxsp.whole(torch.func.vmap(lambda y: y * 2)(x)).tolist(),
    }.items():
        try:
            found[name] = ask()
        except Exception as error:  # the test says which may be raised  # noqa: BLE001
            found[name] = f"{type(error).__name__}: {error}"
    return found
