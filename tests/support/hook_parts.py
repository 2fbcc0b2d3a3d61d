"""Small models for the tests of hooks: one construct each, with the calls to try and what hooks should do.

Every case is a function that returns a :class:`Part`; :func:`run_part` runs it on every rank beside one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fxsp import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
)
from fxsp.hooks.sequence_parallel import apply_sequence_parallel, remove_sequence_parallel, report_of
from fxsp.torch_internals import plain_functions
from running import error_of, recorded

__all__ = ["PARTS", "Part", "Seen", "run_part"]

In, Out, Partial = SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput
D = 8


@dataclass
class Part:
    """A model, its plan, and calls ``(args, kwargs)``; every call is compared, values and gradients."""

    model: nn.Module
    plan: Any
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    #: Modules -> the segments of their first argument in the first call: ``n`` tokens that are whole, ``-n`` split.
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Seen:
    """What one rank saw: the worst errors, and what the hooks report."""

    error: float = 0.0
    gradient_error: float = 0.0
    attentions: list[str] = field(default_factory=list)
    implicit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Modules -> rows of their first argument on this rank, in the first call.
    tokens: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


PARTS: dict[str, Callable[[], Part]] = {}


def part(build: Callable[[], Part]) -> Callable[[], Part]:
    PARTS[build.__name__] = build
    return build


def x(tokens: int, batch: int = 2, width: int = D, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed + tokens))


def calls(*values: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [value if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict) else ((value,), {})
            for value in values]  # fmt: skip


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, shared: int | None = None, **options: Any) -> Tensor:
    """``[B, S, heads * d]`` each -> the same."""
    shared = shared or heads
    q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t, h in ((q, heads), (k, shared), (v, shared)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared != heads, **options).transpose(1, 2).flatten(2)


class Attend(nn.Module):
    """Self- or cross-attention; ``shared`` heads of keys and values."""

    def __init__(self, heads: int = 4, shared: int | None = None, width: int = D) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared or heads
        kv = width // heads * self.shared
        self.q, self.k, self.v, self.o = (nn.Linear(width, n) for n in (width, kv, kv, width))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False):
        y = x if context is None else context
        out = sdpa(self.q(x), self.k(y), self.v(y), self.heads, self.shared, attn_mask=mask, is_causal=causal)
        return x + self.o(out)


# --- how arguments are passed -----------------------------------------------------------------------------------------


class Optional(nn.Module):
    """Arguments of every kind; ``extra`` is often left out."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.lin = Attend(), nn.Linear(D, D)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, scale: float = 1.0, late: Tensor | None = None):
        if extra is not None:
            x = x + self.lin(extra)
        if late is not None:
            x = x * late
        return self.attend(x) * scale


@part
def arguments() -> Part:
    plan = {"": {"x": In(1, 3), "extra": In(1, 3), "late": In(1)}}
    return Part(
        Optional(),
        plan,
        [
            ((x(7),), {}),
            ((), {"x": x(7)}),
            ((x(7), x(7, seed=1)), {}),
            ((x(5),), {"extra": x(5, seed=1), "scale": 2.0}),
            ((), {"late": x(4, seed=2), "x": x(4)}),
            ((x(3), None), {"late": None}),
            ((x(1),), {}),
        ],
        tokens={"attend": (-7,)},
    )


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.attend(x + kwargs["more"]) if "more" in kwargs else self.attend(x)


@part
def keywords_without_a_name() -> Part:
    return Part(Anything(), {"": {"x": In(1), "more": In(1)}}, [((x(5),), {}), ((x(5),), {"more": x(5, seed=3)})])


class Pair(NamedTuple):
    cos: Tensor
    sin: Tensor


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()

    def forward(self, x: Tensor, rotary: Any, skip: Any = None) -> Tensor:
        x = x * rotary[0] + x.roll(1, -1) * rotary[1]
        return self.attend(x if skip is None else x + skip[1])


class Rotating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Rotated(), Rotated()])

    def forward(self, x: Tensor, kind: Any = tuple, skip: Any = None) -> Tensor:
        angles = torch.linspace(0, 1, x.shape[1] * D).view(1, x.shape[1], D)
        for block in self.blocks:
            values = [angles.cos(), angles.sin()]
            x = block(x, Pair(*values) if kind is Pair else kind(values), skip=skip)
        return x


