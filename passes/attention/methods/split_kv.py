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

import operator
from collections.abc import Iterator

from torch.fx import Node

from fxsp.kernels.attention.split_kv import packed_width
from fxsp.kernels.counts import reduced_bytes
from fxsp.kernels.ops import fxsp_ops
from fxsp.machine import Travel
from fxsp.passes.attention.attend import Attend
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.method import Method
from fxsp.passes.attention.question import Question
from fxsp.types import Used, as_length, product

__all__ = ["Merged"]


class Merged(Method):
    """Legal where blocks of the attention can be merged, and queries are whole."""

    name = "merged"
    beyond_degrees = True
    beside_keys = Used()

    def ways(self, question: Question) -> Iterator[Way]:
        if question.queries is not None or question.keys is None:
            return
        like, size, (*lead, rows, width) = question.like, question.size, question.q
        packed = as_length(packed_width(question.v[-1], like.dtype))
        sent = product((size - 1, *lead, rows, packed, like.element_size()))
        back = reduced_bytes(product((*lead, rows, width)), like.dtype, size) if question.program.training else None
        travels = (Travel("all_gather", size, 1, sent), Travel("all_reduce", size, 1 if back else 0, back or 0))
        yield Way(self.name, sent, back, refusal=question.blocks_refusal, travels=travels)

    def lower(self, x: Attend) -> Node:
        build, keys, ranks = x.build, x.keys, x.build.ranks
        both = build.call(
            fxsp_ops.merged_attention.default, x.q, x.k, x.v, x.mask, build.sizes(keys.lengths),
            list(keys.whole), bool(x.causal), x.args.get("scale"), ranks.rank, ranks.size, ranks.group,
            *build.placed(keys), **x.exact,
        )  # fmt: skip
        why = "outputs of an attention to each rank's own keys, merged by their log-sum-exps"
        build.record("all_gather", both, x.choice.way.sent, why)
        return build.call(operator.getitem, both, 0)
