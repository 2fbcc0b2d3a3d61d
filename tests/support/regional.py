"""Models that are compiled block by block, on real ranks beside the same model on one process."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxsp
import models
from fxsp.report import Report
from running import build, error_of, gradient_error, moves
from simulated import Simulated, by_plan

__all__ = ["Regional", "run_regional", "run_split_outputs", "sent", "whole_bytes"]

#: The classes of blocks, where a model does not say them itself (diffusers' ``_repeated_blocks``).
BLOCKS = {"llama": ["LlamaDecoderLayer"], "sd3": ["JointTransformerBlock"]}
#: Modules in blocks, after which ``"broken"`` breaks the graph.
BROKEN = ("FluxAttention", "LlamaMLP", "WanAttention")


@dataclass
class Regional:
    """What one rank saw of a few calls."""

    errors: list[float] = field(default_factory=list)
    #: Relative errors of the gradients of parameters and inputs, the worst of each call.
    gradients: list[float] = field(default_factory=list)
    #: Graphs that each call compiled.
    compiles: list[int] = field(default_factory=list)
    #: Collectives of the last forward pass, by kind, and the bytes that this rank sent in them.
    ran: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    #: What the report of the model says of that pass: how many collectives, and the bytes.
    reported: tuple[int, int] = (0, 0)
    #: Classes of the results: nobody outside is given a split value.
    classes: set[str] = field(default_factory=set)
    #: Entries of plans that were applied.
    applied: set[str] = field(default_factory=set)


@contextlib.contextmanager
def sent() -> Iterator[tuple[Counter[str], list[int]]]:
    """Collectives that run inside, and the bytes of float32 that this rank sends in them; filled at the end."""
    counts, total = Counter[str](), [0]
    size = dist.get_world_size()
    with moves() as seen:
        yield counts, total
    for kind, shape in seen:
        counts[kind] += 1
        elements = torch.Size(shape).numel()
        total[0] += 4 * elements * (size - 1) // (size if kind in ("all_to_all", "reduce_scatter") else 1)


def compile_blocks(model: nn.Module, names: list[str], **options: Any) -> None:
    """As diffusers' ``compile_repeated_blocks`` does."""
    for module in model.modules():
        if any(kind.__name__ in names for kind in type(module).__mro__):  # FSDP2 derives a class of its own
            module.compile(backend="sp", options={"inner": "aot_eager", **options})


def run_regional(
    rank: int, size: int, name: str, calls: list[dict[str, Any]], training: bool, options: dict[str, Any], way: str
) -> Regional:
    """Call a model of ``models`` or ``zoo`` that is compiled block by block; ``way``: see :data:`WAYS`."""
    model, _ = build(name, calls[0])
    whole = copy.deepcopy(model)
    blocks = getattr(model, "_repeated_blocks", None) or BLOCKS[name]
    found = Regional()
    with warnings.catch_warnings(), torch.set_grad_enabled(training):
        warnings.simplefilter("ignore")
        call = WAYS[way](model, blocks, options)
        for number, arguments in enumerate(calls, 1):
            inputs = build(name, arguments)[1]
            before = len(fxsp.reports())
            with sent() if number == len(calls) else nullcontext((Counter[str](), [0])) as (ran, total):
                got = models.first_tensor(call(**inputs))
            found.compiles.append(len(fxsp.reports()) - before)
            wanted = models.first_tensor(whole(**inputs))
            found.classes.add(type(got).__name__)
            found.errors.append(error_of(got, wanted))
            found.ran, found.bytes = ran, total[0]
            if training:
                found.gradients.append(_gradients(model, whole, got, wanted))
    rows = fxsp.report_of(model).communication.values()
    found.reported = sum(count for count, _ in rows), sum(size for _, size in rows)
    records = [record for report in fxsp.reports()[-sum(found.compiles) :] for record in report.plan]
    found.applied = {record.entry.partition(":")[0] for record in records if record.applied}
    dist.barrier()
    return found


def _gradients(model: nn.Module, whole: nn.Module, got: Tensor, wanted: Tensor) -> float:
    weights = torch.linspace(-1, 1, got.numel()).view(got.shape)
    for one, result in ((model, got), (whole, wanted)):
        one.zero_grad()
        (result * weights).sum().backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), whole.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in pairs)
    usual = max(b.norm().item() for _, b in pairs if b is not None)
    return max(gradient_error(a, b, usual) for a, b in pairs if a is not None and b is not None)


