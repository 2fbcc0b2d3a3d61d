"""What the compiler did, as data: plan entries, attentions, collectives, implicit gathers.

One :class:`Report` belongs to one compiled graph.  Passes append records; printing lives in ``fxsp.inspection``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fxsp.types import Sequence, as_length

__all__ = [
    "AttentionRecord",
    "CollectiveRecord",
    "GatherRecord",
    "Memory",
    "Move",
    "PlanRecord",
    "Report",
    "tell_with",
    "totals",
]


@dataclass(frozen=True)
class PlanRecord:
    """One plan entry: whether it applied to this graph, and if not, why."""

    entry: str
    applied: bool
    detail: str = ""
    #: It does not apply because its value is one token: there is nothing to split, and nothing to mend.
    single: bool = False


@dataclass(frozen=True)
class GatherRecord:
    """A sharded value that was made whole because an operator needs all its tokens."""

    op: str
    module: str
    source: str
    reason: str
    #: Bytes that each rank receives.
    bytes: Any
    #: ``"implicit"`` (an operator needs it), or ``"output"`` (a graph output has its global shape).
    kind: str = "implicit"
    #: Of an output: what the program calls it (``"logits"``, ``"cache.layers[0].keys"``); ``""`` if that is not known.
    name: str = ""
    #: The value of the graph, as the printed stages up to ``zigzag`` name it.
    value: str = ""

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        at = f" ({self.source})" if self.source else ""
        op = f"output {self.name}" if self.name else self.op
        return f"{op}{where}{at}: {self.reason}; {self.bytes} bytes per rank"


@dataclass(frozen=True)
class Move:
    """One step of an attention's exchange through device memory, by the table of memory_traffic.py."""

    op: str
    value: str
    #: What is moved, of ``"qkvo"``.
    tensors: str
    #: Passes over memory: reads and writes of all elements of one tensor.
    reads: int
    writes: int
    #: Read and written, on a rank, at the lengths that were traced.
    bytes: int
    #: The tokens whose number the bytes grow with, ``"local"`` rows with pads or ``"real"`` ones; None: neither.
    tokens: Sequence | None = None
    rows: str = "local"


@dataclass(frozen=True)
class Memory:
    """What one attention moves through device memory between the QKV and the output projection, forward, per rank.

    The attention itself is not in it, nor is what makes q, k and v of the projection (``AttentionRecord.producers``).
    """

    moves: tuple[Move, ...] = ()

    @property
    def passes(self) -> int:
        """Reads and writes of all elements of one of q, k, v and o."""
        return sum(move.reads + move.writes for move in self.moves)

    @property
    def bytes(self) -> int:
        return sum(move.bytes for move in self.moves)

    def of(self, *ops: str) -> int:
        """Passes of some operators."""
        return sum(move.reads + move.writes for move in self.moves if move.op in ops)


@dataclass(eq=False)
class AttentionRecord:
    """One attention: the method chosen, and the methods rejected with the reason; passes fill in what they find out."""

    module: str
    source: str
    method: str = ""
    #: Bytes that each rank sends, forward.
    bytes: Any = 0
    rejected: tuple[tuple[str, str], ...] = ()
    detail: str = ""
    #: What it moves through device memory; None where that is not known (eager hooks).
    memory: Memory | None = None
    #: What makes q, k, v of the projections (``"q, k: rms_norm, rotary (interleaved)"``), left to Inductor to fuse.
    producers: tuple[str, ...] = ()


@dataclass(frozen=True)
class CollectiveRecord:
    """One collective of the partitioned program: of its forward pass, or of its backward pass."""

    kind: str
    value: str
    module: str
    #: Bytes that each rank sends.
    bytes: Any
    reason: str = ""
    source: str = ""
    #: The tokens that travel (None: the bytes do not depend on the length of a sequence that the plan names).
    tokens: Sequence | None = None
    #: Among how many consecutive ranks it is (0: all of them).
    members: int = 0


@dataclass
class Report:
    """All that is known about one partitioned graph."""

    #: The class of the root module: the place of what belongs to no submodule.
    root: str = "a function"
    plan: list[PlanRecord] = field(default_factory=list)
    implicit_gathers: list[GatherRecord] = field(default_factory=list)
    attentions: list[AttentionRecord] = field(default_factory=list)
    collectives: list[CollectiveRecord] = field(default_factory=list)
    #: What the gradients will need, if gradients may be asked for; ``value`` is the one whose gradient travels.
    backward: list[CollectiveRecord] = field(default_factory=list)
    #: What the program calls the outputs of the graph, by position; ``""`` where that is not known.
    outputs: list[str] = field(default_factory=list)
    #: Positions of outputs that are gathered because the graph ends, and how they were split.
    split_outputs: list[tuple[int, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: The entries of the plan that was found, where it was not given (:class:`~fxsp.plan.PlanEntry`); None: it was.
    inferred: list[Any] | None = None
    #: Name of a stage -> the graph after it, printed; filled only for the stages that were asked for.
    stages: dict[str, str] = field(default_factory=dict)
    #: Name of a stage -> seconds it took.
    timings: dict[str, float] = field(default_factory=dict)
    #: Why the graph runs whole on every rank, if it does.
    unsharded: str = ""
    #: The share of the graph's work that runs on shards, of 1; None: it was not partitioned.
    share: float | None = None

    def __str__(self) -> str:
        """What ``fxsp.inspection.report_text.format_report`` says of it."""
        return _tell(self)

    def note(self, sentence: str) -> None:
        """Say it, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def runs_whole(self, why: str) -> None:
        """The graph stays as it was: what was planned to be sent is not."""
        self.unsharded = why
        for planned in (self.implicit_gathers, self.attentions, self.collectives, self.backward):
            planned.clear()

    @property
    def communication(self) -> dict[str, tuple[int, Any]]:
        """Kind of collective -> how many, and the bytes that a rank sends in them, forward and (in training) backward.

        Bytes are a number, or a formula where lengths are symbols.  Gradients of parameters are counted one by one;
        they travel in buckets, in fewer messages.
        """
        return totals((record.kind, record.bytes) for record in (*self.collectives, *self.backward))


_tell: Callable[[Report], str] = repr


def tell_with(format_report: Callable[[Report], str]) -> None:
    """Have ``str(report)`` be what this says of it."""
    global _tell  # noqa: PLW0603  (what tells lies above what is told)
    _tell = format_report


def totals(sent: Iterable[tuple[str, Any]]) -> dict[str, tuple[int, Any]]:
    """Of collectives, each its kind and its bytes: kind -> how many, and the bytes of all of them."""
    found: dict[str, tuple[int, Any]] = {}
    for kind, size in sent:
        number, before = found.get(kind, (0, 0))
        found[kind] = number + 1, as_length(before + size)
    return found
