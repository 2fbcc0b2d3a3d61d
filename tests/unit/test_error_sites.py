"""Every error, warning and line of a report says where: the user's source line, the module path, and what helps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fxsp
import small
from fxsp.passes.special import sums
from fxsp.types import product

SPLIT = fxsp.SequenceParallelInput(1)
PARTIAL = fxsp.SequenceParallelPartialInput(1, text_len_source="text")


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


class Part(nn.Module):
    """One construct, in a module of its own."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "cumsum":
            return x.cumsum(1)
        if self.what == "function":
            return Double.apply(x)
        if self.what == "mean":
            return x + x.mean(1, keepdim=True)
        return x


class Whole(nn.Module):
    def __init__(self, what: str = "", dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.part = small.Model(dropout=dropout), Part(what)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.inner(x))


def _explain(what: str = "", plan: Any = None, dropout: float = 0.0, size: int = 2, **options: Any) -> str:
    """What the user sees: the report and the warnings, or the error."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        e = fxsp.explain(
            Whole(what, dropout), small.inputs(), world_size=size, plan=plan or {"": {"x": SPLIT}}, options=options
        )
    return str(e)


def _verified() -> str:
    with mock.patch.object(sums, "product", lambda sizes: 3 * product(sizes)):
        evidence = fxsp.verify(Whole("mean"), small.inputs(), world_size=2, plan={"": {"x": SPLIT}})
    assert not evidence
    return str(evidence)


def _warned(what: str) -> str:
    """The warning of the compiler itself."""
    from fxsp import said

    e = fxsp.explain(Whole(what), small.inputs(), world_size=2, plan={"": {"x": SPLIT}})
    with pytest.warns(fxsp.FxspWarning) as found:
        said.say_gathers(e.results[0].report)
    return str(found[0].message)


#: Name -> what provokes it, the module path, the file with the line, and a word of the remedy.
SITES: dict[str, tuple[Callable[[], str], str, str, str]] = {
    "no such module": (lambda: _explain(plan={"inner.blks": {"x": SPLIT}}), "inner.blks", "small.py", "Did you mean"),
    "no such argument": (
        lambda: _explain(plan={"inner.blocks.0": {"hiden": SPLIT}}),
        "inner.blocks.0",
        "small.py",
        'Did you mean "hidden"',
    ),
    "no such output": (
        lambda: _explain(plan={"part": {2: fxsp.SequenceParallelInput(1, split_output=True)}}),
        "part",
        "test_error_sites.py",
        "the module returns 1",
    ),
    "no such dimension": (
        lambda: _explain(plan={"part": {"x": fxsp.SequenceParallelInput(5)}}),
        "part",
        "test_error_sites.py",
        "3-D",
    ),
    "contradiction": (
        lambda: _explain(
            plan={"inner.blocks.*": {"hidden": SPLIT}, "inner.blocks.1": {"hidden": fxsp.SequenceParallelInput(2)}}
        ),
        "inner.blocks.1",
        "small.py",
        "keep one",
    ),
    "no text length": (
        lambda: _explain(plan={"part": {"x": PARTIAL}}),
        "part",
        "test_error_sites.py",
        "They have: x",
    ),
    "strict": (lambda: _explain("cumsum", strict=True), "part", "test_error_sites.py", "SequenceParallelOutput"),
    "attention dropout": (lambda: _explain(dropout=0.25), "inner.blocks.0", "small.py", "model.eval()"),
    "implicit gather": (lambda: _explain("cumsum"), "part", "test_error_sites.py", "needs dimension 1"),
    "island": (lambda: _explain("function"), "part", "test_error_sites.py", "not opened"),
    "warning of a gather": (lambda: _warned("cumsum"), "part", "test_error_sites.py", "strict=True"),
    "sum": (lambda: _explain("mean"), "part", "test_error_sites.py", "sum over the ranks"),
    "not applied": (
        lambda: _explain(plan={"": {"x": SPLIT}, "part": {"x": fxsp.SequenceParallelInput(1, expected_dims=4)}}),
        "part",
        "small.py",
        "not 4-D as expected_dims says",
    ),
    "verify": (_verified, "part", "test_error_sites.py", "first difference"),
}


@pytest.mark.parametrize("name", SITES)
def test_it_says_where_and_what_helps(name: str) -> None:
    provoke, module, file, remedy = SITES[name]
    try:
        text = provoke()
    except fxsp.FxspError as error:
        text = str(error)
    assert re.search(rf"\b{re.escape(module)}\b", text), text
    assert re.search(rf"\b{re.escape(file)}:\d+", text), text
    assert remedy in text, text


def test_options_say_what_is_valid() -> None:
    for options, remedy in (
        ({"ulysses_degree": 3}, "Valid (ulysses_degree, ring_degree): (1, 2), (2, 1)"),
        ({"ulyses_degree": 2}, 'Did you mean "ulysses_degree"'),
    ):
        with pytest.raises(fxsp.OptionError) as error:
            _explain(**options)
        assert remedy in str(error.value)


def test_a_graph_that_stays_whole_says_why_and_what_helps() -> None:
    model = small.Model()
    e = fxsp.explain(model, small.inputs(), world_size=2, plan={"": {"scale": SPLIT}})
    assert "no entry of the plan applies" in str(e)
    assert "<root>[scale]" in str(e)


def test_every_record_names_source_and_module() -> None:
    e = fxsp.explain(Whole("cumsum"), small.inputs(), world_size=4, plan={"": {"x": SPLIT}})
    records = [*e.collectives, *e.backward_collectives, *e.attentions, *e.implicit_gathers]
    assert len(records) > 10
    for record in records:
        assert re.fullmatch(r"(small|test_error_sites)\.py:\d+", record.source), record
        assert record.module == "Whole" or record.module.startswith(("inner", "part")), record
