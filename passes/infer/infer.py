"""infer: what is split where no plan says it.

Demands start at the queries of attentions and, for work that these leave whole, at the rows of linear layers and
convolutions (:mod:`fxsp.passes.infer.demand`).  The values where they end are candidates, few of them: all that do not
contradict one another, then without those that do not pay, one kind after the other.  Each is propagated and priced
(:mod:`fxsp.passes.infer.price`); the cheapest is written into the graph as a plan would have been, as annotations.  A
wrong guess costs time, and no value.

Output, for a model of one input and attentions in between::

    %hidden   : placeholder[target=hidden]
    %annotate : call_function[target=fxsp.annotate.default](args = (%hidden, shard, 1, -1, <root>[hidden]: ...))
    ...
    %linear     : call_function[target=aten.linear.default](args = (%add, %weight))
    %annotate_1 : call_function[target=fxsp.annotate.default](args = (%linear, gather, 1, -1, proj_out: ...))

The second is where an operator needs all tokens and nothing of weight comes afterwards: a picture is put together.

A graph stays whole where a rank would send more bytes than it would save operations: no machine gains by that.

Equal graphs give equal candidates, prices and choices on all ranks: only the graph is read.  No guard is added.

After this pass the graph has annotations, or it runs whole because splitting it would not pay, which the report says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from fxsp.errors import RunsWhole, UnsupportedError
from fxsp.kernels.ops import fxsp_ops
from fxsp.passes.base import Pass, Program
from fxsp.passes.graph import facts, is_split, mark, reachable
from fxsp.passes.infer.demand import Birth, Births, Seed, seeds_of_attentions, seeds_of_work
from fxsp.passes.infer.naming import Namer
from fxsp.passes.infer.price import Price, Pricing
from fxsp.passes.infer.reasons import alternatives, kind_of, not_worth, reason
from fxsp.passes.propagate.propagate import Propagate, is_annotate
from fxsp.report import PlanRecord

__all__ = ["Candidate", "Infer"]

#: So many candidates are priced at most, whatever the graph.
_MOST = 14
#: Work that is whole is looked at again if it is more than this part of all.
_REST = 0.05
#: A rank has an even share of the work if it does at most so much of it, times the number of ranks.
_EVEN = 1.1
#: So often it is looked at what is whole.
_ROUNDS = 2
#: An entry of the plan has to save work, or this part of the time.
_PAYS = 0.01


@dataclass(frozen=True)
class Infer(Pass):
    """After this pass a graph without a plan is annotated, or runs whole."""

    #: Split what can be split, whether it pays or not: for tests.
    at_any_price: bool = False

    def apply(self, program: Program) -> Program:
        captured, program.captured = program.captured, None  # it holds the model
        if not program.inferring or captured is None:
            return program
        search = _Search(program)
        best = search.run()
        saved = 0 if best is None else search.whole.operations - best.price.operations
        if best is None or (saved <= best.price.sent and not self.at_any_price):
            raise RunsWhole(not_worth(search.whole, None if best is None else best.price, search.refusal), remedy=None)
        namer, report = Namer(captured, program.graph), program.report
        ends = search.ends(best)
        search.write(best.births, namer)
        for birth in best.births:
            report.plan.append(PlanRecord(str(namer.name(birth)), True, reason(birth, search.seeds[birth])))
        for end in ends:
            search.gather(end, namer)
            report.plan.append(PlanRecord(str(namer.name(end, gather=True)), True, "nothing of weight comes after it"))
        report.inferred = [entry for one in namer.names.values() if (entry := one.entry) is not None]
        report.notes.append(f"the plan is inferred: {best.price}")
        others = [(one.births, one.price) for one in search.tried.values() if one is not None]
        report.notes.extend(alternatives((best.births, best.price), others, namer))
        for node in program.graph.nodes:
            if facts(node).spelled:
                mark(node, spelled=())  # Dynamo's graph is not kept
        program.gm.recompile()
        return program


@dataclass(frozen=True)
class Candidate:
    """Values to split, and what that costs."""

    births: tuple[Birth, ...]
    price: Price


@dataclass
class _Search:
    """Looks for the cheapest candidate; the graph is as it was between any two of its methods but ``write``."""

    program: Program
    births: Births = field(init=False)
    pricing: Pricing = field(init=False)
    #: What each birth is for.
    seeds: dict[Birth, list[Seed]] = field(default_factory=dict)
    tried: dict[frozenset[Birth], Candidate | None] = field(default_factory=dict)
    #: Candidate -> values that it gathers, and calls that do all of their work on every rank, the most work first.
    gathered: dict[frozenset[Birth], list[tuple[Node, int]]] = field(default_factory=dict)
    rest: dict[frozenset[Birth], list[tuple[int, Node]]] = field(default_factory=dict)
    #: Why a candidate cannot be compiled.
    refusal: str = ""

    def __post_init__(self) -> None:
        self.births = Births(self.program)
        self.pricing = Pricing(self.program)
        self.whole = self.pricing.undivided()

    def run(self) -> Candidate | None:
        """The cheapest candidate; None where there is none."""
        found = self._remember(self.births.of(seeds_of_attentions(self.program, self.pricing.work)))
        best = self._cheapest(None, (self.price(births) for births in _compatible(found)))
        for _ in range(_ROUNDS):
            whole = self._whole_calls(best)
            if not whole:
                break
            # Where a candidate gathers, what comes afterwards may be split anew.
            if best is not None:
                self.price(best.births, anew=True)
                self.births.met = is_split
            found = self._remember(self.births.of(seeds_of_work(whole, self.pricing.work, self.births.varying)))
            self.erase()
            given = () if best is None else best.births
            before = best
            best = self._cheapest(best, (self.price(_joined(given, more)) for more in _compatible(found, given)))
            if best is before:
                break
        return None if best is None else self._without_idle(best)

    def ends(self, best: Candidate) -> list[Birth]:
        """Values that an operator needs whole, with nothing to compute afterwards but views and elementwise maps."""
        works = self.pricing.works
        return [
            Birth(node, dim)
            for node, dim in self.gathered[frozenset(best.births)]
            if not is_annotate(node) and not any(works.get(user) for user in reachable(node.users, lambda m: m.users))
        ]

    def _remember(self, found: dict[Seed, tuple[Birth, ...]]) -> dict[Seed, tuple[Birth, ...]]:
        for seed, births in found.items():
            for birth in births:
                self.seeds.setdefault(birth, []).append(seed)
        return found

    def _whole_calls(self, best: Candidate | None) -> list[Node]:
        """The calls whose work is whole, if that is much."""
        if best is None:
            whole = sorted(((work, node) for node, work in self.pricing.works.items() if work), key=lambda x: -x[0])
        else:
            whole = self.rest[frozenset(best.births)]
        most = sum(work for work, _ in whole)
        return [node for _, node in whole] if most > _REST * max(self.whole.total, 1) else []

    def _without_idle(self, best: Candidate) -> Candidate:
        """Without the kinds of births that do not pay, those of few tokens first, alone or with those before it.

        Together, because what is put together of two sequences is split as long as one of them is.
        """
        kinds: dict[tuple[object, ...], list[Birth]] = {}
        for birth in best.births:
            kinds.setdefault(kind_of(birth), []).append(birth)
        kept: list[Birth] = []
        for kind in sorted(kinds.values(), key=lambda births: births[0].length):
            for idle in (kind, [*kept, *kind]) if kept else (kind,):
                left = tuple(b for b in best.births if b not in idle)
                without = self.price(left) if left and len(self.tried) < _MOST else None
                if without is not None and self._pays_less(without.price, best.price):
                    best, kept = without, [birth for birth in kept if birth not in idle]
                    break
            else:
                kept += kind
        return best

    def _pays_less(self, without: Price, price: Price) -> bool:
        """Whether what is left out did not pay: time is the same, or less is sent and the work is as good as even."""
        idle = without.operations <= price.operations and without.seconds <= price.seconds * (1 + _PAYS)
        even = without.part * self.program.ranks.size <= _EVEN
        return idle or (even and without.sent < price.sent)

    def _cheapest(self, best: Candidate | None, candidates: Iterable[Candidate | None]) -> Candidate | None:
        for one in candidates:
            if one is not None and (best is None or one.price.seconds < best.price.seconds):
                best = one
        return best

    def price(self, births: Sequence[Birth], *, anew: bool = False) -> Candidate | None:
        """Propagate and price; None where it cannot be compiled."""
        key = frozenset(births)
        if anew or key not in self.tried:
            self.write(births)
            try:
                Propagate().apply(self.program)
                self.tried[key] = Candidate(tuple(dict.fromkeys(births)), self.pricing.price())
                self.gathered[key], self.rest[key] = self.pricing.gathered, self.pricing.whole
            except UnsupportedError as error:
                self.refusal, self.tried[key] = str(error), None
            if not anew:
                self.erase()
        return self.tried[key]

    def write(self, births: Sequence[Birth], namer: Namer | None = None) -> None:
        """Annotate the values, instead of those that are annotated."""
        self.erase()
        for birth in births:
            self._annotate(birth, "shard", "inferred" if namer is None else str(namer.name(birth)))

    def gather(self, end: Birth, namer: Namer) -> None:
        """Annotate where the tokens of a value are put together."""
        self._annotate(end, "gather", str(namer.name(end, gather=True)))

    def _annotate(self, at: Birth, kind: str, entry: str) -> None:
        graph, node = self.program.graph, at.node
        place = graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node
        unit = (at.unit,) if at.unit > 1 else ()
        with graph.inserting_after(place):
            new = graph.call_function(fxsp_ops.annotate.default, (node, kind, at.dim, -1, entry, *unit))
        new.meta.update({k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")})
        for user in list(node.users):
            if user is not new and user.op != "output":
                user.replace_input_with(node, new)

    def erase(self) -> None:
        """Take the annotations away."""
        graph = self.program.graph
        for node in graph.find_nodes(op="call_function", target=fxsp_ops.annotate.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        self.program.unfused = None


def _compatible(found: dict[Seed, tuple[Birth, ...]], given: Sequence[Birth] = ()) -> list[tuple[Birth, ...]]:
    """Sets of births that split no value twice: the heaviest seeds first; and those begun with one that did not fit."""
    weights: dict[tuple[Birth, ...], int] = {}
    for seed, births in found.items():
        if births:
            weights[births] = weights.get(births, 0) + seed.work
    ordered = sorted(weights, key=lambda births: -weights[births])  # stable: ties in the order of the graph
    sets: list[tuple[Birth, ...]] = []
    first: list[tuple[Birth, ...]] = []
    for _ in range(3):
        chosen = {birth.node: birth for birth in given}
        left = []
        for births in (*first, *(b for b in ordered if b not in first)):
            both = [_both(chosen.get(birth.node, birth), birth) for birth in births]
            if None in both:
                left.append(births)
            else:
                chosen.update({birth.node: birth for birth in both if birth is not None})
        new = tuple(birth for birth in chosen.values() if birth not in given)
        if new and all(set(new) != set(other) for other in sets):
            sets.append(new)
        single = tuple(dict.fromkeys(replace(birth, unit=1) for birth in new))
        if set(single) != set(new):
            sets.append(single)
        first = [births for births in left if not any(set(births) <= set(other) for other in sets)][:1]
        if not first:
            break
    return sets


def _joined(given: Sequence[Birth], more: Sequence[Birth]) -> tuple[Birth, ...]:
    """Both, each value once."""
    return tuple({birth.node: birth for birth in (*given, *more)}.values())


def _both(a: Birth, b: Birth) -> Birth | None:
    """What meets both demands on one value: the larger unit, if it consists of the smaller ones."""
    if a.dim != b.dim or max(a.unit, b.unit) % min(a.unit, b.unit):
        return None
    return a if a.unit >= b.unit else b
