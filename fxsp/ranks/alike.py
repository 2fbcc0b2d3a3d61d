"""What must be the same on all ranks when they compile a graph, as text by topic.

Before anything is decided: the graph, its inputs (dtypes, shapes as symbols and as numbers), weights by shape, options,
plan, modes, versions, and the random state where a graph draws.  After the partitioning: what it decided.  Devices are
told by kind, groups by their members: the numbers of these differ between ranks that are in order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsp import torch_internals
from fxsp.capture.capture import frame_module
from fxsp.config import Options
from fxsp.report import Report
from fxsp.source import forward_source, input_names, node_source
from fxsp.types import Ranks

__all__ = ["Alike", "decisions", "draws", "random_states"]


class Alike:
    """One graph of Dynamo as this rank sees it, read before anything changes it."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], options: Options, ranks: Ranks) -> None:
        #: The inputs by name, in the words of the user.
        self.names = input_names(gm)
        self.draws = draws(gm)
        translation = torch_internals.Translation.current()
        module = frame_module(translation) if translation is not None else None
        rows = [(n, x, _kind(x)) for n, x in zip(self.names, inputs, strict=True)]
        data = [f"{name} {text}" for name, x, text in rows if not isinstance(x, torch.nn.Parameter)]
        weights = [f"{name} {text}" for name, x, text in rows if isinstance(x, torch.nn.Parameter)]
        #: The graph, for a person.
        self.graph = f"{type(module).__name__} ({forward_source(module)})" if module is not None else _first_line(gm)
        shown = ", ".join(data[:6]) + (", ..." if len(data) > 6 else "")
        reason = " ".join(torch_internals.recompile_reason().split())
        anew = f"; compiled anew, since a guard failed: {reason}" if reason else ""
        self.what = f"compiles the graph of {self.graph} for {shown or 'no inputs'}{anew}"
        self.topics = {
            "versions": f"torch {torch.__version__}\nfxsp {_version()}",
            "world size": f"{ranks.size} ranks in the group, {dist.get_world_size()} in all",
            "options": "\n".join(_options(options)),
            "plan": _plan_text(options.plan),
            "mode": "\n".join(_modes(module)),
            "inputs": "\n".join(data),
            "weights": "\n".join(weights),
            "graph": "\n".join(_lines(gm)),
        }
        if self.draws and options.check_inputs is not False:
            self.topics.update(random_states(self.draws))


