"""What a report says of an inferred plan: what each entry is for, and what the alternatives would have cost."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch.fx import Node

from fxsp.passes.graph import shape_of
from fxsp.passes.infer.demand import Birth, Seed
from fxsp.passes.infer.naming import Namer
from fxsp.passes.infer.price import Price
from fxsp.source import module_path

__all__ = ["alternatives", "kind_of", "not_worth", "pattern", "reason"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
#: So many alternatives are told.
_SHOWN = 4


def pattern(path: str) -> str:
    """``blocks.*.attn`` of ``blocks.3.attn``."""
    return _NUMBER.sub("*", path)


def kind_of(birth: Birth) -> tuple[object, ...]:
    """Births of the repeated blocks of a model are one kind."""
    node = birth.node
    return (node,) if node.op == "placeholder" else (pattern(module_path(node)), node.target, birth.dim)


def reason(birth: Birth, seeds: list[Seed]) -> str:
    """``[1, 24, 64] along 1: queries of 4 attentions in blocks.*, born in patch_embed``."""
    asking: dict[str, dict[Node, None]] = {}
    for seed in seeds:
        asking.setdefault(seed.what, {})[seed.of] = None
    if "queries" in asking:
        asking.pop("keys", None)
    parts = []
    for what, nodes in asking.items():
        noun = "operator" if what == "rows" else "attention"
        places = list(dict.fromkeys(pattern(module_path(node)) for node in nodes))
        where = ", ".join(place or "the root" for place in places[:3]) + (", ..." if len(places) > 3 else "")
        parts.append(f"{what} of {len(nodes)} {noun}{'s' if len(nodes) > 1 else ''} in {where}")
    born = "an input" if birth.node.op == "placeholder" else f"born in {module_path(birth.node) or 'the root'}"
    return f"[{', '.join(map(str, shape_of(birth.node)))}] along {birth.dim}: {' and '.join(parts)}; {born}"


def alternatives(
    best: tuple[tuple[Birth, ...], Price], others: Iterable[tuple[tuple[Birth, ...], Price]], namer: Namer
) -> list[str]:
    """What other candidates would have cost, the cheapest first."""
    births, price = best
    found: list[str] = []
    for other, cost in sorted(others, key=lambda one: one[1].seconds):
        if set(other) == set(births) or len(found) == _SHOWN:
            continue
        more = dict.fromkeys(namer.place(b) for b in other if b not in births)
        less = dict.fromkeys(namer.place(b) for b in births if b not in other)
        texts = [f"with {_listed(more)} split, too" if more else "", f"without {_listed(less)}" if less else ""]
        time = f"{cost.seconds / price.seconds:.3g} of the time" if price.seconds else ""
        found.append(f"the plan {' and '.join(filter(None, texts))}: {cost}; {time}")
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def not_worth(whole: Price, best: Price | None, refusal: str) -> str:
    """Why nothing is split, with the two numbers that say so."""
    if best is not None:
        saved = whole.operations - best.operations
        return (
            f"there is too little to split: each rank would save {saved} of {whole.operations} operations, and send "
            f"{best.sent} bytes"
        )
    if refusal:
        return f"what would be split cannot be: {refusal}"
    return "there is nothing to split: no attention, linear layer or convolution has rows that come from an input"
