"""Models of which a part runs whole, and one step of each under ``grad_reduce``, beside the same step on one process.

:func:`run_kind` is called on every rank and returns plain numbers; an outer reducer is played by an all-reduce.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fxsp
from fxsp.hooks.sequence_parallel import apply_sequence_parallel
from running import error_of, gradient_error
from small import Attention

__all__ = ["KINDS", "compiled", "outer_reducers", "run_changes", "run_kind", "run_outer"]

X = {"": {"x": fxsp.SequenceParallelInput(1)}}
FIRST = {"first": {"hidden": fxsp.SequenceParallelInput(1)}}


class Product(torch.autograd.Function):
    """``x * w``: an island, with gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum((0, 1))


class Net(nn.Module):
    """An attention over tokens, and then what a subclass does, in :meth:`rest`, with another layer."""

    plan: Any = X

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = Attention(), nn.Linear(8, 8), nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.rest(self.first(x))

    def rest(self, x: Tensor) -> Any:
        return self.last(x) * self.scale


class NoTokens(Net):
    def rest(self, x: Tensor) -> Any:
        torch._dynamo.graph_break()
        return self.last(x[:, 0]) * self.scale


class NoEntry(Net):
    """The plan speaks of one block only; the graph around it, of another one, is whole."""

    plan = FIRST

    def forward(self, x: Tensor) -> Any:
        x = self.last(x).sin()
        torch._dynamo.graph_break()
        return self.first(x) * self.scale


class Function(Net):
    def rest(self, x: Tensor) -> Any:
        return self.last(Product.apply(x, self.scale))


class Transform(Net):
    def rest(self, x: Tensor) -> Any:
        return torch.func.vmap(lambda row: self.last(row).softmax(0) * row * self.scale)(x)


class Branch(Net):
    def rest(self, x: Tensor) -> Any:
        positive = x.sum() > 0
        return torch.cond(positive, lambda y, s: y * s, lambda y, s: y - s, (self.last(x), self.scale))


class Eager(Net):
    """A layer that is not compiled, between two graphs and at the end."""

    def rest(self, x: Tensor) -> Any:
        x = self._alone(x)
        return self._alone(self.last(x).relu())

    @torch.compiler.disable
    def _alone(self, x: Tensor) -> Tensor:
        return self.last(x) * self.scale


class EagerWeight(Net):
    """A weight that code between graphs has changed is an input like any other."""

    def rest(self, x: Tensor) -> Any:
        return F.linear(x, self._weight()) * self.scale

    @torch.compiler.disable
    def _weight(self) -> Tensor:
        return self.last.weight.t().sin()


class EagerBlock(Net):
    """A block that is never compiled, and that FSDP has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.Linear(8, 8)

    def rest(self, x: Tensor) -> Any:
        return self.last(self._eager(x)) * self.scale

    @torch.compiler.disable
    def _eager(self, x: Tensor) -> Tensor:
        return self.alone(x)


class Unsupported(Net):
    """Running statistics of a batch norm over tokens: the whole graph is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def rest(self, x: Tensor) -> Any:
        return self.last(self.norm(x.reshape(-1, 8)).view_as(x)) * self.scale


class Tied(Net):
    """Weights that are used whole, used with shards, and returned."""

    def rest(self, x: Tensor) -> Any:
        y = self.last(x) + self.last.weight.sum() * self.scale.cumsum(0)
        return y, self.scale, self.last(x[:, -1])


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Any:
        x = checkpoint(self.first, x, use_reentrant=False)
        torch._dynamo.graph_break()
        return checkpoint(self.last, x[:, 0], use_reentrant=False) * self.scale


class Draining(Net):
    """Blocks alike are one graph, compiled with the parameters of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention() for _ in range(3)])

    def rest(self, x: Tensor) -> Any:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return self.last(x) * self.scale


class Limited(Net):
    """Dynamo gives up at the second length."""


class Hooked(Eager):
    """The same with hooks of :mod:`fxsp.hooks` on, which run what cannot be compiled as one graph."""


def _mean(outputs: Any) -> Tensor:
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((y.square() * torch.linspace(0.5, 2, y.numel()).view(y.shape)).mean() for y in values)  # type: ignore[return-value]


def _with_decay(model: nn.Module, outputs: Any) -> Tensor:
    """A term that no graph sees."""
    return _mean(outputs) + 0.1 * sum(p.square().sum() for p in model.parameters())


KINDS: dict[str, type[Net]] = {
    kind.__name__: kind
    for kind in (
        Net, NoTokens, NoEntry, Function, Transform, Branch, Eager, EagerWeight, EagerBlock, Unsupported, Tied,
        Checkpointed, Draining, Limited, Hooked,
    )
}  # fmt: skip


def outer_reducers() -> dict[str, tuple[str, Callable[..., nn.Module]]]:
    """Name -> the convention that it asks for, and how it takes a model and the mesh ``[data, sequence]``."""
    return {
        "ddp": ("defer_mean", lambda model, mesh: DistributedDataParallel(model)),
        "fsdp": ("defer_mean", lambda model, mesh: _sharded(model)),
        "fsdp replicated": ("defer_mean", lambda model, mesh: _sharded(model, mesh=mesh)),
        "fsdp sum": ("defer", lambda model, mesh: _sharded(model, factor=mesh.shape[0])),
        "fsdp sum of everything": ("defer_mean", lambda model, mesh: _sharded(model, factor=mesh.size())),
    }


def _sharded(model: Any, mesh: Any = None, factor: float | None = None) -> nn.Module:
    """Each block by itself, and the rest: what is gathered for a block is nobody's parameter before."""
    blocks = [part for part in model.modules() if isinstance(part, Attention) or part is getattr(model, "alone", None)]
    for part in [*blocks, model]:
        fully_shard(part, mesh=mesh)
        if factor is not None:
            part.set_gradient_divide_factor(float(factor))
            part.set_force_sum_reduction_for_comms(True)  # for gloo
    return model  # type: ignore[no-any-return]


