"""Small models, one for each construct that real code contains, and what runs them: once eagerly, once compiled.

A *construct* is a function ``build(wrap) -> (run, state)``.  ``wrap`` is the identity or ``torch.compile`` with a plan;
the construct says where it stands, so that lambdas, methods and train steps can be compiled too.  ``run(*inputs)`` is
what a user calls; ``state`` is the module whose parameters and buffers are compared.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

import fxsp
from fxsp import SequenceParallelInput, SequenceParallelOutput
from fxsp.report import Report
from simulated import Simulated, by_plan

__all__ = ["CONSTRUCTS", "DIM", "PLAN", "Construct", "Outcome", "construct", "run_constructs", "simulate_construct"]

Wrap = Callable[[Any], Any]
Build = Callable[[Wrap], tuple[Callable[..., Any], nn.Module]]

DIM = 8
#: Tokens of the inputs: no multiple of 2 or 3, so that every rank count leaves pads.
TOKENS = 11
PLAN = {"block": {"x": SequenceParallelInput(split_dim=1), 0: SequenceParallelOutput(gather_dim=1)}}
ROOT_PLAN = {"": {"x": SequenceParallelInput(split_dim=1)}}


def tokens(seed: int = 1) -> tuple[Tensor, ...]:
    """``([2, TOKENS, DIM],)`` float32 that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, TOKENS, DIM, generator=generator).requires_grad_(),)


@dataclass(frozen=True)
class Construct:
    """One construct, its inputs and its plan."""

    name: str
    build: Build
    inputs: Callable[[], tuple[Any, ...]] = tokens
    plan: Any = field(default_factory=lambda: PLAN)
    options: dict[str, Any] = field(default_factory=dict)
    backward: bool = True
    calls: int = 1


CONSTRUCTS: dict[str, Construct] = {}


