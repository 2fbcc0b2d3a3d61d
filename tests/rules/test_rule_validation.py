"""Every rule against its operator, for every way of sharding its factors; and that a wrong rule is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxsp.passes.pipeline
from fxsp.passes.attention.operators import ATTENTION_OPS, BANDED, SDPA
from fxsp.passes.base import Program
from fxsp.passes.graph import Call
from fxsp.passes.pipeline import partition_program
from fxsp.passes.rules import decide as decisions
from fxsp.passes.rules.register import REGISTERED
from fxsp.passes.rules.rule import OpRule
from fxsp.passes.rules.table import RULES
from fxsp.types import Ranks, Shard
from lockstep import gradients
from replicated import check_replicated
from rule_recorder import Recorder, Sample, T
from rule_samples import SAMPLES, WHOLE_SAMPLES, elementwise_samples
from rule_validation import Case, cases_of, layouts, problems, rule_for, whole_cases_of
from with_grads import simulate_with_grads

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*reduce argument of torch.scatter:UserWarning"),
    pytest.mark.filterwarnings("ignore:index_reduce.* is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
]
aten = torch.ops.aten
ELEMENTWISE = elementwise_samples()
#: Of the many operators of one rule, those that are tried in every layout.
MANY = {
    "elementwise": {aten.add.Tensor, aten.where.self, aten.masked_fill.Scalar, aten.polar.default},
    "combined": {aten.amax.default, aten.max.dim, aten.argmax.default, aten.logsumexp.default},
    "reduction": {aten.var_mean.correction},
    "last_dims": {aten.avg_pool2d.default, aten.linalg_qr.default},
    "along": {aten.softmax.int, aten.roll.default, aten.sort.default, aten.tril.default, aten.diff.default},
    "convolution": {aten.conv1d.default},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _family(op: Any) -> str:
    return RULES[op].__name__


def _cases(sample: Sample, size: int) -> list[Case]:
    """All cases of the sample; of the less interesting of many operators, half of those in two layouts."""
    if rule_for(sample)[1] is None:
        return list(whole_cases_of(sample, size))
    thorough = sample.op in MANY.get(_family(sample.op), {sample.op})
    cases = list(cases_of(sample, size, thorough=thorough))
    return cases if thorough or len(cases) < 4 else cases[size % 2 :: 2]


def _report(found: list[str]) -> str:
    return f"{len(found)} problems, the first:\n" + "\n".join(found[:8])


def test_every_operator_of_the_table_has_a_sample() -> None:
    # by other tests, in the same process
    registered = (ATTENTION_OPS.keys() - {SDPA, BANDED}) | REGISTERED.keys()
    assert not [str(op) for op in RULES if op not in SAMPLES and op not in ELEMENTWISE and op not in registered]
    assert not [str(op) for op in SAMPLES if op not in RULES], "samples of operators without rule: see WHOLE_SAMPLES"


def test_every_operator_has_a_sample_with_a_rule() -> None:
    """A rule function may decline a call, but not every sample of the operator."""
    assert not [str(op) for op in SAMPLES if all(rule_for(sample)[1] is None for sample in SAMPLES[op])]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("family", sorted({_family(op) for op in SAMPLES}))
def test_rules(family: str, size: int) -> None:
    samples = [sample for op in SAMPLES if _family(op) == family for sample in SAMPLES[op]]
    found: list[str] = []
    for sample in samples:
        found += problems(_cases(sample, size))
    assert not found, _report(found)


@pytest.mark.parametrize("part", range(4))
def test_elementwise_rules(part: int) -> None:
    found: list[str] = []
    for op in list(ELEMENTWISE)[part::4]:
        for sample in ELEMENTWISE[op]:
            for size in (2, 3):
                found += problems(_cases(sample, size))
    assert not found, _report(found)


@pytest.mark.parametrize("size", [2, 3])
def test_operators_without_rule_are_gathered(size: int) -> None:
    found: list[str] = []
    for sample in WHOLE_SAMPLES:
        assert rule_for(sample)[1] is None
        found += problems(list(whole_cases_of(sample, size)))
    assert not found, _report(found)


def test_layouts_are_of_all_kinds() -> None:
    texts = {f"{x.outer}*{x.sequence}*{x.inner}" for n in (1, 2, 5, 6, 8) for x in layouts(n)}
    assert {
        "1*[1]*1",
        "1*[2]*1",
        "1*[1|4]*1",
        "1*[1 whole|4]*1",
        "2*[3]*1",
        "1*[3]*2",
        "2*[2]*2",
        "1*[1 whole|2]*2",
    } <= texts


def _wrong(monkeypatch: pytest.MonkeyPatch, op: Any, change: Callable[[OpRule], OpRule]) -> None:
    right = RULES[op]

    def rule(call: Call) -> OpRule | None:
        result = right(call)
        assert result is not None
        return change(result)

    monkeypatch.setitem(RULES, op, rule)


def _without_whole(rule: OpRule) -> OpRule:
    """Every factor passes: results have the factors of the first operand."""
    (first, *_) = rule.operands
    assert first is not None
    return OpRule(rule.operands, tuple(first for _ in rule.results), rule.sizes)


def _as_reduction(rule: OpRule) -> OpRule:
    return OpRule(rule.operands, rule.results, rule.sizes, reduction=rule.whole | rule.combined)


def _swapped(rule: OpRule) -> OpRule:
    (dims,) = rule.operands
    assert dims is not None
    return OpRule((tuple(tuple(reversed(d)) for d in dims),), rule.results, rule.sizes)


@pytest.mark.parametrize(
    ("sample", "change"),
    [
        (Sample(aten.softmax.int, (T((2, 5)), 1)), _without_whole),
        (Sample(aten.cumsum.default, (T((5, 2)), 0)), _without_whole),
        (Sample(aten.layer_norm.default, (T((2, 6)), [6])), _without_whole),
        (Sample(aten.amax.default, (T((2, 5)), [1])), _as_reduction),
        (Sample(aten.linear.default, (T((2, 6)), T((3, 6)), T((3,)))), _as_reduction),
        (Sample(aten.reshape.default, (T((10,)), [2, 5])), _swapped),
    ],
    ids=["softmax", "cumsum", "layer_norm", "amax", "bias", "reshape"],
)
def test_a_wrong_rule_is_found(
    monkeypatch: pytest.MonkeyPatch, sample: Sample, change: Callable[[OpRule], OpRule]
) -> None:
    assert not problems(list(cases_of(sample, 2)))
    _wrong(monkeypatch, sample.op, change)
    assert problems(list(cases_of(sample, 2)))


def test_a_rule_that_is_wrong_in_the_backward_pass_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a summand for the weight's gradient every value is right, and the gradient is not."""
    from fxsp.passes.builder import Builder

    sample = Sample(aten.linear.default, (T((5, 2)), T((3, 2))))
    monkeypatch.setattr(Builder, "use", lambda self, x: x)
    assert problems(list(cases_of(sample, 2)))
    assert not problems(list(cases_of(sample, 2)), grads=False)


