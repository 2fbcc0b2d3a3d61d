"""Constructs that few think of, for ranks in one process; each says what becomes of its tokens."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from constructs import DIM, PLAN, ROOT_PLAN, TOKENS, Block, Construct, Root, Wrap, tokens
from fxsp import SequenceParallelInput, SequenceParallelOutput

__all__ = ["GATHERED", "SPLIT", "WHOLE"]

Hook = Callable[[Tensor], Tensor]
Built = tuple[Callable[..., Any], nn.Module]
Build = Callable[[Wrap], Built]

#: Tokens stay split: no implicit gather.
SPLIT: dict[str, Construct] = {}
#: The tokens are gathered for an operator: the construct, and words of the implicit gather.
GATHERED: dict[str, tuple[Construct, str]] = {}
#: A graph runs whole: the construct, and words of the reason.
WHOLE: dict[str, tuple[Construct, str]] = {}


def _register(item: Construct, gathers: str, whole: str) -> None:
    if whole:
        WHOLE[item.name] = item, whole
    elif gathers:
        GATHERED[item.name] = item, gathers
    else:
        SPLIT[item.name] = item


def variant(*, gathers: str = "", whole: str = "", **settings: Any) -> Callable[[Build], Build]:
    """Register a construct; ``gathers`` and ``whole`` are words of what the report says, without them it is split."""

    def register(build: Build) -> Build:
        _register(Construct(build.__name__, build, **settings), gathers, whole)
        return build

    return register


def hook(*, gathers: str = "", whole: str = "", gradients: bool = True) -> Callable[[Hook], Hook]:
    """Register what a block applies to its attention's output."""

    def register(apply: Hook) -> Hook:
        def build(wrap: Wrap) -> Built:
            model = Root(Block(apply)).requires_grad_(gradients)
            return wrap(model), model

        settings: dict[str, Any] = {} if gradients else {"inputs": _no_gradients, "backward": False}
        _register(Construct(apply.__name__, build, **settings), gathers, whole)
        return apply

    return register


def model(*, gathers: str = "", whole: str = "", **settings: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a model."""

    def register(make: type[nn.Module]) -> type[nn.Module]:
        def build(wrap: Wrap) -> Built:
            made = make()
            return wrap(made), made

        _register(Construct(make.__name__, build, **settings), gathers, whole)
        return make

    return register


def _no_gradients() -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in tokens())


# --- control flow ---------------------------------------------------------------------------------------------------


@hook(gathers="higher-order operator map_impl: not opened")
def mapped(y: Tensor) -> Tensor:
    return map_rows(lambda row: row.cumsum(0), y)


@hook(gathers="functorch transform")
def pulled_back(y: Tensor) -> Tensor:
    """What ``vjp`` returns differentiates after the transform has ended."""
    value, back = torch.func.vjp(lambda z: z.cumsum(1).sin(), y)
    return back(value * y)[0] + back(y)[0]


@hook(gathers="functorch transform")
def pulled_back_once(y: Tensor) -> Tensor:
    value, back = torch.func.vjp(lambda z: z.cumsum(1).sin(), y)
    return back(value * y)[0]


@hook(gathers="functorch transform")
def noise_in_vmap(y: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row.cumsum(0) * torch.rand(DIM), randomness="same")(y)


@hook(gathers="higher-order operator scan")
def scanned(y: Tensor) -> Tensor:
    return scan(lambda state, row: (state * 0.5 + row, state + row), y[:, 0] * 0, y, dim=1)[1]


@hook(gathers="aten.slice.Tensor needs dimension")
def scanned_in_parallel(y: Tensor) -> Tensor:
    return associative_scan(lambda a, b: a + b, y, dim=1, combine_mode="generic")


@hook(gathers="higher-order operator while_loop")
def looped(y: Tensor) -> Tensor:
    def step(i: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, z * 0.5 + z.mean(1, keepdim=True)

    return while_loop(lambda i, z: i < 3, step, (torch.tensor(0), y))[1]


@hook(gathers="aten.as_strided.default has no sharding rule")
def windows_by_strides(y: Tensor) -> Tensor:
    """Overlapping windows of three tokens, as Longformer makes them, of a value that is transposed in memory."""
    z = y.transpose(0, 1)
    windows = z.as_strided((z.shape[0] - 2, 3, *z.shape[1:]), (z.stride(0), *z.stride()))
    return F.pad(windows.amax(1), (0, 0, 0, 0, 1, 1)).transpose(0, 1)


@hook(whole="reads memory around a value that is split")
def beyond_a_slice(y: Tensor) -> Tensor:
    z = y[:, 1:]
    return y * z.as_strided((z.shape[0], 1, z.shape[2]), z.stride()).cos()


@model(whole="no entry of the plan applies")
class BranchOfBlocks(Root):
    """The plan names a block that only a branch of ``cond`` calls."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.cond(h.sum() > 0, lambda z: self.block(z), lambda z: z * 2, (h,)))  # noqa: PLW0108  the call is in the traced code


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Blocks, each in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(F.relu), Block(torch.tanh)])
        self.last = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


