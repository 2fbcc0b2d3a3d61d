"""infer: what is split where no plan says it.

Demands start at the queries of attentions and, for work that these leave whole, at the rows of linear layers and
convolutions (:mod:`fxsp.passes.infer.demand`).  The values where they end are candidates, few of them: all that do not
contradict one another, then without those that do not pay, one kind after the other.  Each is propagated and priced
(:mod:`fxsp.passes.infer.price`); the cheapest is written into the graph as the plan would have been, as annotations.  A
wrong guess costs time, and no value.

Output, for a model of one input and attentions in between::

    %hidden   : placeholder[target=hidden]
    %annotate : call_function[target=fxsp.annotate.default](args = (%hidden, shard, 1, -1, <root>[hidden]: ...))

Equal graphs give equal candidates, prices and choices on all ranks: only the graph is read.  No guard is added.

After this pass the graph has annotations, or it runs whole because splitting it would not pay, which the report says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from fxsp.errors import RunsWhole, UnsupportedError
from fxsp.kernels.ops import fxsp_ops
from fxsp.lengths import hint
from fxsp.passes.base import Program
from fxsp.passes.graph import mark, shape_of
from fxsp.passes.infer.demand import Birth, Births, Seed, seeds_of_attentions, seeds_of_work
from fxsp.passes.infer.naming import Named, Namer
from fxsp.passes.infer.price import Price, Pricing
from fxsp.passes.propagate.propagate import Propagate, is_annotate
from fxsp.report import PlanRecord
from fxsp.source import module_path

__all__ = ["Infer"]

#: So many candidates are priced at most, whatever the graph.
_MOST = 10
#: Work that is whole is looked at again if it is more than this part of all.
_REST = 0.05
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Infer:
    """After this pass a graph without a plan is annotated, or runs whole."""

    name: str = "infer"

    def apply(self, program: Program) -> Program:
        captured, program.captured = program.captured, None  # it holds the model
        if captured is None:
            return program
        search = _Search(program)
        best = search.run()
        namer = Namer(captured, program.graph)
        if best is None or best.price.seconds >= search.whole.seconds:
            raise RunsWhole(_not_worth(search, best), remedy=None)
        search.write(best.births, namer)
        report = program.report
        named = {birth: namer.name(birth) for birth in best.births}
        for birth in best.births:
            report.plan.append(PlanRecord(f"{named[birth]}", True, search.reason(birth)))
        report.inferred = [entry for one in named.values() if (entry := one.entry) is not None]
        report.notes.append(f"the plan is inferred: {best.price}")
        report.notes.extend(search.alternatives(best, named))
        program.gm.recompile()
        return program


@dataclass(frozen=True)
class _Candidate:
    births: tuple[Birth, ...]
    price: Price


@dataclass
class _Search:
    program: Program
    births: Births = field(init=False)
    pricing: Pricing = field(init=False)
    #: What each birth is for.
    seeds: dict[Birth, list[Seed]] = field(default_factory=dict)
    tried: dict[frozenset[Birth], _Candidate | None] = field(default_factory=dict)
    refusal: str = ""

    def __post_init__(self) -> None:
        self.births = Births(self.program)
        self.pricing = Pricing(self.program)
        self.whole = self.pricing.undivided()

    def run(self) -> _Candidate | None:
        """The cheapest candidate; None where there is none."""
        found = self.births.of(seeds_of_attentions(self.program, self.pricing.work))
        best = self._best(None, (self.price(births) for births in _compatible(self._remember(found))))
        rest = self._rest(best)
        if rest:
            found = self.births.of(seeds_of_work(rest, self.pricing.work))
            given = () if best is None else best.births
            best = self._best(best, (self.price((*given, *b)) for b in _compatible(self._remember(found), given)))
        return None if best is None else self._without_idle(best)

    def _remember(self, found: dict[Seed, tuple[Birth, ...]]) -> dict[Seed, tuple[Birth, ...]]:
        for seed, births in found.items():
            for birth in births:
                self.seeds.setdefault(birth, []).append(seed)
        return found

    def _rest(self, best: _Candidate | None) -> list[Node]:
        """The calls that do most of what is whole."""
        if best is None:
            whole = sorted(((work, node) for node, work in self.pricing.works.items() if work), key=lambda x: -x[0])
        else:
            self.price(best.births, anew=True)
            whole = self.pricing.whole
        most = sum(work for work, _ in whole)
        return [node for _, node in whole] if most > _REST * max(self.whole.total, 1) else []

    def _without_idle(self, best: _Candidate) -> _Candidate:
        """Without the kinds of births that do not pay, those of few tokens first."""
        kinds: dict[tuple[object, ...], list[Birth]] = {}
        for birth in best.births:
            kinds.setdefault(_kind(birth), []).append(birth)
        for kind in sorted(kinds.values(), key=lambda births: births[0].length):
            if len(kinds) == 1 or len(self.tried) >= _MOST:
                break
            left = tuple(b for b in best.births if b not in kind)
            without = self.price(left) if left else None
            if without is not None and without.price.seconds <= best.price.seconds:
                best = without
        return best

    def _best(self, best: _Candidate | None, candidates: Iterable[_Candidate | None]) -> _Candidate | None:
        for one in candidates:
            if one is not None and (best is None or one.price.seconds < best.price.seconds):
                best = one
        return best

    def price(self, births: Sequence[Birth], *, anew: bool = False) -> _Candidate | None:
        """Propagate and price; None where it cannot be compiled."""
        key = frozenset(births)
        if anew or key not in self.tried:
            self.write(births)
            try:
                Propagate().apply(self.program)
                self.tried[key] = _Candidate(tuple(dict.fromkeys(births)), self.pricing.price())
            except UnsupportedError as error:
                self.refusal, self.tried[key] = str(error), None
            self.erase()
        return self.tried[key]

    def write(self, births: Sequence[Birth], namer: Namer | None = None) -> None:
        """Annotate the values."""
        graph = self.program.graph
        inputs = graph.find_nodes(op="placeholder")
        for birth in births:
            node = birth.node
            place = inputs[-1] if node.op == "placeholder" else node
            with graph.inserting_after(place):
                entry = "inferred" if namer is None else str(namer.name(birth))
                new = graph.call_function(fxsp_ops.annotate.default, (node, "shard", birth.dim, -1, entry))
            new.meta.update({k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")})
            for user in list(node.users):
                if user is not new and user.op != "output":
                    user.replace_input_with(node, new)
        self.program.unfused = None

    def erase(self) -> None:
        """Take the annotations away."""
        graph = self.program.graph
        for node in list(graph.nodes):
            if is_annotate(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                graph.erase_node(node)
        self.program.unfused = None

    def reason(self, birth: Birth) -> str:
        """``[1, 24, 64] along 1: queries of 4 attentions in blocks.*, born in patch_embed``."""
        asking: dict[str, dict[Node, None]] = {}
        for seed in self.seeds[birth]:
            asking.setdefault(seed.what, {})[seed.of] = None
        parts = []
        for what, nodes in asking.items():
            noun = "operator" if what == "rows" else "attention"
            places = list(dict.fromkeys(_NUMBER.sub("*", module_path(node)) for node in nodes))
            where = ", ".join(place or "the root" for place in places[:3]) + (", ..." if len(places) > 3 else "")
            parts.append(f"{what} of {len(nodes)} {noun}{'s' if len(nodes) > 1 else ''} in {where}")
        born = "an input" if birth.node.op == "placeholder" else module_path(birth.node) or "the root"
        shape = ", ".join(str(n) for n in shape_of(birth.node))
        return f"[{shape}] along {birth.dim}: {' and '.join(parts)}, born in {born}"

    def alternatives(self, best: _Candidate, named: dict[Birth, Named]) -> list[str]:
        """What the others would have cost."""
        found = []
        for one in self.tried.values():
            if one is None or set(one.births) == set(best.births):
                continue
            more = [str(_short(b, named)) for b in one.births if b not in best.births]
            less = [str(_short(b, named)) for b in best.births if b not in one.births]
            texts = [
                f"with {', '.join(more[:3])} split, too" if more else "",
                f"without {', '.join(less[:3])}" if less else "",
            ]
            slower = one.price.seconds / best.price.seconds if best.price.seconds else 1.0
            found.append(f"the plan {' and '.join(filter(None, texts))}: {one.price}; {slower:.2f} of the time")
        return found


def _short(birth: Birth, named: dict[Birth, Named]) -> str:
    return named[birth].place if birth in named else f"{module_path(birth.node) or 'the root'}: {birth.node.name}"


def _kind(birth: Birth) -> tuple[object, ...]:
    """Births of the repeated blocks of a model are one kind."""
    node = birth.node
    if node.op == "placeholder":
        return (node,)
    return _NUMBER.sub("*", module_path(node)), node.target, birth.dim


def _compatible(found: dict[Seed, tuple[Birth, ...]], given: Sequence[Birth] = ()) -> list[tuple[Birth, ...]]:
    """Sets of births that do not split one value twice: the heaviest seeds first, and for each that did not fit one more."""
    weights: dict[tuple[Birth, ...], int] = {}
    for seed, births in found.items():
        if births:
            weights[births] = weights.get(births, 0) + seed.work
    ordered = sorted(weights, key=lambda births: -weights[births])  # stable: ties in the order of the graph
    taken: list[tuple[Birth, ...]] = []
    first: list[tuple[Birth, ...]] = ordered
    for _ in range(3):
        chosen = {birth.node: birth for birth in given}
        left = []
        for births in first + [b for b in ordered if b not in first]:
            if all(chosen.get(birth.node, birth) == birth for birth in births):
                chosen.update({birth.node: birth for birth in births})
            else:
                left.append(births)
        new = tuple(birth for birth in chosen.values() if birth not in given)
        if new and all(set(new) != set(other) for other in taken):
            taken.append(new)
        first = [births for births in left if not any(set(births) <= set(other) for other in taken)][:1]
        if not first:
            break
    return taken


def _not_worth(search: _Search, best: _Candidate | None) -> str:
    if best is None:
        return (
            f"nothing to split was found: {search.refusal}"
            if search.refusal
            else "there is nothing to split: no attention, linear layer or convolution whose rows come from an input"
        )
    saved = search.whole.operations - best.price.operations
    return (
        f"there is too little to split: {saved} operations less on each rank would cost {best.price.sent} bytes sent "
        f"in {best.price.messages} messages"
    )
