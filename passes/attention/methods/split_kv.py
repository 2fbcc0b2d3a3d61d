"""Attention of whole queries to split keys: few learned queries, or a short sequence, that look at a long one.

========== ============================== ============================================= =============================
method     what each rank does            bytes forward                                 bytes backward
========== ============================== ============================================= =============================
merged     attends to its own keys        (P-1) B H m (E + 2w): outputs, log-sum-exps   2 (P-1)/P B H m D: the sum of
                                                                                        the gradients of the queries
gather_kv  attends to all of them         (P-1) of the local keys and values            none
========== ============================== ============================================= =============================

of ``m`` queries, where ``w`` elements hold a number of fp32, of which a log-sum-exp has two; the output is whole on
every rank.  The cheaper one is taken, unless ``allgather_degree`` asks for gathered keys.  Other degrees speak of
queries that are split.
"""

from __future__ import annotations

from fxsp.kernels.attention.split_kv import packed_width
from fxsp.kernels.counts import reduced_bytes
from fxsp.passes.attention.choose import Question, limited
from fxsp.passes.attention.cost import Candidate, Link
from fxsp.types import as_length, product

__all__ = ["choose_for_whole_queries"]


def choose_for_whole_queries(question: Question) -> tuple[Candidate, tuple[tuple[str, str], ...], str]:
    """As :func:`fxsp.passes.attention.choose.choose`; one way is always legal."""
    program, like = question.program, question.like
    size, (*lead, rows, width), out = program.ranks.size, question.q, question.v[-1]
    sent = product((size - 1, *lead, rows, as_length(packed_width(out, like.dtype)), like.element_size()))
    back = reduced_bytes(product((*lead, rows, width)), like.dtype, size) if program.training else None
    merged = Candidate("merged", 1, 1, sent, back, 1, question.blocks or question.ring_refusal)
    gathered = as_length((size - 1) * question.kv_bytes)
    gather = Candidate("gather_kv", 1, 1, gathered, 0 if program.training else None)
    asked = program.degrees.allgather is not None and program.degrees.allgather > 1
    if not asked:
        gather = limited(question, gather, [merged])
    link = Link.of(like.device.type, program.options.latency, program.options.bandwidth)
    legal = [way for way in (merged, gather) if not way.refusal]
    best = gather if asked else min(legal, key=lambda way: way.seconds(link))
    rejected = tuple((way.name, way.text(link)) for way in (merged, gather) if way is not best)
    return best, rejected, f"{best.cost(link)}; the queries are whole on every rank"
