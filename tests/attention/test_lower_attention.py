"""After lowering nothing is left to lower, and what is written is known to the passes that follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fxsp.config import Options
from fxsp.passes.attention.decide import distributed_attention
from fxsp.passes.base import Program
from fxsp.passes.pipeline import PIPELINE, STAGES, Runner, partition_program
from fxsp.types import Ranks
from tracing import shard, trace

SDPA = torch.nn.functional.scaled_dot_product_attention
#: Method -> degrees for four ranks, and what is sent.
WAYS = {
    "ulysses": ({"ulysses_degree": 4, "ring_degree": 1}, {"all_to_all"}),
    "ring": ({"ring_degree": 4}, {"ring_attention"}),
    "gather_kv": ({"allgather_degree": 4}, {"gather_used"}),
}


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return SDPA(*(shard(x, 2) for x in (q, k, v)))


def _before_and_after(options: Options) -> tuple[list[Node], Program]:
    """The attentions that are not lowered yet, and the program."""
    left: list[Node] = []

    def observe(stage: str, program: Program) -> None:
        if stage == STAGES[STAGES.index("lower_attention") - 1]:
            left.extend(n for n in program.graph.nodes if n.target is distributed_attention)

    gm = trace(_attend, *(torch.randn(1, 4, 9, 8) for _ in "qkv"))
    return left, partition_program(Program(gm, Ranks(0, 4, "simulated"), options=options), Runner(observe, check=True))


@pytest.mark.parametrize("method", WAYS)
def test_attention_is_local_and_its_collectives_are_nodes(method: str) -> None:
    degrees, kinds = WAYS[method]
    before, program = _before_and_after(Options(**degrees))
    assert len(before) == 1
    assert not [n for n in program.graph.nodes if n.target is distributed_attention]
    names = {n.target._opname for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert kinds <= names
    (record,) = program.report.attentions
    assert record.method == method


def test_a_graph_without_attention_is_left_alone() -> None:
    lower = next(stage.run for stage in PIPELINE if stage.name == "lower_attention")
    program = Program(trace(torch.relu, torch.randn(2, 3)), Ranks(0, 2, "simulated"))
    before = [n.format_node() for n in program.graph.nodes]
    assert [n.format_node() for n in lower.apply(program).graph.nodes] == before