@part
def tuples_as_arguments() -> Part:
    plan = {"blocks.*": {"x": In(1), "rotary": [In(1), In(1)], "skip": [None, In(1)]}}
    inputs = [((x(n), kind), {}) for n, kind in ((7, tuple), (4, list), (5, Pair))]
    return Part(Rotating(), plan, [*inputs, ((x(6), tuple, [x(2), x(6, seed=4)]), {})], {"blocks.0.attend": (-7,)})


# --- outputs ----------------------------------------------------------------------------------------------------------


class Prepare(nn.Module):
    """Returns its arguments and tables, in a container of some kind."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.lin = kind, nn.Linear(D, D)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Any:
        table = torch.linspace(0, 1, x.shape[1] * D).view(x.shape[1], D)
        values = [self.lin(x), table.cos(), x.mean(1, keepdim=True)]
        if self.kind is dict:
            return dict(zip("abc", values, strict=True))
        return self.kind(values)


class Prepared(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.prepare, self.attend, self.kind = Prepare(kind), Attend(), kind

    def forward(self, x: Tensor) -> Tensor:
        values = self.prepare(x)
        y, table, mean = values.values() if self.kind is dict else values
        assert type(values) is self.kind
        return self.attend(y * table + mean)


def _outputs(kind: Any) -> Part:
    plan = {"prepare": {0: In(1, 3, split_output=True), 1: In(0, split_output=True)}, "attend": Out(1)}
    return Part(Prepared(kind), plan, calls(x(7), x(2), x(9)), {"prepare": (7,), "attend": (-7,)})


@part
def outputs_of_a_tuple() -> Part:
    return _outputs(tuple)


@part
def outputs_of_a_list() -> Part:
    return _outputs(list)


@part
def outputs_of_a_dictionary() -> Part:
    return _outputs(dict)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x), self.b(x), x


class Gathered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = Two()

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.two(x)
        return a.cumsum(1) + (b + c).cumsum(1)


@part
def gather_of_a_list() -> Part:
    plan = {"": {"x": In(1)}, "two": [Out(1), Out(1), Out(1)]}
    return Part(Gathered(), plan, calls(x(7), x(3)), {"two": (-7,)})


class Some(nn.Module):
    """Of three outputs the second stays split, and the model's own output becomes whole by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.attend = Two(), Attend()

    def forward(self, x: Tensor) -> dict[str, Any]:
        a, b, c = self.two(x)
        return {"out": self.attend(b), "whole": [a.cumsum(1), c]}


@part
def gather_of_some_outputs() -> Part:
    return Part(Some(), {"": {"x": In(1)}, "two": [Out(1), None, Out(1)]}, calls(x(7), x(2)), {"attend": (-7,)})


# --- where modules are ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Attend(), nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.attn(x))


