"""Instructions of random programs that cut, join, reduce and mix the tokens."""

from __future__ import annotations

import math

from programs import Builder, instruction

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
    seq = b.sequence(b.size(v.seq) + b.size(w.seq), f"{v.seq} + {w.seq}", (v.seq, w.seq))
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
    names: tuple[str, ...] = ()
    if parts and b.number(0, 2) < 2:
        names = parts
        one, two = (b.size(name) for name in names)
    else:
        one = b.number(1, n - 1)
        two = n - one
    every = ":, " * i
    a, c = (b.length(name) for name in names) if names else (str(one), str(two))
    forms = [
        f"{v.name}.split([{a}, {c}], dim={i})",
        f"({v.name}[{every}:{a}], {v.name}[{every}{a}:])",
        f"({v.name}.narrow({i}, 0, {a}), {v.name}.narrow({i}, {a}, {v.name}.shape[{i}] - {a}))",
        f"({v.name}[{every}:-{c}], {v.name}[{every}-{c}:])",
        f"torch.tensor_split({v.name}, [{a}], {i})",
    ]
    if 0 <= one - two <= 1 and not names:
        forms.append(f"{v.name}.chunk(2, dim={i})")
    form = b.pick(forms)
    if not names:
        # The first has a fixed length, or with a negative bound the second.
        first = f"{v.seq} - {two}" if ":-" in form else str(one)
        names = (b.sequence(one, first), b.sequence(two, f"{v.seq} - ({first})"))
    pieces = b.let(form)
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
                   "{v}.amax([{i}, {k}], keepdim=True)", "{v}.abs().amax()", "{v}.max()", "{v}.min() / 2",
                   "torch.aminmax({v}, dim={i}, keepdim=True).min", "({v} > 9).any().to({v}.dtype)",
                   "{v}.isfinite().all({i}, keepdim=True).to({v}.dtype)", "{v}.min({i}, keepdim=True)[0]",
                   "torch.where({v}.isnan().any(), 1.0, {v}.amin())", "{v}.logsumexp([{i}, {k}], keepdim=True)",
                   "torch.linalg.vector_norm({v}, float('inf'), {i}, keepdim=True)", "{v}.norm(p=1) / {v}.numel()",
                   "{v}.new_ones({v}.shape).sum({i}, keepdim=True) / {v}.shape[{i}]",
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
    form = b.pick(["{v}.cumsum({i}) / {v}.shape[{i}]", "torch.softmax({v}, {i})", "{v}.roll({k}, {i})",
                   "{v}.flip({i})", "{v}.sort({i}).values", "{v}.index_select({i}, {ids})",
                   "{v} - {v}.roll(1, dims={i})", "torch.logcumsumexp({v}, {i})", "{v}.flip([{i}, -1])",
                   "F.layer_norm({v}, {v}.shape[{i}:])", "{v}[{e}{ids}]", "torch.take_along_dim({v}, {at}, {i})",
                   "{v}.gather({i}, {at})", "{v}.scatter_add({i}, {at}, {v})", "{v}.index_add({i}, {ids}, {v})",
                   "{v}.index_copy({i}, {order}, {v} * 2)", "torch.log_softmax({v}, {i})", "{v}.cummax({i}).values",
                   "{v}.sigmoid().cumprod({i})", "{v}.masked_scatter({m}, {v}.flip({i}))",
                   "{v} + {v}.index_select({i}, {ids}[:1])", "{v}.movedim({i}, 0).flip(0).movedim(0, {i})",
                   "torch.where({m}, {v}, {v}.roll(1, {i}))"])  # fmt: skip
    last = i == len(v.dims) - 1
    if last and "-1]" in form:
        return
    form = form.replace("{at}", "{ids}.view({view}).expand_as({v})")
    made = {}
    if "{ids}" in form:
        made["ids"] = b.input((v.seq,), "index", "ids", bound=b.expression(v.seq))
    if "{order}" in form:
        made["order"] = b.input((v.seq,), "order", "ids")
    if "{m}" in form:
        made["m"] = b.input(("1",) * i + (v.seq,) + ("1",) * (len(v.dims) - 1 - i), "mask", "m")
    view = ", ".join("-1" if j == i else "1" for j in range(len(v.dims)))
    b.emit(form.format(v=v.name, i=i, k=b.number(-2, n), e=":, " * i, view=view, **made), v.dims)


@instruction
def resample(b: Builder) -> None:
    """Another number of tokens."""
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    i, n = v.at(v.seq), b.size(v.seq)
    k = b.number(0, n - 1)
    before, after = b.number(0, 2), b.number(0, 2)
    pads = ", ".join(["0, 0"] * (len(v.dims) - 1 - i) + [f"{before}, {after}"])
    every = ":, " * i
    s = v.seq
    text, length, expression = b.pick([
        (f"{v.name}[{every}{k}:]", n - k, f"{s} - {k}"),
        (f"{v.name}[{every}::2]", (n + 1) // 2, f"({s} + 1) // 2"),
        (f"F.pad({v.name}, ({pads}))", n + before + after, f"{s} + {before + after}"),
        (f"{v.name}.repeat_interleave(2, dim={i})", 2 * n, f"2 * {s}"),
        (f"{v.name}.narrow({i}, 0, {k + 1})", k + 1, str(k + 1)),
        (f"{v.name}.unfold({i}, 1, 1).squeeze(-1)", n, s),
        (f"{v.name}.unfold({i}, {k + 1}, 1).mean(-1)", n - k, f"{s} - {k}"),
        (f"torch.cat([{v.name}[{every}:1], {v.name}], dim={i})", n + 1, f"{s} + 1"),
        (f"{v.name}.diff(dim={i}, prepend={v.name}[{every}:1])", n, s),
        (f"{v.name}.topk({k + 1}, dim={i}).values", k + 1, str(k + 1)),
    ])  # fmt: skip
    if length > 40:
        return
    seq = b.sequence(length, expression)
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