def decisions(report: Report, gm: GraphModule | None) -> dict[str, str]:
    """What the partitioning decided; a rank that decided otherwise would wait for messages that nobody sends."""
    entries = [f"{record.entry}: {'applied' if record.applied else 'not applied'}" for record in report.plan]
    moved = [f"{record.kind} {record.bytes}" for record in (*report.collectives, *report.backward)]
    program = [] if gm is None else [f"{node.op} {_target(node)}" for node in gm.graph.nodes]
    return {
        "plan": "\n".join(entries),
        "split": f"runs whole: {report.unsharded}" if report.unsharded else "is split",
        "collectives": "\n".join(moved),
        "program": "\n".join(program),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("fxsp")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kind(value: Any) -> str:
    """Dtype, shape (symbols, and the numbers at hand) and what else a graph depends on."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {_number(value)}"
    shape = [_number(n) for n in value.shape]
    grad = ", requires grad" if value.requires_grad else ""
    kind = "" if type(value) in (Tensor, torch.nn.Parameter) else f" {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(shape)}] on {value.device.type}{grad}{kind}"


def _number(value: Any) -> str:
    if isinstance(value, torch.SymInt):
        return f"{value.node.expr}={value.node.hint}"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def _options(options: Options) -> Iterator[str]:
    for option in dataclasses.fields(options):
        if option.name not in ("group", "mesh", "plan", "print"):
            value = getattr(options, option.name)
            yield f"{option.name}={getattr(value, '__qualname__', None) or _constant(value)}"


def _modes(module: Any) -> Iterator[str]:
    yield f"grad mode {'on' if torch.is_grad_enabled() else 'off'}"
    yield f"inference mode {'on' if torch.is_inference_mode_enabled() else 'off'}"
    devices = [d for d in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(d)]
    yield "autocast " + (", ".join(f"{d} {torch.get_autocast_dtype(d)}" for d in devices) or "off")
    yield f"deterministic algorithms {torch.are_deterministic_algorithms_enabled()}"
    if module is not None:
        training = sum(m.training for m in module.modules())
        yield f"{type(module).__name__} in {'training' if module.training else 'eval'} mode, {training} modules of it"


# --- the graph --------------------------------------------------------------------------------------------------------


def _graphs(gm: GraphModule) -> Iterator[GraphModule]:
    return (module for module in gm.modules() if isinstance(module, GraphModule))


def _lines(gm: GraphModule) -> Iterator[str]:
    """A line per node that is the same on every rank; nodes are numbers, and names do not count."""
    for graph in _graphs(gm):
        numbers = {node: i for i, node in enumerate(graph.graph.nodes)}
        for node, number in numbers.items():
            if node.op == "placeholder":
                yield f"%{number} = input"
                continue
            # The names of groups differ where an axis other than the sequence's is communicated over.
            text = _quiet if "c10d" in _target(node) else _constant
            args = [_argument(a, numbers, text) for a in node.args]
            args += [f"{key}={_argument(a, numbers, text)}" for key, a in node.kwargs.items()]
            where = node_source(node)
            yield f"%{number} = {_target(node)}({', '.join(args)})" + (f" at {where}" if where else "")


def _target(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if torch_internals.is_operator(target):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__name__)}"


def _argument(value: Any, numbers: Mapping[Node, int], text: Callable[[Any], str]) -> str:
    if isinstance(value, Node):
        return f"%{numbers[value]}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, numbers, text) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_argument(item, numbers, text)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return "slice" + _argument([value.start, value.stop, value.step], numbers, text)
    return text(value)


def _constant(value: Any) -> str:
    """A constant without addresses and device numbers."""
    if isinstance(value, torch.device):
        return f"device {value.type}"
    if isinstance(value, torch.SymInt):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_constant, value))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return str(value)
    plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.layout, torch.memory_format)
    return repr(value) if isinstance(value, plain) else type(value).__name__


def _quiet(value: Any) -> str:
    return "..." if isinstance(value, str) else _constant(value)


def _first_line(gm: GraphModule) -> str:
    places = (node_source(node) for node in gm.graph.nodes if node.op not in ("placeholder", "output"))
    return next(("a function at " + place for place in places if place), "a function")


# --- random numbers ---------------------------------------------------------------------------------------------------

#: Functions and methods of torch that draw, by name; operators of ATen say so themselves.
_DRAWING = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
    *("multinomial", "poisson", "binomial", "bernoulli_", "normal_", "uniform_", "random_", "exponential_"),
    *("log_normal_", "cauchy_", "geometric_", "gumbel_softmax"),
}
#: Those that draw while training, or with a probability above zero: where these arguments stand.
_DROPPING = {
    **dict.fromkeys(("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), (1, 2)),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout", "alpha_dropout_", "feature_dropout_"), (1, 2)),
    "scaled_dot_product_attention": (4, None),
    "rrelu": (None, 3),
}


def draws(gm: GraphModule) -> tuple[str, ...]:
    """The devices on whose generators a graph of Dynamo draws."""
    found = set()
    for graph in _graphs(gm):
        for node in graph.graph.nodes:
            if node.op in ("call_function", "call_method") and _draws(node):
                value = node.meta.get("example_value", node.meta.get("val"))
                value = next((v for v in value if isinstance(v, Tensor)), None) if isinstance(value, tuple) else value
                found.add(str(value.device) if isinstance(value, Tensor) else "cpu")
    return tuple(sorted(found))


def _draws(node: Node) -> bool:
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if torch_internals.is_operator(target):
        if torch.Tag.nondeterministic_seeded not in target.tags:
            return False
        name = torch_internals.schema(target).name.partition("::")[2]
        return name not in _DROPPING or _drops(node, *_DROPPING[name])
    if not isinstance(target, str) and not str(getattr(target, "__module__", "torch") or "torch").startswith("torch"):
        return False
    return name in _DRAWING or (name in _DROPPING and _drops(node, *_DROPPING[name]))


def _drops(node: Node, probability: int | None, training: int | None) -> bool:
    names = {"p": probability, "dropout_p": probability, "training": training, "train": training}
    for name, position in names.items():
        value: Any = node.kwargs.get(name)
        if value is None and position is not None and len(node.args) > position:
            value = node.args[position]
        if value is not None and not isinstance(value, Node) and not value:
            return False
    # What is not given has its default: attention drops nothing then, and rrelu is not training.
    if node.target == torch.nn.functional.scaled_dot_product_attention:
        return len(node.args) > 4 or "dropout_p" in node.kwargs
    return True


def random_states(devices: Sequence[str]) -> dict[str, str]:
    """The states of the generators of some devices, a topic for each kind."""
    found: dict[str, list[str]] = {}
    for name in devices:
        device = torch.device(name)
        if device.type == "cpu":
            seed, state = torch.initial_seed(), torch.get_rng_state()
        else:
            module = torch.get_device_module(device)
            seed, state = module.initial_seed(), module.get_rng_state(device)
        digest = hashlib.sha256(bytes(state.tolist())).hexdigest()[:12]
        found.setdefault(f"random state of {device.type}", []).append(f"seed {seed}, state {digest}")
    return {topic: "\n".join(rows) for topic, rows in found.items()}


def _plan_text(plan: Any) -> str:
    if plan is None:
        return "the model's own, or inferred"
    return plan if isinstance(plan, str) else "\n".join(map(str, plan))
