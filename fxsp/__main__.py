"""``python -m fxsp``: explain, verify, and find a plan, from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

import fxsp
from fxsp.errors import FxspError, FxspWarning
from fxsp.offline.given import UsageError, check_writable, named, parse_plan_text
from fxsp.offline.provenance import UnknownNameError
from fxsp.offline.table import side_by_side

__all__ = ["main"]

EXAMPLES = """\
a factory is a function without arguments that returns (model, args, kwargs), in a module that can be imported:

    # flux.py
    def build():
        with torch.device("meta"):                      # no weights needed to explain
            model = FluxTransformer2DModel(guidance_embeds=True)
            return model, (), {"hidden_states": torch.empty(1, 4096, 64), ...}

examples:
    python -m fxsp explain flux:build --ranks 8
    python -m fxsp explain flux:build --ranks 8 --ulysses 4 --ring 2 --html flux.html
    python -m fxsp explain flux:build --ranks 8 --stage partition
    python -m fxsp explain flux:build --ranks 8 --why transformer_blocks.0.attn
    python -m fxsp plan    flux:build --ranks 8
    python -m fxsp explain flux:build --ranks 2 4 8       # side by side
    python -m fxsp explain flux.py:build --ranks 8 --plan plans.py:flux
    python -m fxsp explain flux:build --ranks 8 --plan '{"": {"hidden_states": SequenceParallelInput(split_dim=1)}}'
    python -m fxsp verify  small:build --ranks 2 3 8 --no-grad

exit status:
    0   explain, plan: the model is split, on every number of ranks; verify: it is split, and equal
    1   it is not split (explain: or next to nothing is), values differ, or there was an error (on standard error)
    2   the command line is not understood
FXSP_QUIET=1 leaves out what is told while it takes long; FXSP_TRACEBACK=1 shows where an error comes from
"""


def _parser() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m fxsp", description=__doc__, epilog=EXAMPLES, formatter_class=kind)
    parser.add_argument("--version", action="version", version=f"fxsp {fxsp.__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="what the compiler would do", epilog=EXAMPLES, formatter_class=kind)
    verify = commands.add_parser(
        "verify", help="compare the split model with itself, on simulated ranks", epilog=EXAMPLES, formatter_class=kind
    )
    plan = commands.add_parser("plan", help="the plan that the compiler finds", epilog=EXAMPLES, formatter_class=kind)
    plan.add_argument("--ranks", type=int, required=True, help="number of ranks")
    plan.add_argument("--grad", action="store_true", help="as in training")
    for command in (explain, verify):
        command.add_argument("--plan", help='instead of the model\'s own: "infer", file.py:name, or a dictionary')
    for command in (explain, verify, plan):
        command.add_argument("factory", help="package.module:factory, or file.py:factory")
        command.add_argument("--ulysses", type=int, help="ranks that exchange heads")
        command.add_argument("--ring", type=int, help="ranks in a ring")
        command.add_argument("--strict", action="store_true", help="implicit gathers are errors")
    explain.add_argument(
        "--ranks", type=int, nargs="+", required=True, help="number of ranks; of several, a table side by side"
    )
    explain.add_argument("--grad", action="store_true", help="as in training")
    explain.add_argument("--machine", help="what is decided for: h100x8, 2xh100x8 (two nodes of eight), or a file")
    explain.add_argument("--html", metavar="FILE", help="write a page that stands alone")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.add_argument("--stage", help="print the graph after a stage")
    explain.add_argument("--why", metavar="NAME", help="why a module, value or collective is as it is")
    verify.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks")
    verify.add_argument("--no-grad", action="store_true", help="compare values only")
    return parser


def _factory(name: str) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    found = named(name, "factory")
    if not callable(found):
        raise UsageError(f"{name} is {type(found).__name__}, no function; a factory returns (model, args, kwargs)")
    made = found()
    if not isinstance(made, tuple | list) or len(made) != 3 or not isinstance(made[2], dict):
        raise UsageError(f"{name} returned {type(made).__name__}; a factory returns (model, args, kwargs)")
    return made[0], made[1], made[2]


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {"ulysses_degree": arguments.ulysses, "ring_degree": arguments.ring}
    given["machine"] = getattr(arguments, "machine", None)
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if getattr(arguments, "plan", None) is not None:
        options["plan"] = parse_plan_text(arguments.plan)
    return {**options, "strict": True} if arguments.strict else options


def _explain(arguments: argparse.Namespace) -> int:
    alone = {"--html": arguments.html, "--stage": arguments.stage, "--why": arguments.why}
    if len(arguments.ranks) > 1 and (asked := [name for name, value in alone.items() if value]):
        raise UsageError(f"{asked[0]} is about one number of ranks, and --ranks gives {len(arguments.ranks)}")
    if arguments.html:
        check_writable(arguments.html)
    options = _options(arguments)
    model, args, kwargs = _factory(arguments.factory)
    several = []
    for size in arguments.ranks:
        with torch.set_grad_enabled(arguments.grad):
            several.append(fxsp.explain(model, *args, world_size=size, options=options, progress=True, **kwargs))
    found = several[0]
    shown = []
    if arguments.html:
        sys.stderr.write(f"fxsp: wrote {found.to_html(arguments.html)}\n")
    if arguments.json:
        all_ = [e.to_dict() for e in several]
        shown.append(found.to_json() if len(several) == 1 else json.dumps(all_, indent=2, ensure_ascii=False))
    elif len(several) > 1:
        shown.append(side_by_side(several))
    if arguments.stage:
        shown += [found.graph(arguments.stage, i) for i in range(len(found.results))]
    if arguments.why:
        shown.append(found.explain(arguments.why))
    print("\n\n".join(shown) if shown else str(found))
    if shown and not arguments.json and len(several) == 1:
        sys.stderr.writelines(f"fxsp: {line}\n" for line in found.warnings)
    return 0 if all(_is_split(e) for e in several) else 1


def _is_split(found: fxsp.Explanation) -> bool:
    return found.world_size == 1 or (any(m is not None for m in found.measures) and not found.warnings)


def _plan(arguments: argparse.Namespace) -> int:
    model, args, kwargs = _factory(arguments.factory)
    with torch.set_grad_enabled(arguments.grad):
        found = fxsp.infer_plan(model, *args, world_size=arguments.ranks, options=_options(arguments), **kwargs)
    print(found)
    print("\n".join(f"# {note}" for note in found.notes))
    return 0 if found or found.unnamed else 1


def _verify(arguments: argparse.Namespace) -> int:
    model, args, kwargs = _factory(arguments.factory)
    evidence = fxsp.verify(
        model,
        *args,
        world_size=arguments.ranks,
        options=_options(arguments),
        gradients=False if arguments.no_grad else None,
        progress=True,
        **kwargs,
    )
    print(evidence)
    split = any(not graph.unsharded for graph in evidence.graphs)
    return 0 if evidence.ok and (split or max(arguments.ranks) == 1) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 if a model is split (explain, plan) or equal (verify), 1 if not or on an error, 2 on usage."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxspWarning)
            return {"explain": _explain, "verify": _verify, "plan": _plan}[arguments.command](arguments)
    except (FxspError, UnknownNameError, OSError) as error:
        sys.stderr.write(f"fxsp: {error}\n")
    except Exception as error:
        if os.environ.get("FXSP_TRACEBACK"):
            raise
        sys.stderr.write(f"fxsp: {type(error).__name__}: {error}\n  (FXSP_TRACEBACK=1 shows where)\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