_EVERY = {"blocks.*": {"x": SequenceParallelInput(split_dim=1)}, "last": {"input": SequenceParallelInput(split_dim=1)}}
_FIRST = {"blocks.0": {"x": SequenceParallelInput(split_dim=1)}, "blocks.1": SequenceParallelOutput(gather_dim=1)}


@variant(plan=_EVERY)
def checkpoints_in_a_loop(wrap: Wrap) -> Built:
    stack = Stack()
    return wrap(stack), stack


@variant(plan=_FIRST)
def first_and_last_checkpoint(wrap: Wrap) -> Built:
    stack = Stack()
    return wrap(stack), stack


@hook()
def checkpointed_dropout(y: Tensor) -> Tensor:
    return checkpoint(lambda z: F.dropout(z, 0.3) * z.sigmoid(), y, use_reentrant=False)


@hook()
def nested_checkpoints(y: Tensor) -> Tensor:
    def inner(z: Tensor) -> Tensor:
        return z.sin().exp()

    return checkpoint(
        lambda z: checkpoint(inner, z, use_reentrant=False).mean(1, keepdim=True) + z, y, use_reentrant=False
    )


@hook(gathers="functorch transform: not opened")
def transform_in_checkpoint(y: Tensor) -> Tensor:
    return checkpoint(lambda z: torch.func.vmap(lambda row: row.softmax(0))(z) * z, y, use_reentrant=False)


# --- modes ----------------------------------------------------------------------------------------------------------


