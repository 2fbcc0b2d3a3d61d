"""The instructions of random programs: each draws its operands and appends a line or a few."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from programs import Builder, Var, instruction

# --- token by token --------------------------------------------------------------------------------------------------


@instruction
def unary(b: Builder) -> None:
    v = b.value(lambda v: True)
    form = b.pick(["F.gelu({})", "F.silu({})", "torch.tanh({})", "{} * 0.5", "1 - {}", "{}.relu() + 0.1 * {}",
                   "{}.contiguous()", "{}.abs().sqrt()"])  # fmt: skip
    b.emit(form.replace("{}", v.name), v.dims)


@instruction
def binary(b: Builder) -> None:
    v = b.value(lambda v: True)
    w = b.value(lambda w: w.dims == v.dims)
    form = b.pick(["{} + {}", "{} * torch.tanh({})", "torch.maximum({}, {})", "{} - 0.5 * {}",
                   "torch.lerp({}, {}, 0.25)"])  # fmt: skip
    b.emit(form.format(v.name, w.name), v.dims)


@instruction
def linear(b: Builder) -> None:
    v = b.value(lambda v: v.dims[-1:] == ("C",))
    if v is None:
        return
    w = b.input(("C", "C"))
    bias = b.input(("C",)) if b.number(0, 1) else None
    form = b.pick(["F.linear({x}, {w}{b})", "{x} @ {w}{p}", "torch.matmul({x}, {w}.t()){p}"])
    text = form.format(x=v.name, w=w, b=f", {bias}" if bias else "", p=f" + {bias}" if bias else "")
    b.emit(f"({text}) / {math.sqrt(b.size('C')):.4g}", v.dims)


@instruction
def gated(b: Builder) -> None:
    v = b.value(lambda v: v.dims[-1:] == ("C",))
    if v is None:
        return
    b.sizes["C2"] = 2 * b.size("C")
    both = b.let(f"F.linear({v.name}, {b.input(('C2', 'C'))})")
    one, two = b.fresh("t"), b.fresh("t")
    b.line(f"{one}, {two} = {both}.chunk(2, dim=-1)")
    b.emit(f"F.silu({one}) * torch.tanh({two})", v.dims)


@instruction
def norm(b: Builder) -> None:
    v = b.value(lambda v: v.dims[-1:] in (("C",), ("D",)))
    if v is None:
        return
    n, d = f"({v.name}.shape[-1],)", v.dims[-1]
    forms = [
        f"F.layer_norm({v.name}, {n})",
        f"F.layer_norm({v.name}, {n}, {{w}}, {{w2}}, 1e-6)",
        f"F.rms_norm({v.name}, {n}, {{w}}, 1e-6)",
        f"{v.name} * torch.rsqrt({v.name}.pow(2).mean(-1, keepdim=True) + 1e-6)",
        f"torch.softmax({v.name}, -1)",
        f"F.normalize({v.name}, dim=-1)",
    ]
    form = b.pick(forms)
    if "{w}" in form:
        form = form.replace("{w}", b.input((d,)))
    if "{w2}" in form:
        form = form.replace("{w2}", b.input((d,)))
    b.emit(form, v.dims)


@instruction
def broadcast(b: Builder) -> None:
    """With a value that lacks some of the dimensions, or has size 1 there: adaLN shifts, tables over tokens."""
    v = b.value(lambda v: True)
    keep = [d if b.number(0, 1) else "1" for d in v.dims]
    while keep and keep[0] == "1" and b.number(0, 1):
        keep = keep[1:]
    w = b.input(keep)
    form = b.pick(
        ["{} + {}", "{} * torch.tanh({})", "{} * (1 + torch.tanh({})) + 0.5", "torch.where({} > 0, {w}, {v})"]
    )
    if "{w}" in form:
        form = form.format(w, w=w, v=v.name)  # the condition is an input: no rounding decides it
    else:
        form = form.format(v.name, w)
    b.emit(form, v.dims)


@instruction
def modulate(b: Builder) -> None:
    """adaLN: a linear of a vector, cut into channels, applied to all tokens."""
    v = b.canonical()
    b.sizes["C3"] = 3 * b.size("C")
    temb = b.let(f"F.silu({b.input(('B', 'C'))})")
    table = b.let(f"F.linear({temb}, {b.input(('C3', 'C'))})")
    names = [b.fresh("t") for _ in range(3)]
    form = b.pick(["{}.chunk(3, dim=1)", "{}.unsqueeze(1).chunk(3, dim=2)", "{}.unflatten(1, (3, -1)).unbind(1)"])
    b.line(f"{', '.join(names)} = {form.format(table)}")
    shift, scale, gate = names if "unsqueeze" in form else [f"{n}[:, None]" for n in names]
    b.emit(f"{v.name} + torch.tanh({gate}) * (F.layer_norm({v.name}, ({v.name}.shape[-1],)) * (1 + {scale}) + {shift})", v.dims)  # fmt: skip # noqa: E501


@instruction
def length_arithmetic(b: Builder) -> None:
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    n = f"{v.name}.shape[{v.at(v.seq)}]"
    b.emit(b.pick(["{v} / ({n} - 1 + 2)", "{v} * {n} ** -0.5", "{v} + math.log({n})"]).format(v=v.name, n=n), v.dims)


@instruction
def positions(b: Builder) -> None:
    """Something computed from arange over the tokens."""
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    i = v.at(v.seq)
    pos = b.let(f"torch.arange({v.name}.shape[{i}])")
    k = b.number(0, b.size(v.seq))
    tail = "[:" + ", None" * (len(v.dims) - 1 - i) + "]" if i < len(v.dims) - 1 else ""
    form = b.pick([
        "{v}.masked_fill(({p} >= {k}){t}, 0.25)",
        "torch.where(({p} % 2 == 0){t}, {v}, -{v})",
        "{v} + ({p} / {v}.shape[{i}]).to({v}.dtype){t}",
        "{v} * torch.cos({p}.to({v}.dtype) * 0.1){t}",
        "{v} + ({p} == {v}.shape[{i}] - 1).to({v}.dtype){t}",
    ])  # fmt: skip
    b.emit(form.format(v=v.name, p=pos, k=k, t=tail, i=i), v.dims)


@instruction
def embedding(b: Builder) -> None:
    v = b.canonical()
    b.sizes["V"] = 7
    ids, table = b.input(("B", v.seq), "ids", "ids"), b.input(("V", "C"))
    b.emit(f"{v.name} + F.embedding({ids}, {table})", v.dims)


# --- views -----------------------------------------------------------------------------------------------------------


@instruction
def permute(b: Builder) -> None:
    v = b.value(lambda v: len(v.dims) > 1)
    if v is None:
        return
    if b.number(0, 1):
        i = b.number(0, len(v.dims) - 2)
        order = list(range(len(v.dims)))
        order[i], order[i + 1] = order[i + 1], order[i]
        text = f"{v.name}.transpose({i}, {i + 1})"
    else:
        order = list(b.pick(list(itertools.permutations(range(len(v.dims))))))
        text = f"{v.name}.permute({order})"
    b.emit(text, [v.dims[i] for i in order])


@instruction
def heads(b: Builder) -> None:
    """C to (H, D), or back."""
    v = b.value(lambda v: "C" in v.dims or any(p == ("H", "D") for p in itertools.pairwise(v.dims)))
    if v is None:
        return
    if "C" in v.dims:
        i = v.at("C")
        dims = (*v.dims[:i], "H", "D", *v.dims[i + 1 :])
        h, d = b.size("H"), b.size("D")
        sizes = ", ".join(f"{v.name}.shape[{j}]" for j in range(i))
        forms = [f"{v.name}.unflatten({i}, ({h}, {d}))", f"{v.name}.unflatten({i}, (-1, {d}))"]
        if i == len(v.dims) - 1:
            forms += [f"{v.name}.reshape({sizes}{', ' if sizes else ''}{h}, -1)"]
        b.emit(b.pick(forms), dims)
        return
    i = v.at("H")
    dims = (*v.dims[:i], "C", *v.dims[i + 2 :])
    b.emit(f"{v.name}.flatten({i}, {i + 1})", dims)


@instruction
def flatten(b: Builder) -> None:
    """Two neighbouring dimensions into one (the tokens become a factor of it), or such a one apart."""
    v = b.value(lambda v: any("*" in d for d in v.dims) or len(v.dims) > 1)
    if v is None:
        return
    compound = next((i for i, d in enumerate(v.dims) if "*" in d), None)
    if compound is not None:
        parts = v.dims[compound].split("*")
        at = b.number(0, len(parts) - 1)
        sizes = ", ".join("-1" if i == at else str(b.size(d)) for i, d in enumerate(parts))
        b.emit(f"{v.name}.unflatten({compound}, ({sizes}))", (*v.dims[:compound], *parts, *v.dims[compound + 1 :]))
        return
    i = b.number(0, len(v.dims) - 2)
    if v.dims[i : i + 2] == ("H", "D"):
        return
    dims = (*v.dims[:i], f"{v.dims[i]}*{v.dims[i + 1]}", *v.dims[i + 2 :])
    b.emit(f"{v.name}.flatten({i}, {i + 1})", dims)


@instruction
def expanded(b: Builder) -> None:
    """A new dimension, expanded or repeated, and reduced again."""
    v = b.value(lambda v: len(v.dims) < 5)
    if v is None:
        return
    i = b.number(0, len(v.dims))
    minus = ["-1"] * len(v.dims)
    minus.insert(i, "3")
    ones = ["1"] * len(v.dims)
    ones.insert(i, "2")
    form = b.pick(["{v}.unsqueeze({i}).expand({m}).sum({i})", "{v}.unsqueeze({i}).repeat({o}).mean({i})",
                   "torch.stack([{v}, {v} * 2], {i}).amax({i})",
                   "torch.stack([{v}, {v}.exp().log1p()], {i}).unbind({i})[1]",
                   "{v}.unsqueeze({i}).squeeze({i})"])  # fmt: skip
    b.emit(form.format(v=v.name, i=i, m=", ".join(minus), o=", ".join(ones)), v.dims)


@instruction
def frames(b: Builder) -> None:
    """Tokens apart into (frames, tokens): no longer one sequence."""
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    n, i = b.size(v.seq), v.at(v.seq)
    f = b.pick([k for k in range(1, n + 1) if n % k == 0])
    apart = b.let(f"{v.name}.unflatten({i}, ({f}, -1))")
    form = b.pick(["({a} - {a}.mean({i}, keepdim=True))", "{a}.transpose({i}, {j})", "{a}.cumsum({j})", "({a} * 2)"])
    b.emit(f"{form.format(a=apart, i=i, j=i + 1)}.flatten({i}, {i + 1})", v.dims)


# --- along the tokens ------------------------------------------------------------------------------------------------


@instruction
def concatenate(b: Builder) -> None:
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    w = b.value(lambda w: w.seq is not None and [d if d != w.seq else "" for d in w.dims] == [d if d != v.seq else "" for d in v.dims])  # fmt: skip # noqa: E501
    assert w is not None
    if b.size(v.seq) + b.size(w.seq) > 60:
        return
    seq = b.sequence(b.size(v.seq) + b.size(w.seq), (v.seq, w.seq))
    i = v.at(v.seq)
    b.emit(f"torch.cat([{v.name}, {w.name}], dim={i})", (*v.dims[:i], seq, *v.dims[i + 1 :]))


@instruction
def split(b: Builder) -> None:
    """Cut the tokens, at a boundary of a cat where there is one, or anywhere."""
    v = b.value(lambda v: v.seq is not None and b.size(v.seq) > 1)
    if v is None:
        return
    i, n = v.at(v.seq), b.size(v.seq)
    parts = b.parts.get(v.seq)
    if parts and b.number(0, 2) < 2:
        names = parts
    else:
        cut = b.number(1, n - 1)
        names = (b.sequence(cut), b.sequence(n - cut))
    one, two = (b.size(name) for name in names)
    every = ":, " * i
    forms = [
        f"{v.name}.split([{one}, {two}], dim={i})",
        f"({v.name}[{every}:{one}], {v.name}[{every}{one}:])",
        f"({v.name}.narrow({i}, 0, {one}), {v.name}.narrow({i}, {one}, {two}))",
        f"({v.name}[{every}:-{two}], {v.name}[{every}-{two}:])",
    ]
    if 0 <= one - two <= 1:
        forms.append(f"{v.name}.chunk(2, dim={i})")
    pieces = b.let(b.pick(forms))
    for j, name in enumerate(names):
        b.emit(f"{pieces}[{j}]", (*v.dims[:i], name, *v.dims[i + 1 :]))


@instruction
def reduce_tokens(b: Builder) -> None:
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    i = v.at(v.seq)
    form = b.pick(["{v}.mean({i}, keepdim=True)", "{v}.sum({i}, keepdim=True) / {v}.shape[{i}]",
                   "{v}.amax({i}, keepdim=True)", "{v}.max({i}, keepdim=True).values", "{v}.amin({i}, keepdim=True)",
                   "{v}.logsumexp({i}, keepdim=True)", "{v}.norm(dim={i}, keepdim=True)", "{v}.mean()",
                   "{v}.var({i}, unbiased=False, keepdim=True)", "{v}[{e}:1]", "{v}.select({i}, -1).unsqueeze({i})",
                   "{v}.mean([{i}, {k}], keepdim=True)", "{v}.sum() / {v}.numel()",
                   "{v}.median({i}, keepdim=True).values", "{v}.std({i}, correction=0, keepdim=True)"])  # fmt: skip
    k = (i + 1) % len(v.dims) if len(v.dims) > 1 else -1
    if k < 0 and "{k}" in form:
        return
    reduced = b.let(form.format(v=v.name, i=i, k=k, e=":, " * i))
    b.emit(b.pick(["{v} - {r}", "{v} * torch.tanh({r})", "{r}.expand_as({v}) + 0"]).format(v=v.name, r=reduced), v.dims)


@instruction
def pooled(b: Builder) -> None:
    """A vector of the tokens (no token dimension any more), used for a new value."""
    v = b.canonical()
    form = b.pick(["{v}.mean(1)", "{v}[:, 0]", "{v}[:, -1]", "{v}.amax(dim=1)", "torch.einsum('bsc->bc', {v})"])
    vector = b.let(f"F.linear({form.format(v=v.name)}, {b.input(('C', 'C'))}) / {math.sqrt(b.size('C')):.4g}")
    b.emit(f"{v.name} + {vector}.unsqueeze(1)", v.dims)


@instruction
def mix_tokens(b: Builder) -> None:
    """Operators for which no shard is enough."""
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    i, n = v.at(v.seq), b.size(v.seq)
    shift, ids = b.number(-2, n), None
    form = b.pick(["{v}.cumsum({i}) / {v}.shape[{i}]", "torch.softmax({v}, {i})", "{v}.roll({k}, {i})",
                   "{v}.flip({i})", "{v}.sort({i}).values", "{v}.index_select({i}, {ids})",
                   "{v} - {v}.roll(1, dims={i})", "torch.logcumsumexp({v}, {i})", "{v}.flip([0, {i}])",
                   "F.layer_norm({v}, {v}.shape[{i}:])", "{v}[{e}{ids}]"])  # fmt: skip
    if "{ids}" in form:
        ids = b.input((v.seq,), "index", "ids", bound=n)
    b.emit(form.format(v=v.name, i=i, k=shift, ids=ids, e=":, " * i), v.dims)


@instruction
def resample(b: Builder) -> None:
    """Another number of tokens."""
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    i, n = v.at(v.seq), b.size(v.seq)
    k = b.number(0, n - 1)
    before, after = b.number(0, 2), b.number(0, 2)
    zeros = ", ".join(["0, 0"] * (len(v.dims) - 1 - i))
    every = ":, " * i
    text, length = b.pick([
        (f"{v.name}[{every}{k}:]", n - k),
        (f"{v.name}[{every}::2]", (n + 1) // 2),
        (f"F.pad({v.name}, ({zeros}{', ' if zeros else ''}{before}, {after}))", n + before + after),
        (f"{v.name}.repeat_interleave(2, dim={i})", 2 * n),
        (f"{v.name}.narrow({i}, 0, {k + 1})", k + 1),
    ])  # fmt: skip
    if length > 40:
        return
    seq = b.sequence(length)
    b.emit(text, (*v.dims[:i], seq, *v.dims[i + 1 :]))


@instruction
def convolve(b: Builder) -> None:
    v = b.canonical()
    b.sizes["K"] = 3
    w = b.input(("C", "1", "K"))
    form = b.pick(["F.conv1d({t}, {w}, padding=1, groups={c})", "F.conv1d(F.pad({t}, (2, 0)), {w}, groups={c})",
                   "F.avg_pool1d({t}, 3, 1, 1)"])  # fmt: skip
    text = form.format(t=f"{v.name}.transpose(1, 2)", w=w, c=b.size("C"))
    b.emit(f"{v.name} + {text}.transpose(1, 2)", v.dims)


@instruction
def group_norm(b: Builder) -> None:
    """A norm over tokens and channels (torch refuses a single value)."""
    v = b.canonical()
    if b.size("B") * b.size("C") // b.size("H") * b.size(v.seq) < 2:
        return
    b.emit(f"F.group_norm({v.name}.transpose(1, 2), {b.size('H')}, eps=1e-3).transpose(1, 2)", v.dims)


@instruction
def token_mixer(b: Builder) -> None:
    """A weight of size S x S contracts the tokens: of a length that may equal the hidden size."""
    v = b.canonical()
    w = b.input((v.seq, v.seq))
    form = b.pick(["({w} @ {v})", "F.linear({v}.transpose(1, 2), {w}).transpose(1, 2)",
                   "torch.einsum('ts,bsc->btc', {w}, {v})", "torch.baddbmm({v}, {w}.expand({v}.shape[0], -1, -1), {v})"])  # fmt: skip # noqa: E501
    b.emit(f"{form.format(v=v.name, w=w)} / {v.name}.shape[1]", v.dims)


# --- in place --------------------------------------------------------------------------------------------------------


@instruction
def in_place(b: Builder) -> None:
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    i, n = v.at(v.seq), b.size(v.seq)
    k, every = b.number(0, n), ":, " * i
    y = b.let(f"{v.name}.clone()", "y")
    form = b.pick(["{y}[{e}:{k}] = 0.5", "{y}[{e}{k}:] *= 2", "{y}.mul_(0.5).add_({v})", "{y}[{e}::2] += 1",
                   "{y}.copy_({v} * 2)", "{y}[..., 0] = {v}[..., -1]", "{y}[..., ::2].mul_(-1)",
                   "{y}.masked_fill_(torch.arange({n}).view({t}) < {k}, 0.0)", "{y}[0] = {v}[-1]",
                   "{y}.transpose(0, -1).add_(1)"])  # fmt: skip
    view = ", ".join("-1" if j == i else "1" for j in range(len(v.dims)))
    b.line(form.format(y=y, v=v.name, k=k, e=every, n=f"{v.name}.shape[{i}]", t=view))
    b.values.append(Var(y, v.dims))


@instruction
def rotary(b: Builder) -> None:
    """Rotation of channel pairs by a table over tokens: by halves, or in place as Wan does."""
    v = b.canonical()
    if b.size("D") % 2:
        return
    b.sizes["D2"] = b.size("D") // 2
    if b.number(0, 1):
        angles = b.input((v.seq, "D2"))
    else:
        angles = b.let(f"torch.outer(torch.arange({v.name}.shape[1]).to({v.name}.dtype), {b.input(('D2',))}) * 0.1")
    cos, sin = b.let(f"torch.cos({angles})[None, :, None, :]"), b.let(f"torch.sin({angles})[None, :, None, :]")
    x = b.let(f"{v.name}.unflatten(2, ({b.size('H')}, -1))")
    if b.number(0, 1):
        one, two = b.fresh("t"), b.fresh("t")
        b.line(f"{one}, {two} = {x}.chunk(2, dim=-1)")
        b.emit(f"torch.cat([{one} * {cos} - {two} * {sin}, {one} * {sin} + {two} * {cos}], dim=-1).flatten(2)", v.dims)
        return
    out = b.let(f"torch.empty_like({x})")
    b.line(f"{out}[..., 0::2] = {x}[..., 0::2] * {cos} - {x}[..., 1::2] * {sin}")
    b.line(f"{out}[..., 1::2] = {x}[..., 0::2] * {sin} + {x}[..., 1::2] * {cos}")
    b.emit(f"{out}.flatten(2)", v.dims)


# --- attention -------------------------------------------------------------------------------------------------------


def _head_major(b: Builder, name: str, heads: int) -> str:
    form = b.pick(
        ["{x}.unflatten(2, ({h}, -1)).transpose(1, 2)", "{x}.view({x}.shape[0], -1, {h}, {d}).permute(0, 2, 1, 3)"]
    )
    return b.let(form.format(x=name, h=heads, d=b.size("D")))


@instruction
def attention(b: Builder) -> None:
    """Self-attention, or attention to another sequence; masks of every kind; grouped key/value heads."""
    v = b.canonical()
    w = b.canonical() if b.number(0, 2) == 2 else v
    h = b.size("H")
    kv = b.pick([h, *(k for k in range(1, h) if h % k == 0)])
    b.sizes["KV"], b.sizes["KVD"] = kv, kv * b.size("D")
    q = b.let(f"F.linear({v.name}, {b.input(('C', 'C'))})")
    k = b.let(f"F.linear({w.name}, {b.input(('KVD', 'C'))})")
    u = b.let(f"F.linear({w.name}, {b.input(('KVD', 'C'))})")
    q, k, u = _head_major(b, q, h), _head_major(b, k, kv), _head_major(b, u, kv)
    if b.number(0, 1):
        q, k = (b.let(f"F.rms_norm({t}, ({t}.shape[-1],))") for t in (q, k))
    options = ", enable_gqa=True" if kv != h else ""
    if kv != h and b.number(0, 1):
        k, u = (b.let(f"{t}.repeat_interleave({h // kv}, dim=1)") for t in (k, u))
        options = ""
    options += _mask(b, v, w, kv)
    if b.number(0, 1):
        options += ", scale=0.3"
    out = b.let(f"F.scaled_dot_product_attention({q}, {k}, {u}{options})")
    b.emit(b.pick(["{v} + {o}.transpose(1, 2).flatten(2)", "{v} + {o}.transpose(1, 2).reshape({v}.shape)"])
           .format(v=v.name, o=out), v.dims)  # fmt: skip


def _mask(b: Builder, v: Var, w: Var, kv: int) -> str:
    sq, sk = v.seq, w.seq
    assert sq is not None
    assert sk is not None
    pos_q, pos_k = f"torch.arange({v.name}.shape[1])", f"torch.arange({w.name}.shape[1])"
    options: list[Callable[[], str]] = [
        lambda: "",
        lambda: f"attn_mask={b.input(('B', '1', '1', sk), 'mask', 'm')}",
        lambda: f"attn_mask={b.input(('B', sk), 'mask', 'm')}[:, None, None, :]",
        lambda: f"attn_mask={b.input((sq, sk), 'mask', 'm')}",
        lambda: f"attn_mask={b.input(('B', 'H', sq, sk), 'mask', 'm')}",
        lambda: f"attn_mask={b.input(('1', 'H', '1', sk))}",
        lambda: f"attn_mask={b.input(('B', '1', sq, sk))}",
        lambda: f"attn_mask={pos_q}[:, None] >= {pos_k}[None, :]",
        lambda: f"attn_mask=({pos_q}[:, None] >= {pos_k}) & {b.input(('B', '1', '1', sk), 'mask', 'm')}",
        lambda: f"attn_mask=({pos_q}[:, None] - {pos_k}[None]).to({v.name}.dtype) * 0.1",
        lambda: f"attn_mask={b.input(('B', '1', sq, '1'), 'mask', 'm')} | ({pos_k} < 1)",
    ]
    if sq == sk:
        options += [
            lambda: "is_causal=True",
            lambda: f"attn_mask=({pos_q}[:, None] - {pos_k}[None]).abs() < 3",
            lambda: f"attn_mask=torch.ones({v.name}.shape[1], {v.name}.shape[1], dtype=torch.bool).tril()",
        ]
    text = b.pick(options)()
    return f", {text}" if text else ""


@instruction
def manual_attention(b: Builder) -> None:
    v = b.canonical()
    w = b.canonical() if b.number(0, 1) else v
    form = b.pick([
        "torch.softmax({v} @ {w}.transpose(1, 2) * 0.5, -1) @ {w}",
        "torch.bmm(torch.softmax(torch.einsum('btc,bsc->bts', {v}, {w}), dim=-1), {w})",
        "{v} @ (torch.softmax({w}, 1).transpose(1, 2) @ {w})",
        "{v} @ ({w}.transpose(1, 2) @ {w}) / {w}.shape[1]",
    ])  # fmt: skip
    b.emit(form.format(v=v.name, w=w.name), v.dims)


# --- annotations in the middle ---------------------------------------------------------------------------------------


@instruction
def annotated(b: Builder) -> None:
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    kind = b.pick(["gather", "shard"])
    b.emit(f'annotate({v.name}, "{kind}", {v.at(v.seq)}, -1, "{v.name}")', v.dims)
