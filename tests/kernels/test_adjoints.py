"""Every fxsp op against plain indexing, its adjoint by duality, and small programs against one process.

Duality: each type T has a gradient type T* and a pairing <g, x> that is what the program on one process would compute.
For a linear op f: A -> B, <g, f(x)> over B equals <f*(g), x> over A, for all x of A and g of B*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fxsp.kernels.ops import OPS

fx = torch.ops.fxsp

GROUP = "0"  # the name of the default group
DIM, OTHER = 1, (2, 3)  # values are [2, tokens, 3]


@dataclass(frozen=True)
class Tokens:
    """Segments of a sequence over ``size`` ranks; the indexing that the ops must reproduce."""

    lengths: tuple[int, ...]
    whole: tuple[bool, ...]
    size: int

    def rows(self, rank: int) -> list[list[tuple[int, bool]]]:
        """Per segment: (global index, is a pad) of each local row."""
        result, start = [], 0
        for n, entire in zip(self.lengths, self.whole, strict=True):
            count = n if entire else -(-n // self.size)
            first = 0 if entire else rank * count
            result.append([(start + min(i, n - 1), i >= n) for i in range(first, first + count)])
            start += n
        return result

    def local(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return x[:, [i for segment in self.rows(rank) for i, _ in segment]]

    def pads(self, rank: int) -> torch.Tensor:
        return torch.tensor([pad for segment in self.rows(rank) for _, pad in segment])

    def is_whole(self, rank: int) -> torch.Tensor:
        rows = zip(self.rows(rank), self.whole, strict=True)
        return torch.tensor([entire for segment, entire in rows for _ in segment])

    def total(self) -> int:
        return sum(self.lengths)

    def assemble(self, parts: list[torch.Tensor], *, summands: bool) -> torch.Tensor:
        """The global value of shards (whole segments: rank 0's, or the sum of all)."""
        x = torch.zeros(parts[0].shape[0], self.total(), *parts[0].shape[2:], dtype=parts[0].dtype)
        for rank, part in enumerate(parts):
            row = 0
            for segment, entire in zip(self.rows(rank), self.whole, strict=True):
                for i, pad in segment:
                    if not pad and (not entire or summands or rank == 0):
                        x[:, i] += part[:, row]
                    row += 1
        return x


def cases(size: int) -> list[Tokens]:
    plain = [(1,), (max(size - 1, 1),), (7,), (2 * size,), (5, 3), (1, 2 * size, 4)]
    mixed = [((3, 7), (True, False)), ((2 * size, 1, 5), (False, True, False)), ((2, 3), (True, True))]
    return [Tokens(n, (False,) * len(n), size) for n in plain] + [Tokens(n, w, size) for n, w in mixed]


# A type: R, U, P of a global value [2, tokens, 3]; S, S+ of its shards; B: one block of a global value.
DUAL = {"R": "R", "U": "P", "P": "U", "S": "S+", "S+": "S", "B": "B"}


def sample(kind: str, tokens: Tokens, seed: int) -> list[torch.Tensor]:
    """A random value of type ``kind``, per rank."""
    generator = torch.Generator().manual_seed(seed)
    size = tokens.size

    def rand(rows: int) -> torch.Tensor:
        return torch.randn(OTHER[0], rows, OTHER[1], generator=generator, dtype=torch.float64)

    if kind in ("R", "U"):
        x = rand(tokens.total())
        return [x] * size
    if kind == "P":
        return [rand(tokens.total()) for _ in range(size)]
    if kind == "B":
        return [rand(tokens.total()) for _ in range(size)]
    if kind == "S":
        x = rand(tokens.total())
        return [tokens.local(x, r) for r in range(size)]
    parts = [tokens.local(rand(tokens.total()), r) for r in range(size)]
    return [part * ~tokens.pads(r)[None, :, None] for r, part in enumerate(parts)]


def pairing(kind: str, tokens: Tokens, g: list[torch.Tensor], x: list[torch.Tensor]) -> float:
    if kind == "R":
        return float((g[0] * x[0]).sum())
    total = 0.0
    for rank, (a, b) in enumerate(zip(g, x, strict=True)):
        product = a * b
        if kind in ("S", "S+"):
            product = product[:, ~tokens.pads(rank)]
        total += float(product.sum())
    return total


def check_type(kind: str, tokens: Tokens, x: list[torch.Tensor]) -> None:
    """The promises of a type hold: equal copies are equal, zero pads are zero."""
    for rank, part in enumerate(x):
        if kind in ("R", "U"):
            torch.testing.assert_close(part, x[0])
        if kind == "S":
            entire = tokens.is_whole(rank)
            torch.testing.assert_close(part[:, entire], x[0][:, tokens.is_whole(0)])
        if kind == "S+":
            assert (part[:, tokens.pads(rank)] == 0).all()


def whole_value(kind: str, tokens: Tokens, x: list[torch.Tensor]) -> torch.Tensor:
    if kind in ("R", "U"):
        return x[0]
    if kind == "P":
        return torch.stack(x).sum(0)
    if kind == "B":
        return torch.cat(x, 1)
    return tokens.assemble(x, summands=kind == "S+")


#: op -> (type of x, type of the result).  All of them keep the global value.
TYPES = {
    "shard": ("R", "S"),
    "shard_zero": ("R", "S"),
    "gather": ("S", "R"),
    "gather_used": ("S", "U"),
    "reduce_scatter": ("P", "S+"),
    "gather_sum": ("S+", "R"),
    "all_reduce": ("P", "R"),
    "use": ("R", "U"),
    "reduce_grad": ("P", "R"),
    "mask_pads": ("S", "S+"),
    "scale_whole": ("S", "S+"),
}


def call(name: str, tokens: Tokens, rank: int, x: torch.Tensor) -> torch.Tensor:
    lengths, whole, size = list(tokens.lengths), list(tokens.whole), tokens.size
    group = GROUP if size > 1 else ""
    if name.startswith("shard"):
        return fx.shard(x, DIM, lengths, whole, name == "shard_zero", rank, size, group)
    if name in ("all_reduce", "use", "reduce_grad"):
        return getattr(fx, name)(x, group)
    if name == "mask_pads":
        return fx.mask_pads(x, DIM, lengths, whole, rank, size)
    if name == "scale_whole":
        return fx.scale_whole(x, DIM, lengths, whole, size)
    return getattr(fx, name)(x, DIM, lengths, whole, rank, size, group)


def run_op(rank, size, jobs):
    """Per job (name, tokens, x, g, h by rank): the result, the gradient, and the gradient of the gradient."""
    answers = []
    for name, tokens, xs, gs, hs in jobs:
        x, g = xs[rank].clone().requires_grad_(), gs[rank].clone().requires_grad_()
        y = call(name, tokens, rank, x)
        (grad,) = torch.autograd.grad(y, x, g, create_graph=True)
        (second,) = torch.autograd.grad(grad, g, hs[rank])
        answers.append((y.detach(), grad.detach(), second.detach()))
    return answers


def on(ranks, size, fn, *args):
    return [fn(0, 1, *args)] if size == 1 else ranks(size).run(fn, *args)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ops_and_their_adjoints(ranks, size):
    jobs = [
        (name, tokens, sample(a, tokens, 1), sample(DUAL[b], tokens, 2), sample(a, tokens, 3))
        for tokens in cases(size)
        for name, (a, b) in TYPES.items()
    ]
    by_rank = on(ranks, size, run_op, jobs)
    for i, (name, tokens, x, g, h) in enumerate(jobs):
        a, b = TYPES[name]
        y, grad, second = ([answers[i][k] for answers in by_rank] for k in range(3))
        where = f"{name} of {tokens}"
        if name != "scale_whole":  # it leaves pads as they are
            check_type(b, tokens, y)
            check_type(DUAL[a], tokens, grad)
        torch.testing.assert_close(whole_value(b, tokens, y), whole_value(a, tokens, x), msg=where)
        assert math.isclose(pairing(b, tokens, g, y), pairing(a, tokens, grad, x), rel_tol=1e-9, abs_tol=1e-9), where
        torch.testing.assert_close(whole_value(b, tokens, second), whole_value(a, tokens, h), msg=where)
        if name == "shard":
            for rank in range(size):  # pads are copies of the last row
                torch.testing.assert_close(y[rank], tokens.local(x[rank], rank), msg=where)


def test_records_have_these_types():
    types = {op.name: op.types for op in OPS}
    assert {name: f"{a} -> {b}" for name, (a, b) in TYPES.items() if name in types}.items() <= types.items()


def run_blocks(rank, size, xs, gs):
    answers = []
    for name in ("all_to_all", "take", "put"):
        x, g = xs[name][rank].requires_grad_(), gs[name][rank]
        y = fx.all_to_all(x, GROUP) if name == "all_to_all" else getattr(fx, name)(x, 1, rank, size)
        answers.append((y.detach(), *torch.autograd.grad(y, x, g)))
    return answers


@pytest.mark.parametrize("size", [2, 3])
def test_blocks(ranks, size):
    torch.manual_seed(0)
    square = [torch.randn(size, 2, 3) for _ in range(size)]
    big = [torch.randn(2, 2 * size, 3)] * size
    small = [torch.randn(2, 2, 3) for _ in range(size)]
    gs = {
        "all_to_all": [torch.randn(size, 2, 3) for _ in range(size)],
        "take": small,
        "put": [torch.randn(2, 2 * size, 3)] * size,
    }
    answers = ranks(size).run(run_blocks, {"all_to_all": square, "take": big, "put": small}, gs)
    for rank in range(size):
        (y, g), (taken, g_taken), (put, g_put) = answers[rank]
        torch.testing.assert_close(y, torch.stack([square[r][rank] for r in range(size)]))
        torch.testing.assert_close(g, torch.stack([gs["all_to_all"][r][rank] for r in range(size)]))
        block = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(taken, big[rank][:, block])
        torch.testing.assert_close(put[:, block], small[rank])
        torch.testing.assert_close(g_put, gs["put"][rank][:, block])
        torch.testing.assert_close(g_taken[:, block], gs["take"][rank])
        assert put.sum().isclose(put[:, block].sum())
        assert g_taken.sum().isclose(g_taken[:, block].sum())


def test_positions():
    for size in (1, 2, 3, 4):
        for tokens in cases(size):
            for rank in range(size):
                expected = [i for segment in tokens.rows(rank) for i, _ in segment]
                got = fx.positions(list(tokens.lengths), list(tokens.whole), rank, size, torch.device("cpu"))
                assert got.tolist() == expected
                assert got.dtype == torch.int64


# Whole programs.  Each is written twice: as one process would, and with fxsp ops.


def mlp(x, w, v):
    return (F.gelu(x @ w) @ v).pow(2).mean(-1)


def mlp_local(x, w, v, t, rank, group):
    x = fx.shard(x, 1, list(t.lengths), list(t.whole), False, rank, t.size, group)
    y = (F.gelu(x @ fx.use(w, group)) @ fx.use(v, group)).pow(2).mean(-1)
    return fx.gather(y, 1, list(t.lengths), list(t.whole), rank, t.size, group)


def attention(x, w, v):
    q, k = x @ w, x @ v
    return torch.softmax(q @ k.mT, -1) @ x


def attention_local(x, w, v, t, rank, group):
    at = (1, list(t.lengths), list(t.whole), rank, t.size, group)
    x = fx.shard(x, *at[:3], False, *at[3:])
    q, k = x @ fx.use(w, group), x @ fx.use(v, group)
    return fx.gather(torch.softmax(q @ fx.gather_used(k, *at).mT, -1) @ fx.gather_used(x, *at), *at)


def linear_attention(x, w, v):
    return x @ ((x @ w).mT @ (x @ v)) + x.mean(1, keepdim=True)


def linear_attention_local(x, w, v, t, rank, group):
    at = (1, list(t.lengths), list(t.whole), rank, t.size)
    x = fx.shard(x, *at[:3], False, *at[3:], group)
    once = fx.mask_pads(x, *at)
    state = fx.all_reduce((once @ fx.use(w, group)).mT @ (x @ fx.use(v, group)), group)
    mean = fx.all_reduce(once.sum(1, keepdim=True), group) / t.total()
    return fx.gather(x @ fx.use(state, group) + fx.use(mean, group), *at, group)


def row_parallel(x, w, v):
    return torch.tanh(torch.cat([x, x @ v], -1) @ torch.cat([w, w], 0))


def row_parallel_local(x, w, v, t, rank, group):
    """Each rank multiplies a slice of the contracted dimension: the sum is scattered over tokens."""
    at = (1, list(t.lengths), list(t.whole), rank, t.size, group)
    repeat = t.size  # so that the dimension divides
    a = torch.cat([fx.use(x, group), fx.use(x, group) @ fx.use(v, group)], -1).repeat(1, 1, repeat)
    b = torch.cat([fx.use(w, group)] * 2, 0).repeat(repeat, 1)
    partial = fx.take(a, 2, rank, t.size) @ fx.take(b, 0, rank, t.size) / repeat
    if not any(t.whole):
        return fx.gather(torch.tanh(fx.reduce_scatter(partial, *at)), *at)
    return torch.tanh(fx.all_reduce(partial, group))


def mixed(x, w, v):
    return torch.cat([x[:, :2] @ v, x], 1) @ w


def mixed_local(x, w, v, t, rank, group):
    """A replicated part enters a mixed sequence by ``use``, and leaves it by ``gather``."""
    at = (1, list(t.lengths), list(t.whole), rank, t.size, group)
    text = fx.use(x[:, :2] @ v, group)
    y = torch.cat([text, fx.shard(x, *at[:3], False, *at[3:])], 1) @ fx.use(w, group)
    lengths, whole = [text.shape[1], *t.lengths], [True, *t.whole]
    return fx.gather(y, 1, lengths, whole, rank, t.size, group)


PROGRAMS = {
    "mlp": (mlp, mlp_local),
    "attention": (attention, attention_local),
    "linear_attention": (linear_attention, linear_attention_local),
    "row_parallel": (row_parallel, row_parallel_local),
    "mixed": (mixed, mixed_local),
}


def values_and_gradients(fn, x, w, v):
    x, w, v = (a.clone().requires_grad_() for a in (x, w, v))
    y = fn(x, w, v)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, w, v))]