@hook()
def nested_autocast(y: Tensor) -> Tensor:
    w = torch.ones(DIM, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        a = y.round() @ w  # small whole numbers: exact in bf16
        with torch.autocast("cpu", enabled=False):
            b = y @ w
    return a.float() + b


@hook()
def grad_in_no_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        a = y * 2
        with torch.enable_grad():
            b = y * 3
        c = b * y
    return a + b + c


@hook()
def grad_mode_by_call(y: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    z = y.mean(1, keepdim=True)
    torch.set_grad_enabled(True)
    return y * z


@hook(gradients=False)
def inference_mode_inside(y: Tensor) -> Tensor:
    with torch.inference_mode():
        return y * y.mean(1, keepdim=True)


@variant(inputs=_no_gradients, backward=False)
def inference_mode_outside(wrap: Wrap) -> Built:
    root = Root()
    fast = wrap(root)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return fast(x)

    return run, root


@model()
class BlockWithoutGrad(Root):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            t = self.block(h)
        return self.last(h * t)


# --- state ----------------------------------------------------------------------------------------------------------


class Averages(Block):
    """Buffers that are written in whole, in part, and assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(DIM))
        self.register_buffer("history", torch.zeros(TOKENS, DIM))
        self.register_buffer("previous", torch.zeros(2, TOKENS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        self.history[2:5] = x.detach()[0, 2:5]
        y = super().forward(x) + self.mean + self.history.mean(0) + self.previous
        self.previous = x.detach()
        return y


@variant(calls=2)
def averages(wrap: Wrap) -> Built:
    root = Root(Averages())
    return wrap(root), root


class Remembers(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last_output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last_output = super().forward(x)
        return self.last_output * 2


@variant()
def tensor_kept_by_a_module(wrap: Wrap) -> Built:
    root = Root(Remembers())
    fast = wrap(root)
    return lambda x: (fast(x), root.block.last_output), root


def _views_of_one() -> tuple[Tensor, ...]:
    base = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    return base, base.view(2, -1), base[:, 2:5]


@model(inputs=_views_of_one)
class AliasedInputs(Root):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.last(self.block(self.first(x))) + y.view_as(x) + z.sum()


@model(inputs=_views_of_one, calls=2, whole="shares memory that is written to in place")
class AliasedInputsWritten(Root):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        z.mul_(2)
        return self.last(self.block(self.first(x))) + y.view_as(x) + z.sum()


@hook(whole="writes through detach()")
def written_through_data(y: Tensor) -> Tensor:
    y = y * 1
    y.data.mul_(0.5)
    return y


@hook(gathers="higher-order operator register_hook")
def hook_of_a_tensor(y: Tensor) -> Tensor:
    y.register_hook(lambda grad: grad * 0.5)
    return y * 2


# --- arguments and results ------------------------------------------------------------------------------------------


class Keywords(Root):
    def forward(self, *, x: Tensor, scale: float = 1.0, steps: int = 2, flag: bool = True, extra: Any = None) -> Any:
        for _ in range(steps):
            x = self.block(self.first(x)) * scale
        return (self.last(x) if flag else x), None, extra["a"]


def _keywords(wrap: Wrap) -> Built:
    root = Keywords()
    fast = wrap(root)
    return lambda x: fast(x=x, scale=0.5, extra={"a": x * 2, "b": (1, None)}), root


_register(Construct("keywords", _keywords), "", "")
_register(Construct("keywords_split_at_the_root", _keywords, plan=ROOT_PLAN), "", "")


class Containers(Root):
    def forward(self, pair: tuple[Tensor, int], more: dict[str, Any]) -> Tensor:
        (x, n), (c, k) = pair, more["c"]
        return self.last(self.block(self.first(x))) * c + k + n


@variant(plan={"": {"pair": [SequenceParallelInput(split_dim=1), None]}})
def containers(wrap: Wrap) -> Built:
    root = Containers()
    fast = wrap(root)
    return lambda x: fast((x, 3), {"c": (x.cos(), 2)}), root


class Pair(NamedTuple):
    hidden: Tensor
    nothing: Any


class NamedBlock(Block):
    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        return Pair(super().forward(x), None)


class NamedRoot(Root):
    def __init__(self) -> None:
        super().__init__(NamedBlock())

    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        out = self.block(self.first(x))
        return Pair(self.last(out.hidden), {"n": None, "k": 3, "y": out.hidden})


model(plan=PLAN)(NamedRoot)


class Numbers(Root):
    def forward(self, x: Tensor, t: float, n: int) -> Tensor:
        return self.last(self.block(self.first(x)) * t) + n


@variant(calls=3)
def numbers_that_change(wrap: Wrap) -> Built:
    root = Numbers()
    fast = wrap(root)
    calls = iter(range(1, 100))

    def run(x: Tensor) -> Tensor:
        n = next(calls)
        return fast(x, 0.1 * n, n)

    return run, root


# --- ways to compile and to call ------------------------------------------------------------------------------------


@variant()
def functional_call(wrap: Wrap) -> Built:
    root = Root()
    fast = wrap(lambda parameters, x: torch.func.functional_call(root, parameters, (x,)))
    return lambda x: fast({name: p * 1.5 for name, p in root.named_parameters()}, x), root


@variant(backward=False, whole="no entry of the plan applies")
def gradient_of_the_model(wrap: Wrap) -> Built:
    """``torch.func.grad`` around everything: it is not opened, so nothing in it is split."""
    root = Root()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(root, parameters, (x,)).square().mean()

    return wrap(lambda x: torch.func.grad(loss)(dict(root.named_parameters()), x)), root


@variant()
def partial_function(wrap: Wrap) -> Built:
    root = Root()
    return wrap(functools.partial(lambda scale, x: root(x) * scale, 2.0)), root


@variant()
def copied_model(wrap: Wrap) -> Built:
    root = Root()
    twin = copy.deepcopy(root)
    return wrap(twin), twin


@variant(calls=2)
def train_and_eval(wrap: Wrap) -> Built:
    root = Root(Block(nn.Dropout(0.4)))
    fast = wrap(root)
    return lambda x: fast.train(not root.training)(x) if fast is not root else root.train(not root.training)(x), root


@variant(calls=2)
def one_into_another(wrap: Wrap) -> Built:
    both = nn.ModuleList([Root(), Root()])
    first, second = wrap(both[0]), wrap(both[1])
    return lambda x: second(first(x)), both


class Recurrent(Root):
    """Dynamo skips a forward that calls an RNN: the block is a frame of its own, and the plan is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(DIM, DIM, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.block(x))[0])


model()(Recurrent)


@hook(whole="no entry of the plan applies")
def linearized(y: Tensor) -> Tensor:
    """A graph break, and graphs that belong to no module of the model."""
    return torch.func.linearize(lambda z: z.sin() * z.mean(1, keepdim=True), y)[1](y)


# --- layers ---------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(F.dropout(x, 0.0, self.training))) * 0.7


@variant()
def adapters(wrap: Wrap) -> Built:
    root = Root().requires_grad_(False)
    root.block.attention.qkv = LowRank(root.block.attention.qkv)
    root.block.attention.out = LowRank(root.block.attention.out)
    return wrap(root), root


@variant()
def spectral_norm(wrap: Wrap) -> Built:
    root = Root()
    nn.utils.parametrizations.spectral_norm(root.block.attention.out)
    return wrap(root), root


@variant()
def old_weight_norm(wrap: Wrap) -> Built:
    root = Root()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(root.block.attention.out)
    return wrap(root), root


@model(plan={"block": {"src": SequenceParallelInput(split_dim=1), 0: SequenceParallelOutput(gather_dim=1)}})
class EncoderLayer(Root):
    def __init__(self) -> None:
        super().__init__(nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=True))


