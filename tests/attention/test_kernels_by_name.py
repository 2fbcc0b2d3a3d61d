"""Attention by a kernel of ATen that is called by its name: heads are exchanged for it as for any attention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsp
from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.rules.families import overloads

aten = torch.ops.aten
PLAN = {"": {"x": fxsp.SequenceParallelInput(1)}}
FLASH, MATH = "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"


class Model(nn.Module):
    def __init__(self, kernel: str, heads: int = 6, *, mask: bool = False, lse: bool = False, **arguments: Any) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 4)
        self.kernel, self.heads, self.arguments, self.lse = getattr(aten, kernel).default, heads, arguments, lse
        self.mask = mask

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 24 // self.heads)).permute(2, 0, 3, 1, 4).unbind()
        arguments = dict(self.arguments)
        if self.mask:
            arguments["attn_mask"] = torch.arange(x.shape[1]).sin().expand(1, 1, x.shape[1], x.shape[1])
        y, *others = self.kernel(q, k, v, **arguments)
        out = self.out(y.transpose(1, 2).flatten(2))
        return (out, others[0].sum()) if self.lse else out


def report_of(model: nn.Module, size: int, **options: Any) -> fxsp.Explanation:
    with torch.no_grad():
        return fxsp.explain(model, torch.randn(2, 9, 24), world_size=size, plan=PLAN, options=options)


@pytest.mark.parametrize("kernel", [FLASH, MATH])
@pytest.mark.parametrize(
    ("heads", "size", "arguments", "method"),
    [
        (6, 2, {}, "ulysses"),
        (6, 3, {"is_causal": True, "scale": 0.3}, "ulysses"),
        (6, 2, {"mask": True}, "ulysses"),
        (3, 2, {}, "gather_kv"),
        (3, 2, {"mask": True}, "gather_kv"),
    ],
    ids=str,
)
def test_values_gradients_and_the_exchange(kernel: str, heads: int, size: int, arguments: Any, method: str) -> None:
    torch.manual_seed(0)
    model = Model(kernel, heads, **arguments)
    report = report_of(model, size)
    assert [a.method for a in report.attentions] == [method]
    assert not [g for g in report.implicit_gathers if g.kind == "implicit"]
    assert report.communication["all_to_all" if method == "ulysses" else "all_gather"][0] == 2
    evidence = fxsp.verify(model, torch.randn(2, 9, 24), world_size=size, options={"plan": PLAN, "strict": True})
    assert evidence.ok, str(evidence)


def test_what_it_cannot_do_is_said() -> None:
    """Three heads on two ranks, and a causal flag that no mask of this kernel can stand for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsp.ImplicitGatherWarning)
        report = report_of(Model(FLASH, 3, is_causal=True), 2)
    assert {g.op for g in report.implicit_gathers if g.kind == "implicit"} == {f"aten.{FLASH}.default"}
    assert "is causal, and takes no mask that says so" in report.implicit_gathers[0].reason


def test_another_result_that_is_used_is_gathered_for() -> None:
    model = Model(FLASH, lse=True)
    report = report_of(model, 2)
    assert "its result 1 is used" in next(g.reason for g in report.implicit_gathers if g.kind == "implicit")
    evidence = fxsp.verify(model, torch.randn(2, 9, 24), world_size=2, options={"plan": PLAN})
    assert evidence.ok, str(evidence)


def test_a_ring_of_it_is_refused_with_a_word() -> None:
    report = report_of(Model(FLASH), 2, ring_degree=2)
    assert any("ring_degree=2 cannot be followed" in n for n in report.to_dict()["graphs"][0]["notes"])


def test_every_kernel_of_this_torch_is_known() -> None:
    names = {op._schema.name.removeprefix("aten::") for op in ATTENTION_OPS if op.namespace == "aten"}
    for kind in (
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "attention_math",
        "flash_attention_for_cpu",
    ):
        for op in overloads(f"_scaled_dot_product_{kind}"):
            assert op._schema.name.removeprefix("aten::") in names
