"""Instructions of random programs: writes, attention of every kind, losses, and annotations in the middle."""

from __future__ import annotations

from collections.abc import Callable

from programs import Builder, Var, instruction

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
def write_through_view(b: Builder) -> None:
    """Writes to parts of a copy through views of views; what else sees the memory is read afterwards."""
    v = b.value(lambda v: v.seq is not None and len(v.dims) > 1)
    if v is None:
        return
    i, n = v.at(v.seq), b.size(v.seq)
    y = b.let(f"{v.name} * 1", "y")
    view = b.let(b.pick([f"{y}.view({y}.shape)", f"{y}.transpose(0, {i})", f"{y}.unsqueeze(0)[0]",
                         f"{y}.narrow({i}, 0, {n})",
                         f"{y}.flatten(0, {i})", f"{y}.movedim({i}, 0)", f"{y}.chunk(2, -1)[0]", f"{y}.detach()",
                         f"{y}.view_as({y})", f"{y}.unbind(0)[0]", f"{y}.split(1, {i})[-1]"]))  # fmt: skip
    k = b.number(0, n - 1)
    b.line(b.pick(["{t}.mul_(0.5)", "{t}.copy_(torch.tanh({t}))", "{t}[:1].zero_()", "{t}[..., -1:] = 1.0",
                   "{t}[{k}:].add_(1)",
                   "{t}.clamp_(max=0.5)", "{t}[0] = {t}[-1]", "{t}.fill_(0.25)"])
           .format(t=view, k=k))  # fmt: skip
    if b.number(0, 1):
        b.line(f"{y}.add_({v.name})")
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
    low, past = f"torch.finfo({v.name}.dtype).min", f"({pos_q}[:, None] >= {pos_k})"

    def level() -> str:
        return b.pick([low, "-1e9", "-1e4", "torch.finfo(torch.float32).min"])

    # Rows that a finite mask forbids entirely; left padding and the causal flag, as transformers writes them (added,
    # both together are minus infinity).
    options += [
        lambda: f"attn_mask={_forbidding(b.input(('B', '1', sq, sk), 'blocked', 'm'), level(), v)}",
        lambda: f"attn_mask={_forbidding(b.input(('B', 'H', '1', sk), 'blocked', 'm'), level(), v)}",
        lambda: f"attn_mask={_forbidding(f'({past} & {_keys(b, sk)})', level(), v)}",
        lambda: f"attn_mask={_forbidding(past, level(), v)} + {_forbidding(_keys(b, sk), level(), v)}",
    ]
    if sq == sk:
        options += [
            lambda: "is_causal=True",
            lambda: f"attn_mask=({pos_q}[:, None] - {pos_k}[None]).abs() < 3",
            lambda: f"attn_mask=torch.ones({v.name}.shape[1], {v.name}.shape[1], dtype=torch.bool).tril()",
        ]
    text = b.pick(options)()
    return f", {text}" if text else ""


def _forbidding(allowed: str, level: str, v: Var) -> str:
    """A mask that adds ``level``, a number or an expression, where ``allowed`` is false."""
    return f"torch.zeros((), dtype={v.name}.dtype).where({allowed}, {level})"


def _keys(b: Builder, keys: str) -> str:
    return f"{b.input(('B', keys), 'blocked', 'm')}[:, None, None, :]"


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


@instruction
def experts(b: Builder) -> None:
    """A mixture of experts: gates by softmax or by an input's choice, all computed or dispatched by index."""
    v = b.canonical()
    b.sizes["E"] = 3
    w = b.input(("E", "C", "C"))
    form = b.pick(["gates", "one_hot", "dispatch", "mask"])
    if form == "gates":
        gates = b.let(f"F.linear({v.name}, {b.input(('E', 'C'))}).softmax(-1)")
        b.emit(f"{v.name} + torch.einsum('bse,bsc,ecd->bsd', {gates}, {v.name}, {w}) / {b.size('C')}", v.dims)
        return
    chosen = b.input(("B", v.seq), "ids", "ids", bound=3)
    if form == "one_hot":
        gates = b.let(f"F.one_hot({chosen}, 3).to({v.name}.dtype)")
        b.emit(f"torch.einsum('bse,bsc,ecd->bsd', {gates}, {v.name}, {w}) / {b.size('C')}", v.dims)
    elif form == "mask":
        names = [b.let(f"torch.where(({chosen} == {e})[..., None], {v.name} @ {w}[{e}], 0.0)") for e in range(3)]
        b.emit(f"{' + '.join(names)}", v.dims)
    else:
        flat, order = b.let(f"{v.name}.flatten(0, 1)"), b.let(f"{chosen}.flatten().argsort(stable=True)")
        mixed = b.let(f"{flat}[{order}] @ {w}[0] * (1 + {chosen}.flatten()[{order}])[:, None]")
        b.emit(f"torch.zeros_like({flat}).index_add(0, {order}, {mixed}).view({v.name}.shape)", v.dims)


# --- losses ----------------------------------------------------------------------------------------------------------


@instruction
def loss(b: Builder) -> None:
    """Over tokens, with ignored targets; the causal shift inside; means over masked tokens."""
    v = b.canonical()
    n = v.name
    form = b.pick([
        "F.cross_entropy({v}.flatten(0, 1), {ids}.flatten())",
        "F.cross_entropy({v}.transpose(1, 2), {ids}, label_smoothing=0.1)",
        "F.cross_entropy({v}[:, :-1].flatten(0, 1), {ids}[:, 1:].flatten())",
        "F.cross_entropy({v}.view(-1, {c}), F.pad({ids}, (0, 1), value=-100)[..., 1:].flatten(), reduction='sum')",
        "F.cross_entropy({v}.flatten(0, 1), {ids}.flatten(), weight=torch.rand_like({v}[0, 0]) * 0 + 0.5)",
        "F.nll_loss({v}.log_softmax(-1).transpose(1, 2), {ids}, reduction='none').sum() / ({ids} != -100).sum()",
        "F.mse_loss({v}, {other})",
        "F.smooth_l1_loss({v}, {other}.detach(), reduction='sum') / {v}.shape[1]",
        "F.l1_loss({v}, torch.tanh({other}))",
        "F.kl_div({v}.log_softmax(-1), {other}.softmax(-1), reduction='batchmean')",
        "F.binary_cross_entropy_with_logits({v}, {other}.sigmoid().detach())",
        "({v}.square() * {m}[..., None]).sum() / {m}.sum()",
        "F.cosine_similarity({v}, {other}, dim=-1).mean()",
        "F.huber_loss({v}, {other}, reduction='none').mean((1, 2))[0]",
    ])  # fmt: skip
    made = {"other": n}
    if "{ids}" in form:
        made["ids"] = b.input(("B", v.seq), "targets", "ids", bound=b.size("C"))
    if "{m}" in form:
        made["m"] = b.input(("B", v.seq), "mask", "m")
    if "{other}" in form:
        made["other"] = b.input(("B", v.seq, "C")) if b.number(0, 1) else f"({b.canonical(v.seq).name} * 0.5)"
    b.emit(form.format(v=n, c=b.size("C"), **made), ())


# --- annotations in the middle ---------------------------------------------------------------------------------------


@instruction
def annotated(b: Builder) -> None:
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    kind = b.pick(["gather", "shard"])
    b.emit(f'annotate({v.name}, "{kind}", {v.at(v.seq)}, -1, "{v.name}")', v.dims)