def run_programs(rank, size, inputs):
    group = GROUP if size > 1 else ""
    return [
        [
            values_and_gradients(lambda x, w, v, f=local, t=t: f(x, w, v, t, rank, group), *args)
            for _, local in PROGRAMS.values()
        ]
        for t, args in inputs
    ]


def ulysses(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def ulysses_local(q, k, v, n, rank, size):
    """One exchange for q, k and v together, one back; heads [B, H, n, D] with H a multiple of size."""
    at = (0, [n], [False])
    rows = [fx.shard(a.permute(2, 0, 1, 3), *at, False, rank, size, GROUP) for a in (q, k, v)]  # [L, B, H, D]
    heads = rows[0].shape[2] // size
    send = torch.stack([a.unflatten(2, (size, heads)).permute(2, 0, 1, 3, 4) for a in rows], 3)  # [P, L, B, 3, h, D]
    got = fx.all_to_all(send, GROUP).flatten(0, 1).narrow(0, 0, n)
    out = F.scaled_dot_product_attention(*got.permute(2, 1, 3, 0, 4).unbind(0))  # [B, h, n, D]
    rows_out = F.pad(out.permute(2, 0, 1, 3), [0, 0] * 3 + [0, -(-n // size) * size - n])
    back = fx.all_to_all(rows_out.unflatten(0, (size, -1)).contiguous(), GROUP)  # [P, L, B, h, D]
    y = back.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [L, B, H, D]
    return fx.gather(y, *at, rank, size, GROUP).permute(1, 2, 0, 3)


def run_ulysses(rank, size, inputs):
    return [
        values_and_gradients(lambda q, k, v, n=q.shape[2]: ulysses_local(q, k, v, n, rank, size), q, k, v)
        for q, k, v in inputs
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_programs_equal_one_process(ranks, size):
    torch.manual_seed(1)
    inputs = [
        (t, [torch.randn(*shape, dtype=torch.float64) for shape in ((2, t.total(), 4), (4, 4), (4, 4))])
        for t in cases(size)
    ]
    for answers in on(ranks, size, run_programs, inputs):
        for (tokens, args), by_program in zip(inputs, answers, strict=True):
            for (name, (plain, _)), got in zip(PROGRAMS.items(), by_program, strict=True):
                expected = values_and_gradients(plain, *args)
                for what, a, b in zip(("y", "x", "w", "v"), got, expected, strict=True):
                    torch.testing.assert_close(a, b, msg=lambda m, s=f"{what} of {name}, {tokens}": f"{s}: {m}")


@pytest.mark.parametrize("size", [2, 3])
def test_exchange_program_equals_one_process(ranks, size):
    torch.manual_seed(2)
    shapes = [(2, 2 * size, n, 4) for n in (1, size - 1, 7, 2 * size)]
    inputs = [[torch.randn(*shape, dtype=torch.float64) for _ in range(3)] for shape in shapes]
    for answers in ranks(size).run(run_ulysses, inputs):
        for qkv, got in zip(inputs, answers, strict=True):
            torch.testing.assert_close(got, values_and_gradients(ulysses, *qkv))