def run_outer(rank: int, size: int, outer: str, kind: str, data: int = 1) -> dict[str, float]:
    """Relative errors of the gradients that an outer reducer leaves after two steps, on ``[data, sequence]`` ranks.

    Each data rank has inputs of its own; the loss of one process is the mean of theirs.
    """
    mesh = init_device_mesh("cpu", (data, size // data), mesh_dim_names=("data", "sequence"))
    torch.manual_seed(0)
    model = KINDS[kind]()
    whole = copy.deepcopy(model)
    batches = [torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(i)) for i in range(data)]
    for x in batches:
        (_mean(whole(x)) / data).backward()
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    how, wrap = outer_reducers()[outer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrap(model, mesh)  # type: ignore[assignment]
        run = compiled(model, KINDS[kind].plan, how, mesh=mesh["sequence"])
        for _ in range(2):
            model.zero_grad()
            _mean(run(batches[mesh.get_local_rank("data")])).backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    usual = max(g.norm().item() for g in wanted.values())
    errors = {}
    for name, g in wanted.items():
        own: Any = found[name]
        own = own.full_tensor() if isinstance(own, DTensor) else own
        errors[name] = gradient_error(own, g, usual)
    return errors


def compiled(model: nn.Module, plan: Any, how: str, **options: Any) -> Callable[..., Any]:
    given = {"plan": plan, "inner": "aot_eager", "grad_reduce": how, **options}
    return torch.compile(model, backend="sp", options=given, dynamic=False)


@contextmanager
def _limit(kind: str) -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=1) if kind == "Limited" else torch._dynamo.config.patch():
        yield


def _step(
    model: nn.Module, run: Callable[..., Any], decay: bool, lengths: tuple[int, ...], again: bool = True
) -> dict[str, Tensor]:
    """Gradients of parameters and inputs after forward and backward passes that overlap, one graph kept."""
    inputs = [torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in lengths]
    loss = functools.partial(_with_decay, model) if decay else _mean
    losses = [loss(run(x)) for x in inputs]
    for value in reversed(losses):
        value.backward(retain_graph=again)
    if again:
        losses[0].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return {name: g.clone() for name, g in found.items() if g is not None}


def run_kind(rank: int, size: int, kind: str, how: str, decay: bool = False, **options: Any) -> dict[str, float]:
    """Relative errors of gradients by name, after the reduction that ``how`` asks for."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    whole = copy.deepcopy(model)
    if kind == "Hooked":
        apply_sequence_parallel(model, fxsp.SequenceParallelConfig(ulysses_degree=size), model.plan)
    lengths = (7, 5) if kind == "Limited" else (7, 7)
    # A compiler that donates buffers forbids to keep a graph.
    wanted = _step(whole, whole, decay, lengths, not options)
    with warnings.catch_warnings(), _limit(kind):
        warnings.simplefilter("ignore")
        found = _step(model, compiled(model, model.plan, how, **options), decay, lengths, not options)
    for name, gradient in found.items():
        if not name.startswith("input") and how != "all_reduce":
            dist.all_reduce(gradient)
            if how == "defer_mean":
                gradient /= size
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    usual = max(g.norm().item() for g in wanted.values())
    return {name: gradient_error(found[name], g, usual) for name, g in wanted.items()}


def run_changes(rank: int, size: int) -> list[float]:
    """Worst errors of steps of one model under one convention after the other, graphs compiled once for each."""
    torch.manual_seed(0)
    model = Eager()
    runs = {how: compiled(model, model.plan, how) for how in ("all_reduce", "defer", "defer_mean")}
    whole = copy.deepcopy(model)
    wanted = _step(whole, whole, False, (7,))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for how in ("all_reduce", "defer", "defer_mean", "defer", "all_reduce"):
            model.zero_grad()
            own = _step(model, runs[how], False, (7,))
            for name in own:
                if how != "all_reduce" and not name.startswith("input"):
                    dist.all_reduce(own[name])
                    own[name] /= size if how == "defer_mean" else 1
            found.append(max(error_of(own[name], wanted[name]) for name in own if name != "first.qkv.bias"))
    return found