def test_a_promise_that_is_not_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering everything is right, but it is not what the rule says."""

    def gather(call: Call, rule: Any, types: Any, bytes_of: Any, free: Any) -> decisions.Decision:
        return decisions.replicate_all(call, types, "because")

    monkeypatch.setattr(decisions, "decide", gather)
    found = problems(list(cases_of(Sample(aten.exp.default, (T((5, 2)),)), 2)))
    assert found
    assert all("operand 0 is wanted as R" in line for line in found)


@pytest.mark.parametrize("size", [2, 3])
def test_lock_step_gradients_are_those_of_the_kernels(size: int) -> None:
    """The fast gradients that this file relies on, against the registered derivatives of the operators."""
    recorder = Recorder()
    for sample, at in [
        (Sample(aten.linear.default, (T((2, 5, 6)), T((4, 6)))), "S(1, [2 whole|3])"),
        (Sample(aten.softmax.int, (T((2, 5)), 1)), "S(1, [5])"),
        (Sample(aten.mean.dim, (T((2, 6)), [1])), "S(1, 1*[1 whole|2]*2)"),
        (
            Sample(aten.scaled_dot_product_attention.default, tuple(T((1, 2 * size, 5, 2)) for _ in "qkv")),
            "S(2, [2|3])",
        ),
        (Sample(aten.scaled_dot_product_attention.default, tuple(T((1, 1, 5, 2)) for _ in "qkv")), "S(2, [1 whole|4])"),
    ]:
        type_ = fxsp.types.parse(at)
        assert isinstance(type_, Shard)
        recorder.outputs.append(
            recorder.sample(
                sample, lambda i, x, t=type_: recorder.lay(x, t) if x.meta["val"].dim() > 2 or i == 0 else x
            )
        )
    values, wanted = [x.meta["val"] for x in recorder.inputs], [x.meta["val"] for x in recorder.outputs]
    program = Program(recorder.finish(), Ranks(0, size, "simulated"), training=True)
    gm = partition_program(program).gm
    assert {r.method for r in program.report.attentions} == {"ulysses", "gather_kv"}
    given = [torch.randn(y.shape, generator=recorder.generator, dtype=y.dtype) for y in wanted]
    ours = [check_replicated(lanes) for lanes in gradients(gm, size, values, given)]
    theirs = [check_replicated(lanes) for lanes in simulate_with_grads(gm, size, values, given)]
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a.detach(), b.detach())