def _blocks(model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    compile_blocks(model, names, **options)
    return model


def _optimized(model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    """``torch.compile`` of every block, which takes its place."""
    for module in list(model.modules()):
        for child, block in list(module.named_children()):
            if type(block).__name__ in names:
                setattr(module, child, torch.compile(block, backend="sp", options={"inner": "aot_eager", **options}))
    return model


def _checkpointed(reentrant: bool, model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    """A checkpoint around every compiled block."""
    compile_blocks(model, names, **options)
    for module in model.modules():
        if type(module).__name__ in names:
            around = partial(checkpoint, module._compiled_call_impl, use_reentrant=reentrant)
            module._compiled_call_impl = around  # type: ignore[assignment]
    return model


def _inside(model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    """In a module of the user, from a lambda."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            return (lambda: self.model(**inputs))()

    compile_blocks(model, names, **options)
    return Outer()


def _broken(model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    """A graph break inside of every block, after its attention or its MLP."""
    for module in model.modules():
        if type(module).__name__ in BROKEN:
            module.forward = partial(_break_after, module.forward)  # type: ignore[method-assign]
    return _blocks(model, names, options)


def _break_after(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = forward(*args, **kwargs)
    torch._dynamo.graph_break()
    return result


def _mixed(model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    """Every second block is compiled; the others are eager, in between."""
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks[::2]:
        block.compile(backend="sp", options={"inner": "aot_eager", **options})
    return model


def _one(model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    """The whole model: to compare with."""
    return torch.compile(model, backend="sp", options={"inner": "aot_eager", **options})


def whole_bytes(size: int, name: str, arguments: dict[str, Any], options: dict[str, Any]) -> int:
    """What a rank sends in a forward pass of the model compiled as a whole, by its report."""
    torch.compiler.reset()  # what other tests compiled here counts for the recompile limit
    model, inputs = build(name, arguments)
    reports: list[Report] = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.compile(model, backend=Simulated(size, by_plan(options, reports)))(**inputs)
    assert reports
    return sum(record.bytes for report in reports for record in report.collectives)


#: How a model is compiled by its blocks: ``(model, names of classes, options) -> what is called``.
WAYS: dict[str, Callable[[nn.Module, list[str], dict[str, Any]], Any]] = {
    "blocks": _blocks,
    "optimized": _optimized,
    "checkpoint": partial(_checkpointed, False),
    "reentrant": partial(_checkpointed, True),
    "inside": _inside,
    "broken": _broken,
    "mixed": _mixed,
    "whole": _one,
}


def run_split_outputs(rank: int, size: int, by_blocks: bool) -> dict[str, Any]:
    """Logits that only a loss reads, and the loss compiled by itself."""
    model, inputs = build("llama", {"tokens": 7})
    whole = copy.deepcopy(model)
    split = {"inner": "aot_eager", "outputs": "split"}
    if by_blocks:
        compile_blocks(model, BLOCKS["llama"], outputs="split")
    else:
        model = torch.compile(model, backend="sp", options=split)  # type: ignore[assignment]
    weights = torch.linspace(-1, 1, 7).view(1, 7, 1)

    def loss_of(logits: Tensor) -> Tensor:
        return (logits.log_softmax(-1) * weights).square().mean()

    compiled = torch.compile(loss_of, backend="sp", options={"inner": "aot_eager"})
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=fxsp.FxspWarning)
        for _ in range(2):
            for one in (model, whole):
                one.zero_grad()
            logits = model(**inputs).logits
            with sent() as (ran, _):
                loss = compiled(logits)
            loss.backward()
            wanted = whole(**inputs).logits
            loss_of(wanted).backward()
    found["class"], found["ran"] = type(logits).__name__, ran
    found["loss"] = error_of(fxsp.whole(loss), loss_of(wanted))
    found["logits"] = error_of(fxsp.whole(logits), wanted)
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), whole.parameters(), strict=True)]
    usual = max(q.norm().item() for _, q in pairs if q is not None)
    found["gradients"] = max(gradient_error(p, q, usual) for p, q in pairs if p is not None and q is not None)
    dist.barrier()
    return found