def construct(**settings: Any) -> Callable[[Build], Build]:
    """Register a construct under the name of the function that builds it."""

    def register(build: Build) -> Build:
        name = build.__name__
        CONSTRUCTS[name] = Construct(name, build, **settings)
        return build

    return register


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one rank saw of a construct."""

    #: Relative error of each output, gradient, buffer and input, by name.
    errors: dict[str, float] = field(default_factory=dict)
    #: The exception of the compiled run, if it failed.
    failure: str = ""
    #: Whether the exception was raised before any graph was compiled.
    before: bool = False
    unsharded: list[str] = field(default_factory=list)
    #: Implicit gathers, as text, each with its operator, module, source line and reason.
    gathers: list[str] = field(default_factory=list)
    #: Kinds of all collectives, in order.
    collectives: list[tuple[str, Any]] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)
    plan: list[tuple[str, bool, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    graphs: int = 0
    #: Which values share memory: compiled and eager must agree.
    aliases: tuple[Any, Any] = ((), ())

    @property
    def worst(self) -> tuple[str, float]:
        """The name and error of what is furthest off."""
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))


@dataclass
class _Run:
    values: dict[str, Tensor]
    aliases: tuple[tuple[int, ...], ...]


def _error(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    a, b = found.detach().double(), expected.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities too
    difference = torch.where(same, 0.0, a - b).norm().item()
    scale = torch.where(b.isfinite(), b, 0.0).norm().item()
    return difference / scale if scale > 0 and difference == difference else (difference or 0.0)


def _once(item: Construct, wrap: Wrap) -> _Run:
    torch.manual_seed(7)
    run, state = item.build(wrap)
    inputs = item.inputs()
    torch.manual_seed(11)
    values: dict[str, Any] = {}
    aliases: tuple[tuple[int, ...], ...] = ()
    for call in range(item.calls):
        result = run(*inputs)
        named = _leaves(result)
        outputs = list(named.values())
        if item.backward:
            parts = [
                (o.float() * (2 + torch.cos(torch.arange(o.numel()).float() + i)).reshape(o.shape)).sum()
                for i, o in enumerate(outputs)
                if o.requires_grad
            ]
            torch.stack(parts).sum().backward()
        values |= {f"{call}: output{name}": o.detach().clone() for name, o in named.items()}
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        everything = [*tensors, *outputs]
        places = [t.untyped_storage().data_ptr() for t in everything]
        aliases = tuple(tuple(j for j, p in enumerate(places) if p == place) for place in places)
    values |= {f"input {i}": t.detach().clone() for i, t in enumerate(tensors)}
    values |= {f"gradient of input {i}": t.grad for i, t in enumerate(tensors) if t.is_leaf and t.requires_grad}
    values |= {f"gradient of {n.replace('_orig_mod.', '')}": p.grad for n, p in state.named_parameters()}
    values |= {f"buffer {n}": b.clone() for n, b in state.named_buffers()}
    return _Run(values, aliases)


def _leaves(result: Any) -> dict[str, Tensor]:
    """The tensors of an output, by where they are in it."""
    pairs, _ = tree_flatten_with_path(vars(result) if hasattr(result, "__dataclass_fields__") else result)
    return {keystr(path): leaf for path, leaf in pairs if isinstance(leaf, Tensor)}


def run_construct(item: Construct) -> Outcome:
    """Run a construct eagerly and compiled on this rank."""
    before = len(fxsp.reports())
    options = {"inner": "aot_eager", "plan": item.plan, **item.options}

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="sp", options=options)

    return _compare(item, compiled, lambda: fxsp.reports()[before:])


def simulate_construct(item: Construct, size: int) -> Outcome:
    """Run a construct eagerly, and compiled for ``size`` ranks in this process."""
    torch.compiler.reset()
    reports: list[Report] = []
    backend = Simulated(size, by_plan({"plan": item.plan, **item.options}, reports))
    return _compare(item, lambda function: torch.compile(function, backend=backend), lambda: reports)


def _compare(item: Construct, compiled: Wrap, reports: Callable[[], list[Report]]) -> Outcome:
    outcome = Outcome()

    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        expected = _once(item, lambda function: function)
        try:
            found = _once(item, compiled)
        except Exception as error:  # the test decides whether it was to be expected  # noqa: BLE001
            outcome.failure = f"{type(error).__name__}: {error}"
            outcome.before = not reports()
        else:
            names = expected.values | found.values
            outcome.errors = {n: _error(found.values.get(n), expected.values.get(n)) for n in names}
            outcome.aliases = (found.aliases, expected.aliases)
    ours = [w for w in caught if issubclass(w.category, fxsp.FxspWarning)]
    outcome.warnings = [f"{w.category.__name__}: {w.message}" for w in ours]
    for report in reports():
        outcome.graphs += 1
        outcome.unsharded += [report.unsharded] if report.unsharded else []
        outcome.gathers += [str(g) for g in report.implicit_gathers if g.kind == "implicit"]
        outcome.collectives += [(c.kind, c.bytes) for c in report.collectives]
        outcome.attentions += [a.method for a in report.attentions]
        outcome.plan += [(p.entry, p.applied, p.detail) for p in report.plan]
        outcome.notes += report.notes
    return outcome


def run_constructs(rank: int, size: int, names: list[str]) -> dict[str, Outcome]:
    """Several constructs, each compiled afresh."""
    outcomes = {}
    for name in names:
        torch.compiler.reset()
        outcomes[name] = run_construct(CONSTRUCTS[name])
    return outcomes


# --- parts ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with two heads over ``x [B, S, DIM]``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Norm, attention, residual; ``hook(y)`` is applied to the attention's output."""

    def __init__(self, hook: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention = Attention()
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm(x))
        return x + (self.hook(y) if self.hook is not None else y)


class Root(nn.Module):
    """A linear, the block that the plan splits, a linear."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.block = block if block is not None else Block()
        self.last = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


def hooked(hook: Callable[[Tensor], Tensor]) -> Build:
    """A root whose block applies ``hook`` to its attention's output."""

    def build(wrap: Wrap) -> tuple[Callable[..., Any], nn.Module]:
        model = Root(Block(hook))
        return wrap(model), model

    return build
