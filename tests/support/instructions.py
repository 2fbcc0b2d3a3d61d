"""Instructions of random programs, token by token, and views: each draws its operands and appends a line or a few."""

from __future__ import annotations

import itertools
import math

from programs import Builder, instruction

# --- token by token --------------------------------------------------------------------------------------------------


@instruction
def unary(b: Builder) -> None:
    v = b.value(lambda v: True)
    form = b.pick(["F.gelu({})", "F.silu({})", "torch.tanh({})", "{} * 0.5", "1 - {}", "{}.relu() + 0.1 * {}",
                   "{}.contiguous()", "{}.abs().sqrt()", "{} + torch.zeros_like({})", "torch.full_like({}, 0.5) * {}",
                   "{} + torch.empty_like({}).fill_(0.25)", "{} * torch.ones_like({}).cumsum(-1).clamp(max=1)",
                   "{} + torch.rand_like({}).clamp(0, 0)"])  # fmt: skip
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
        tokens = [i for i, d in enumerate(parts) if b.expression(d) != b.size(d)]
        at = tokens[0] if len(tokens) == 1 and b.number(0, 2) else b.number(0, len(parts) - 1)
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
