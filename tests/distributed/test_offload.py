"""Hooks that give parameters other memory, as offloading does: every call is right, and so is what they leave."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsp
from running import error_of

PLAN = {"": {"x": fxsp.SequenceParallelInput(1)}}
Store = dict[Any, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, 32]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _data(module: nn.Module, store: Store) -> None:
    for p in module.parameters():
        p.data = store[p].clone()


def _data_away(module: nn.Module, store: Store) -> None:
    for p in module.parameters():
        p.data = torch.zeros_like(p.data)


def _alias(module: nn.Module, store: Store) -> None:
    for p in module.parameters():
        p.data = store[p]


def _set(module: nn.Module, store: Store) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.set_(store[p].clone())


def _set_away(module: nn.Module, store: Store) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.set_(torch.zeros_like(p))


def _resize(module: nn.Module, store: Store) -> None:
    for p in module.parameters():
        p.untyped_storage().resize_(p.numel() * p.element_size())
        p.data.copy_(store[p])


def _free(module: nn.Module, store: Store) -> None:
    for p in module.parameters():
        p.untyped_storage().resize_(0)


def _resize_tensor(module: nn.Module, store: Store) -> None:
    for p in module.parameters():
        p.data.resize_(p.shape).copy_(store[p])


def _zero(module: nn.Module, store: Store) -> None:
    for p in module.parameters():
        p.data.zero_()


def _replace(module: nn.Module, store: Store) -> None:
    for child in module.modules():
        for name in list(child._parameters):
            child._parameters[name] = nn.Parameter(store[child, name].clone())


def _replace_away(module: nn.Module, store: Store) -> None:
    for child in module.modules():
        for name in list(child._parameters):
            child._parameters[name] = nn.Parameter(torch.zeros_like(store[child, name]))


#: name -> what is done before, and after, the forward of a module.
HOOKS: dict[str, tuple[Callable[..., None], Callable[..., None] | None]] = {
    "data": (_data, _data_away),
    "alias": (_alias, _data_away),
    "set": (_set, _set_away),
    "resize_storage": (_resize, _free),
    "resize": (_resize_tensor, _zero),
    "replace": (_replace, _replace_away),
}


def hooked(name: str, *, leaves: bool, training: bool) -> tuple[Block, Store]:
    """A model with hooks on its root, or on its leaves, and its weights."""
    torch.manual_seed(0)
    model = Block()
    store: Store = {p: p.detach().clone() for p in model.parameters()}
    for child in model.modules():
        store |= {(child, n): p.detach().clone() for n, p in child._parameters.items()}
    before, after = HOOKS[name]
    for module in (model.norm, model.qkv, model.out) if leaves else (model,):
        module.register_forward_pre_hook(lambda m, _: before(m, store))
        if after is not None and not training:
            module.register_forward_hook(lambda m, *_: after(m, store))
    return model, store


def _held(model: nn.Module) -> list[float]:
    return [p.detach().abs().sum().item() if p.untyped_storage().size() else -1.0 for p in model.parameters()]


def _run(rank: int, size: int, name: str, leaves: bool, training: bool) -> tuple[float, list[str]]:
    """The largest error of three calls: results, gradients, parameters and store afterwards; why graphs are whole."""
    torch.compiler.reset()
    torch.manual_seed(1)
    x = torch.randn(1, 13, 32)
    plain, _ = hooked(name, leaves=leaves, training=training)
    model, store = hooked(name, leaves=leaves, training=training)
    kept = [t.clone() for t in store.values()]
    fast = torch.compile(model, backend="sp", options={"plan": PLAN, "inner": "aot_eager"})
    errors, had = [], len(fxsp.reports())
    for _ in range(3):
        gradients, left = [], []
        for call, owner in ((plain, plain), (fast, model)):
            y = x.clone().requires_grad_(training)
            with torch.set_grad_enabled(training), warnings.catch_warnings():
                warnings.simplefilter("ignore", fxsp.FxspWarning)
                out = call(y)
                if training:
                    out.square().sum().backward()
            gradients.append([out, *([y.grad, *(p.grad for p in owner.parameters())] if training else [])])
            left.append(torch.tensor(_held(owner)))
            owner.zero_grad()
        errors += [error_of(a, b) for a, b in zip(*reversed(gradients), strict=True)]
        errors.append(error_of(left[1], left[0]))
    errors += [error_of(a, b) for a, b in zip(store.values(), kept, strict=True)]
    return max(errors), [r.unsharded for r in fxsp.reports()[had:]]


def _whole(name: str, leaves: bool, training: bool) -> bool:
    """Memory that changes hands under gradients, beside the operators that use it: all runs whole."""
    return leaves and training and name in ("data", "alias")


# Plain torch.compile crashes where the storage of a leaf's weight is freed in the graph that uses it; so do we.
CASES = [(name, leaves) for name in HOOKS for leaves in (False, True) if (name, leaves) != ("resize_storage", True)]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "leaves"), CASES, ids=[f"{n}-{'leaves' if x else 'root'}" for n, x in CASES])
def test_on_real_ranks(ranks: Any, name: str, leaves: bool, training: bool) -> None:
    for error, unsharded in ranks(2).run(_run, name, leaves, training):
        assert error < 1e-5
        assert ("" in unsharded) == (not _whole(name, leaves, training)), unsharded
        assert "" in unsharded or any("memory" in u for u in unsharded)


def _swap(module: nn.Module, store: Store) -> None:
    for child in module.modules():
        for name, p in list(child._parameters.items()):
            torch.utils.swap_tensors(p, nn.Parameter(store[child, name].clone()))


def _run_swapped(rank: int, size: int, leaves: bool, training: bool) -> float:
    """The largest error of results and gradients in three calls."""
    torch.compiler.reset()
    errors = []
    calls = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Block()
        store: Store = {(m, n): p.detach().clone() for m in model.modules() for n, p in m._parameters.items()}
        for module in (model.norm, model.qkv, model.out) if leaves else (model,):
            module.register_forward_pre_hook(lambda m, _, store=store: _swap(m, store))
        options = {"plan": PLAN, "inner": "aot_eager"}
        calls.append((torch.compile(model, backend="sp", options=options) if compiled else model, model))
    x = torch.randn(1, 13, 32)
    for _ in range(3):
        results = []
        for call, model in calls:
            with torch.set_grad_enabled(training), warnings.catch_warnings():
                warnings.simplefilter("ignore", fxsp.FxspWarning)
                out = call(x)
                if training:
                    out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in model.parameters() if training)])
        errors += [error_of(a, b) for a, b in zip(*reversed(results), strict=True)]
    return max(errors)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("leaves", [False, True], ids=["root", "leaves"])
def test_swapped_parameters_on_real_ranks(ranks: Any, leaves: bool, training: bool) -> None:
    assert max(ranks(2).run(_run_swapped, leaves, training)) < 1e-5


def test_hooks_on_leaves_are_in_the_graph() -> None:
    """``p.data = x``: ``x`` is what is multiplied with, and nothing is copied; the memory is set once, at the end."""
    model, _ = hooked("alias", leaves=True, training=False)
    with torch.no_grad():
        report = fxsp.explain(model, torch.randn(1, 13, 32), world_size=4, plan=PLAN)
        evidence = fxsp.verify(model, torch.randn(1, 13, 32), world_size=(2, 3, 8), plan=PLAN)
    lines = report.graph("partitioned").splitlines()
    assert sum("set_(" in line for line in lines) == 6
    assert not any("copy_(" in line for line in lines)
    assert not report.implicit_gathers or all(g.kind == "output" for g in report.implicit_gathers)
    for graph in evidence.graphs:
        assert not graph.unsharded
        assert len(graph.written) == 6
        assert max((*graph.outputs, *graph.written)) < 1e-5


class Twice(nn.Module):
    """Memory that is given more than once, and written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        y = self.inner(x)
        before = weight.view(-1)
        weight.data = self.other.data * 2
        y = self.inner(y)
        weight.data = weight.data + 1
        weight.data.mul_(2)
        return self.inner(y) + before.sum() + weight.data.mean()


def test_memory_is_given_twice() -> None:
    with torch.no_grad():
        evidence = fxsp.verify(Twice(), torch.randn(1, 13, 8), world_size=(2, 3), plan=PLAN)
    for graph in evidence.graphs:
        assert not graph.unsharded
        assert max((*graph.outputs, *graph.written)) < 1e-5, str(graph)


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.mul_(2)
        y = self.inner(x)
        self.inner.weight.data = torch.ones(8, 8)
        return self.inner(y)


def test_memory_that_is_written_and_given_stays_whole() -> None:
    with torch.no_grad():
        evidence = fxsp.verify(Written(), torch.randn(1, 13, 8), world_size=2, plan=PLAN)
    assert "gives an input other memory; it is written to in place, too" in evidence.graphs[0].unsharded
