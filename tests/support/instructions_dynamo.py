"""Instructions of random programs that only Dynamo sees: checkpoints, grad modes, functions that are not opened."""

from __future__ import annotations

import math

from programs import INSTRUCTIONS, OFTEN, SLOW, Builder, Var, instruction


@instruction
def piece(b: Builder) -> None:
    """A few instructions as the body of a checkpoint, or without gradients."""
    if b.inside:
        return
    before, known = len(b.lines), len(b.values)
    b.inside = True
    names = [name for name in INSTRUCTIONS for _ in range(OFTEN.get(name, 1)) if name not in SLOW]
    for _ in range(b.number(1, 4)):
        INSTRUCTIONS[b.pick(names)](b)
    b.inside = False
    made = b.values[known:]
    body, b.lines[before:] = b.lines[before:], []
    if not made:
        b.lines += body
        return
    b.dynamo = True
    if b.number(0, 3) == 3:
        b.line("with torch.no_grad():")
        b.lines += [f"    {line}" for line in body]
        return
    name, results = b.fresh("piece"), ", ".join(v.name for v in made)
    b.line(f"def {name}():")
    b.lines += [f"    {line}" for line in [*body, f"return {results}"]]
    b.line(f"{results} = checkpoint({name}, use_reentrant=False)")


@instruction
def opaque(b: Builder) -> None:
    """Functions that run whole: transforms, a gradient of one's own, a branch."""
    if b.inside:
        return
    v = b.canonical()
    b.dynamo = True
    form = b.pick([
        "torch.func.vmap(lambda r: r.softmax(0) * r.sum())({v})",
        "torch.func.grad(lambda z: (z.cumsum(1) ** 2).sum())({v}) / {v}.shape[1]",
        "torch.func.jvp(lambda z: z.sin().cumsum(1), ({v},), ({v}.cos(),))[1]",
        "Own.apply({v})",
    ])  # fmt: skip
    b.emit(form.format(v=v.name), v.dims)


@instruction
def subclass(b: Builder) -> None:
    """A constant weight that is a tensor subclass, used by a linear layer or a product."""
    v = b.canonical()
    b.dynamo = True
    form = b.pick(["F.linear({v}, {w})", "{v} @ {w}", "{v} + {w}.abs().mean(0)"])
    b.emit(form.format(v=v.name, w=f"QUANTIZED[{b.size('C')}]") + f" / {math.sqrt(b.size('C')):.4g}", v.dims)


@instruction
def write(b: Builder) -> None:
    """A write to a value that the program goes on with, an input perhaps."""
    if b.inside:
        return
    v = b.value(lambda v: v.seq is not None)
    if v is None:
        return
    b.dynamo = True
    i = v.at(v.seq)
    form = b.pick(
        ["{v}.mul_(0.5)", "{v}.add_(1)", "{v}[{e}:1] = 0.25", "{v}.copy_({v}.flip({i}))", "{v}[..., -1].neg_()"]
    )
    b.line(form.format(v=v.name, i=i, e=":, " * i))
    b.values.append(Var(v.name, v.dims))