@model(plan=ROOT_PLAN, gathers="aten.bmm.default in attention")
class MultiheadAttention(nn.Module):
    """Once by ``scaled_dot_product_attention``, once with weights, which it spells out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0] + self.attention(x, x, x)[0]


@model(plan=ROOT_PLAN)
class ClassTokens(Root):
    """Tokens of the model's own before those of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 3, DIM))
        self.places = nn.Parameter(torch.randn(1, TOKENS + 3, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1) + self.places
        h = self.block(h)
        return self.last(h[:, 0]), h[:, 3:]


# --- tensors --------------------------------------------------------------------------------------------------------


@hook()
def complex_rotary(y: Tensor) -> Tensor:
    z = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
    angles = torch.outer(torch.arange(y.shape[1]).float(), torch.ones(DIM // 2))
    return torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)[None]).flatten(-2)


@hook()
def scalars_in_where(y: Tensor) -> Tensor:
    return torch.where(y > 0, y, -0.5) + torch.where(y > 0, 1.0, 0.0) + torch.where(y[..., :1] < 0, 2.0, y)


@hook()
def many_dtypes(y: Tensor) -> Tensor:
    return y.half().float() + y.to(torch.bfloat16).to(y) + y.double().float() + y.long().float()


@hook(gathers="aten.fft_fft2.default")
def fourier(y: Tensor) -> Tensor:
    return torch.fft.fft2(y).real


@hook(gathers="aten.index_put.default")
def written_where_a_mask_is_true(y: Tensor) -> Tensor:
    y = y * 1
    y[y > 0.5] = 0.5
    return y


class Scaled(torch.autograd.Function):
    """Forward, context and backward apart; two inputs, two outputs, and an argument that is no tensor."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return x * y * scale, x.cumsum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.scale = inputs[2]

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return a * y * ctx.scale + 2 * b, a * x, None


@hook(gathers="autograd_function_apply")
def function_of_two(y: Tensor) -> Tensor:
    return sum(Scaled.apply(y, y.tanh(), 0.5))


@torch.library.custom_op("fxsp_tests::reversed", mutates_args=())
def reversed_tokens(x: Tensor) -> Tensor:
    return x.flip(1).contiguous()


reversed_tokens.register_fake(torch.empty_like)
reversed_tokens.register_autograd(lambda ctx, grad: grad.flip(1))


@hook(gathers="fxsp_tests.reversed.default has no sharding rule")
def operator_of_the_user(y: Tensor) -> Tensor:
    return reversed_tokens(y)


@torch.library.custom_op("fxsp_tests::doubled_", mutates_args=("x",))
def doubled_(x: Tensor) -> None:
    x.mul_(2)


@hook(whole="writes to its arguments in a way that is not known", gradients=False)
def operator_that_writes(y: Tensor) -> Tensor:
    y = y * 1
    doubled_(y)
    return y