class Body(nn.Module):
    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(n)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = Body(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


@part
def nested_modules() -> Part:
    plan = {"body": {"x": In(1)}, "body.blocks.1": Out(1), "body.blocks.2": {"x": In(1)}, "out": Out(1)}
    return Part(Deep(), plan, calls(x(7), x(4)), {"body.blocks.1": (-7,), "body.blocks.2.attn": (-7,), "out": (-7,)})


@part
def wildcards() -> Part:
    """Every attention splits and gathers by itself; between them everything is whole."""
    plan = {"body.blocks.*.attn": {"x": In(1)}, "body.blocks.*.attn.o": Out(1)}

    class Own(Attend):
        def forward(self, x: Tensor) -> Tensor:
            return self.o(sdpa(self.q(x), self.k(x), self.v(x), self.heads))

    model = Deep()
    for block in model.body.blocks:
        block.attn = Own()
    tokens = {"body.blocks.0.attn": (7,), "body.blocks.0.ff.0": (7,), "body.blocks.2.attn.o": (-7,)}
    return Part(model, plan, calls(x(7), x(5)), tokens)


@part
def one_module_called_twice() -> Part:
    model = Body(1)
    model.blocks.append(model.blocks[0])
    return Part(model, {"blocks.*": {"x": In(1)}}, calls(x(7), x(1)), {"blocks.0.attn": (-7,)})


# --- partial inputs ---------------------------------------------------------------------------------------------------


class Joint(nn.Module):
    """``[text, image]`` in one sequence; ``ids`` and ``count`` tell how long the text is."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.text, self.image = Attend(), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, ids: Tensor | None = None, count: int = 0) -> Tensor:
        n = count if ids is None else ids.shape[0 if ids.dim() <= 2 else 1]
        x = self.attend(x)
        return torch.cat([self.text(x[:, :n]), self.image(x[:, n:])], 1)


@part
def partial_by_number() -> Part:
    inputs = [((x(n),), {"count": 3}) for n in (10, 4, 3, 7)]
    return Part(Joint(), {"": {"x": Partial(1, 3)}}, inputs, {"attend": (3, -7)})


@part
def partial_by_a_tensor() -> Part:
    ids = [torch.zeros(3), torch.zeros(4, 3), torch.zeros(2, 5, 3)]
    inputs = [((x(12),), {"ids": value}) for value in ids]
    return Part(Joint(), {"": {"x": Partial(1, "ids")}}, inputs, {"attend": (3, -9)})


@part
def partial_by_an_integer() -> Part:
    inputs = [((x(12), None, n), {}) for n in (5, 0, 12)]
    return Part(Joint(), {"": {"x": Partial(1, "count", 3)}}, inputs, {"attend": (5, -7)})


class JointInside(nn.Module):
    """The length of the text is an argument of the model, not of the block."""

    def __init__(self, outputs: bool) -> None:
        super().__init__()
        self.prepare, self.block = nn.Identity() if outputs else None, Attend()

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        both = torch.cat([encoder_hidden_states, x], 1)
        if self.prepare is not None:
            both = self.prepare(both)
        return self.block(both)[:, encoder_hidden_states.shape[1] :]


@part
def partial_by_an_argument_of_the_model() -> Part:
    inputs = [((x(9), x(4, seed=5)), {}), ((x(3),), {"encoder_hidden_states": x(2, seed=5)})]
    return Part(JointInside(False), {"block": {"x": Partial(1, "encoder_hidden_states")}}, inputs, {"block.q": (4, -9)})


@part
def partial_outputs() -> Part:
    plan = {"prepare": {0: Partial(1, "encoder_hidden_states", split_output=True)}}
    return Part(JointInside(True), plan, [((x(8), x(3, seed=5)), {})], {"block": (3, -8)})


# --- several sequences ------------------------------------------------------------------------------------------------


class Streams(nn.Module):
    """Joint attention of two split sequences of different length, as in Flux; and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.cross, self.out = Attend(), Attend(), nn.Linear(D, D)

    def forward(self, image: Tensor, text: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        both = self.attend(torch.cat([text, image], 1))
        text, image = both.split([text.shape[1], image.shape[1]], 1)
        return self.out(self.cross(image, context)), text * 2


STREAMS = [((x(10), x(3, seed=6), x(5, seed=7)), {}), ((x(4), x(7, seed=6), x(1, seed=7)), {})]
STREAMS += [((x(1), x(2, seed=6), x(2, seed=7)), {})]


@part
def two_sequences() -> Part:
    return Part(Streams(), {"": {"image": In(1), "text": In(1)}}, STREAMS, {"cross": (-10,)})


@part
def three_sequences() -> Part:
    return Part(Streams(), {"": {"image": In(1), "text": In(1), "context": In(1)}}, STREAMS)


@part
def cross_attention_to_split_keys() -> Part:
    inputs = [((x(n),), {"context": x(m, seed=8)}) for n, m in ((7, 5), (2, 9), (4, 1))]
    return Part(Attend(), {"": {"x": In(1), "context": In(1)}}, inputs)


@part
def whole_queries_of_split_keys() -> Part:
    return Part(Attend(), {"": {"context": In(1)}}, [((x(7),), {"context": x(5, seed=8)})])


# --- attention --------------------------------------------------------------------------------------------------------


def _padding(n: int) -> Tensor:
    keep = torch.ones(2, 1, 1, n, dtype=torch.bool)
    keep[1, :, :, (n + 1) // 2 :] = False
    return keep


@part
def masks() -> Part:
    inputs = []
    for n in (7, 4, 1):
        bias = torch.randn(1, 4, n, n, generator=torch.Generator().manual_seed(n))
        inputs += [((x(n),), {"mask": mask}) for mask in (_padding(n), bias, bias[:, :1], bias[0, 0], bias[:, :, :1])]
    return Part(Attend(), {"": {"x": In(1)}}, inputs)


@part
def causal() -> Part:
    return Part(Attend(), {"": {"x": In(1)}}, [((x(n),), {"causal": True}) for n in (7, 4, 1, 9)])


@part
def shared_heads() -> Part:
    inputs = [
        ((x(7, width=24),), {}),
        ((x(7, width=24),), {"causal": True}),
        ((x(4, width=24),), {"mask": _padding(4)}),
    ]
    return Part(Attend(6, 3, 24), {"": {"x": In(1)}}, inputs)


@part
def one_shared_head() -> Part:
    return Part(Attend(4, 1), {"": {"x": In(1)}}, [((x(7),), {}), ((x(4),), {"causal": True})])


class Function(nn.Module):
    """Attention in a plain function, far below the root, on tensors without a dimension of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        z = F.scaled_dot_product_attention(y, y, y)
        q = y.unflatten(-1, (2, 2, -1)).permute(0, 2, 3, 1, 4)  # [B, 2, 2, S, d]
        return z + F.scaled_dot_product_attention(q, q, q, scale=0.5).permute(0, 3, 1, 2, 4).flatten(2)


@part
def attention_of_other_ranks() -> Part:
    return Part(Function(), {"": {"x": In(1)}}, calls(x(7), x(2)))


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool, functions: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reentrant, self.functions = reentrant, functions

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            run = (
                (lambda y, block=block: block.ff(block.attn(y)) + y.mean(-1, keepdim=True)) if self.functions else block
            )
            x = checkpoint(run, x, use_reentrant=self.reentrant)
        return x


def _recomputed(reentrant: bool, functions: bool, inside: bool = False) -> Part:
    plan = {"blocks.*": {"x": In(1)}, "blocks.1": Out(1)} if inside else {"": {"x": In(1)}}
    if inside:
        plan = {"blocks.*.attn": {"x": In(1)}, "blocks.*.ff": Out(1)}
    return Part(Recomputed(reentrant, functions), plan, calls(x(7), x(2)))


for _reentrant in (False, True):
    for _functions, _inside in ((False, False), (True, False), (False, True)):
        _name = f"checkpoint{'_reentrant' * _reentrant}{'_functions' * _functions}{'_hooks_inside' * _inside}"
        PARTS[_name] = lambda r=_reentrant, f=_functions, i=_inside: _recomputed(r, f, i)


# --- on the ranks -----------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _leaves(value: Any) -> Any:
    """A copy whose floating point tensors want gradients."""
    if isinstance(value, Tensor):
        copied = value.clone()
        return copied.requires_grad_() if copied.is_floating_point() else copied
    if isinstance(value, dict):
        return {key: _leaves(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_leaves(item) for item in value])
    return value


def _run(model: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    args, kwargs = _leaves(args), _leaves(kwargs)
    outputs = _tensors(model(*args, **kwargs))
    for parameter in model.parameters():
        parameter.grad = None
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs]
    torch.stack([(out * w).sum() for out, w in zip(outputs, weights, strict=True)]).sum().backward()
    gradients = [t.grad for t in [*_tensors(args), *_tensors(kwargs), *model.parameters()]]
    return [out.detach() for out in outputs], gradients


def _watch(model: nn.Module, seen: dict[str, int], names: Sequence[str]) -> list[Any]:
    def note(name: str) -> Any:
        def look(_module: nn.Module, args: Any, kwargs: Any) -> None:
            with plain_functions():
                seen.setdefault(name, _tensors([args, kwargs])[0].shape[1])

        return look

    found = [(name, module) for name, module in model.named_modules() if name in names]
    return [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in found]


def run_part(rank: int, size: int, name: str, degrees: tuple[int, int, int] | None = None) -> Seen:
    """Run a case on this rank, in float64."""
    torch.manual_seed(0)
    found = PARTS[name]()
    model = found.model.double()
    whole = copy.deepcopy(model)
    seen = Seen()
    config = None if degrees is None else SequenceParallelConfig(*degrees)
    apply_sequence_parallel(model, config, found.plan)
    watching = _watch(model, seen.tokens, list(found.tokens))
    with recorded() as seen.warnings:
        for args, kwargs in found.calls:
            args, kwargs = (_double(value) for value in (args, kwargs))
            ours, gradients = _run(model, args, kwargs)
            for handle in watching:  # of the first call
                handle.remove()
            theirs, expected = _run(whole, args, kwargs)
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape == b.shape, f"{list(a.shape)} is {list(b.shape)} on one process"
                seen.error = max(seen.error, error_of(a, b))
            for a, b in zip(gradients, expected, strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    seen.gradient_error = max(seen.gradient_error, float((a - b).norm() / (1 + b.norm())))
            report = report_of(model)
            seen.attentions += [record.method for record in report.attentions]
            seen.implicit += [str(record) for record in report.implicit_gathers]
            seen.notes += report.notes
    remove_sequence_parallel(model, found.plan)
    assert not any("_hook_registry" in vars(m) or "forward" in vars(m) for m in model.modules())
    return seen


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_double(item) for item in value])
    return value
