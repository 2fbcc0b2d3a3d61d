"""degrees: those that were asked for and cannot be followed: each such attention is named, with what it does instead.

``ring_degree=2`` asks every attention of split tokens for a ring; an operator whose blocks do not merge, or heads that
do not divide, cannot have it, and something else is done, which is right.  It is said: a note in the report, a warning
for each compile, an error under ``strict``.
"""

from __future__ import annotations

from torch.fx import Node

from fxsp.config import AttentionDegrees
from fxsp.errors import StrictError
from fxsp.passes.attention.methods import METHODS
from fxsp.passes.base import Pass, Program
from fxsp.source import place

__all__ = ["Degrees", "asked_of", "note_degree"]


def asked_of(degrees: AttentionDegrees) -> tuple[str, str]:
    """The options as text, and the method that they ask for; empty if none does."""
    return next(((text, method.name) for method in METHODS.values() if (text := method.asked(degrees))), ("", ""))


def note_degree(
    program: Program, node: Node, method: str, rejected: tuple[tuple[str, str], ...], why: str = ""
) -> None:
    """Remember an attention whose ``method`` is not what the degrees ask for.

    Nothing is asked of one that is local (its keys are whole already), nor of whole queries.
    """
    options, wanted = asked_of(program.degrees)
    if not options or method.startswith(wanted) or (method in METHODS and METHODS[method].beyond_degrees):
        return
    why = why or next((reason for name, reason in rejected if name.startswith(wanted)), "it is not legal here")
    sentence = f"{options} cannot be followed by {node.target} in {place(node)}: {why}; it runs as {method} instead"
    program.ignored_degrees.append(sentence)


class Degrees(Pass):
    """After this pass the report names every attention that does not follow the degrees; an error under ``strict``."""

    def apply(self, program: Program) -> Program:
        sentences = list(dict.fromkeys(program.ignored_degrees))
        if sentences and program.options.strict:
            raise StrictError(
                f"{sentences[0]}. With strict=True this is an error: give other degrees, or none, and the compiler "
                "chooses."
            )
        program.report.notes.extend(sentences)
        options, _ = asked_of(program.degrees)
        if options and not program.report.attentions:
            program.report.notes.append(f"{options}: there is no attention of split tokens in this graph")
        return program
