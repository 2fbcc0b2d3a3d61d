"""degrees: those that were asked for and cannot be followed: each such attention is named, with what it does instead.

``ring_degree=2`` asks every attention of split tokens for a ring; an operator whose blocks do not merge, or heads that
do not divide, cannot have it, and something else is done, which is right.  It is said: a note in the report, a warning
for each compile, an error under ``strict``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxsp.errors import StrictError
from fxsp.passes.base import Program
from fxsp.source import place

__all__ = ["Degrees", "note_degree"]


def _asked(program: Program) -> tuple[str, str]:
    """The options as text, and the method that they ask for; empty if none does."""
    degrees = program.degrees
    ulysses, ring, gather = degrees.ulysses, degrees.ring, degrees.allgather
    if gather is not None and gather > 1:
        return f"allgather_degree={gather}", "gather_kv"
    if ulysses is None or ring is None or ulysses * ring == 1:
        return "", ""
    if ring == 1:
        return f"ulysses_degree={ulysses}", "ulysses"
    if ulysses == 1:
        return f"ring_degree={ring}", "ring"
    return f"ulysses_degree={ulysses} and ring_degree={ring}", "hybrid"


def note_degree(
    program: Program, node: Node, method: str, rejected: tuple[tuple[str, str], ...], why: str = ""
) -> None:
    """Remember an attention whose ``method`` is not what the degrees ask for.

    Nothing is asked of one that is local (its keys are whole already), nor of whole queries.
    """
    options, wanted = _asked(program)
    if not options or method.startswith(wanted) or method in ("local", "merged"):
        return
    why = why or next((reason for name, reason in rejected if name.startswith(wanted)), "it is not legal here")
    sentence = f"{options} cannot be followed by {node.target} in {place(node)}: {why}; it runs as {method} instead"
    program.ignored_degrees.append(sentence)


@dataclass(frozen=True)
class Degrees:
    """After this pass the report names every attention that does not follow the degrees; an error under ``strict``."""

    name: str = "degrees"

    def apply(self, program: Program) -> Program:
        sentences = list(dict.fromkeys(program.ignored_degrees))
        if sentences and program.options.strict:
            raise StrictError(
                f"{sentences[0]}. With strict=True this is an error: give other degrees, or none, and the compiler "
                "chooses."
            )
        program.report.notes.extend(sentences)
        options, _ = _asked(program)
        if options and not program.report.attentions:
            program.report.notes.append(f"{options}: there is no attention of split tokens in this graph")
        return program
