"""What is known of an operator of ours stands in its record, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxsp.kernels.op import Op, Saved
from fxsp.kernels.ops import LOCAL_OPS, OPS, op_of, record_of
from fxsp.simulation.reference import table
from fxsp.torch_internals import schema

ROOT = Path(__file__).resolve().parents[2]
NAMES = {op.name for op in (*OPS, *LOCAL_OPS)}
#: Names that other things have too: kinds of collectives, rules of a plan, functions of torch.
COMMON = {
    "annotate",
    "deal",
    "dropout",
    "gather",
    "pack",
    "positions",
    "put",
    "shard",
    "take",
    "undeal",
    "unpack",
    "use",
}
COMMON |= {"all_reduce", "all_to_all", "reduce_scatter"}
#: Operators that one file is about: the plan's marker, what *device_memory* leaves to a compiler, what *emit* puts into
#: buckets.  They may be compared with, one at a time.
SUBJECTS = {"annotate", "pack_heads", "reduce_grad", "banded_attention"}
FILES = sorted(
    path
    for folder in ("fxsp", "passes")
    for path in (ROOT / folder).rglob("*.py")
    if "reference" not in path.parts  # the oracle is written apart
)


def named(node: ast.AST) -> str | None:
    """The operator of ours that an expression names: ``fxsp_ops.shard.default``, ``"fxsp::shard"``, ``"mask_pads"``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        namespace, _, name = node.value.rpartition("::")
        ours = namespace in ("fxsp", "fxsp_local") or (not namespace and name not in COMMON)
        return name if ours and name in NAMES else None
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node).removesuffix(".default")
        space, _, name = text.rpartition(".")
        known = ("_ops", "fxsp_ops", "local_ops", "torch.ops.fxsp", "torch.ops.fxsp_local")
        return name if space in known and name in NAMES else None
    return None


def classified(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Operators of ours in sets, keys of dictionaries, tuples and lists of several, and comparisons."""
    for node in ast.walk(tree):
        members: list[ast.expr | None] = []
        if isinstance(node, ast.Set):
            members = list(node.elts)
        elif isinstance(node, ast.Dict):
            members = list(node.keys)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            members = [m for side in sides for m in (side.elts if isinstance(side, ast.Tuple | ast.List) else [side])]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Tuple | ast.List):
            members = list(node.value.elts)
        for member in members:
            if member is not None and (name := named(member)) is not None:
                single = isinstance(node, ast.Compare) and len(members) == 2
                if not (single and name in SUBJECTS):
                    yield name, member.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_operator_is_classified_outside_its_record(path: Path) -> None:
    found = list(classified(ast.parse(path.read_text())))
    assert not found, f"say this in the operator's record (fxsp.kernels.op.Op): {found}"


def test_what_is_classified_is_recognised() -> None:
    source = (
        "A = {'mask_pads'}\nB = (fxsp_ops.shard.default, torch.ops.fxsp.use.default)\nC = {'fxsp::gather': 1}\n"
        "if name in ('ring_attention', x): pass\nif node.target is _ops.take.default: pass\n"
    )
    found = sorted(name for name, _ in classified(ast.parse(source)))
    assert found == ["gather", "mask_pads", "ring_attention", "shard", "take", "use"]
    plain = "if node.target is fxsp_ops.annotate.default: pass\nrun(_ops.shard.default, 'all_reduce')\nD = {'use': 1}\n"
    assert not list(classified(ast.parse(plain)))


def test_records_are_found_by_what_they_define() -> None:
    for op in (*OPS, *LOCAL_OPS):
        assert record_of(op.target) is op
        assert schema(op.target).name == f"{op.namespace}::{op.name}"
        node = torch.fx.Graph().call_function(op.target)
        assert op_of(node) is (op if op in OPS else None)
    assert record_of(torch.ops.aten.relu.default) is None
    assert len(NAMES) == len(OPS) + len(LOCAL_OPS)


def kinds(op: Op) -> tuple[str, str]:
    before, after = op.types.replace("+", "").split(" -> ")
    return before, after


def test_adjoints_have_dual_types() -> None:
    """The gradient of R is R, of a shard a shard, of U is P, and the other way round."""
    dual, by_name = {"R": "R", "S": "S", "U": "P", "P": "U"}, {op.name: op for op in OPS}
    checked = [op for op in OPS if isinstance(op.adjoint, str)]
    assert len(checked) >= 10
    for op in checked:
        assert isinstance(op.adjoint, str)
        (before, after), adjoint = kinds(op), by_name[op.adjoint]
        assert kinds(adjoint) == (dual[after], dual[before]), op.name
        # It gets the same other arguments.
        assert op.schema == adjoint.schema, op.name


def test_what_sends_says_what_its_gradient_sends() -> None:
    """An operator whose adjoint communicates says so, unless only backward graphs have it."""
    by_name = {op.name: op for op in OPS}
    for op in OPS:
        if isinstance(op.adjoint, str) and by_name[op.adjoint].sends is not None:
            adjoints = {other.adjoint for other in OPS if isinstance(other.adjoint, str) and other is not op}
            assert op.returns is not None or op.name in adjoints, op.name


def test_the_oracle_knows_what_runs_on_ranks() -> None:
    """All but the factor of a gradient of which an outer reducer takes the mean: there is none in a simulation."""
    assert set(table._OPERATORS) == {op.name for op in OPS} - {"scale_grad"}


def test_gradients_of_every_record() -> None:
    without = {op.name for op in OPS if op.adjoint is None}
    assert without == {
        "positions", "place_positions", "all_reduce_extreme", "at_extreme_backward", "ring_attention_backward",
        "merged_attention_backward",
    }  # fmt: skip
    assert all(isinstance(op.adjoint, str | Saved) or callable(op.adjoint) for op in OPS if op.adjoint is not None)
