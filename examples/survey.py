"""How much of which models is split without a plan: of diffusers' transformers, and of the families of transformers.

    OMP_NUM_THREADS=1 python examples/survey.py                                      all of them (half an hour)
    OMP_NUM_THREADS=1 python examples/survey.py llama flux --ranks 4                 some of them
    OMP_NUM_THREADS=1 python examples/survey.py --verify 2 3 4                       and is it right?  (an hour)
    OMP_NUM_THREADS=1 python examples/survey.py --markdown docs/survey.md            also as a table

Every model is small, has random weights, and is explained for so many ranks with an inferred plan; where its class
carries a plan, with that one as well.  No process group is needed.  A row of the table has

- graphs: how many Dynamo makes of the model, and how many of them are split,
- work: the operations that a rank does, of those of one device (attention, linear layers, convolutions; a graph that
  runs whole counts as whole),
- sent: the bytes that a rank sends in a forward pass, and gathers: values that an operator needs whole,
- infer, of all: seconds that inference takes, and all that is done with the graphs of Dynamo before Inductor,
- own plan: work and bytes with the plan of the class,
- error: the largest relative error of an output on simulated ranks (``--verify``), beside one process,
- what forbids more, where a rank does more than 0.55 of the work: why graphs run whole, and the operators that do.

``--markdown`` keeps the rows that its file has of other models, so a table can be made in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fxsp
from fxsp.cost.share import Share, share_of
from fxsp.errors import FxspError
from fxsp.offline.explain import Explanation

#: Makes a model in evaluation mode, and the keyword arguments of its forward.
Build = Callable[[], tuple[torch.nn.Module, dict[str, Any]]]
#: At two ranks: what pads and small side sequences leave of one half.
ENOUGH = 0.55
HEADINGS = (
    "model",
    "class",
    "graphs (split)",
    "work",
    "sent",
    "gathers",
    "infer, of all [s]",
    "own plan: work, sent",
    "error",
    "what forbids more",
)
#: The number of a block in the path of a module.
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_PREAMBLE = """# Survey: models without a plan

Made by `python examples/survey.py --verify 2 3 4 --markdown docs/survey.md`, which says what the columns are; small
models, {ranks} ranks, torch {torch}, diffusers {diffusers}, transformers {transformers}.
"""


@dataclass(frozen=True)
class Row:
    """One model, as text."""

    name: str
    model: str
    graphs: str = ""
    work: str = ""
    sent: str = ""
    gathers: str = ""
    seconds: str = ""
    own: str = ""
    error: str = ""
    forbids: str = ""

    @property
    def part(self) -> float | None:
        """The work of a rank; None where nothing was compiled."""
        return float(self.work) if self.work else None

    @property
    def line(self) -> str:
        widths = (27, 36, 9, 5, 8, 4, 14, 14, 7, 0)
        return " ".join(f"{cell:<{width}}" for cell, width in zip(astuple(self), widths, strict=True)).rstrip()


@dataclass(frozen=True)
class Measured:
    """An explanation in numbers."""

    graphs: int
    split: int
    #: Operations on one device, and of the rank that does most.
    total: int
    rank: int
    sent: int
    gathers: int
    infer: float
    seconds: float
    #: Operators and graphs -> what they do whole, the most first.
    whole: dict[str, int]

    @property
    def part(self) -> float:
        return self.rank / self.total if self.total else 1.0


def measure(explanation: Explanation) -> Measured:
    """Operations, bytes and seconds of all graphs together."""
    total, rank = explanation.flops_total, max(explanation.flops_per_rank, default=0)
    whole: dict[str, int] = {}
    for result in explanation.results:
        if result.program is None:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                result.whole(*result.inputs)
            work = int(counter.get_total_flops())
            total, rank = total + work, rank + work
            # What differs between the graphs of a model are the numbers after the colon.
            reason = f"a graph runs whole: {result.report.unsharded.partition(':')[0]}"
            whole[reason] = whole.get(reason, 0) + work
        else:
            share: Share = share_of(result.program)
            for (op, module, source), work in share.whole.items():
                blocks = _INDEX.sub("*", module) or "the root"
                place = f"{op.removesuffix('.default')} in {blocks}" + (f" ({source})" if source else "")
                whole[place] = whole.get(place, 0) + work
    return Measured(
        len(explanation.results),
        sum(result.program is not None for result in explanation.results),
        total,
        rank,
        sum(size for _, size in explanation.communication_forward.values()),
        len(explanation.implicit_gathers),
        sum(result.report.timings.get("infer", 0.0) for result in explanation.results),
        sum(result.seconds for result in explanation.results),
        dict(sorted(whole.items(), key=lambda item: -item[1])),
    )


def survey(name: str, build: Build, ranks: int, verified: Sequence[int] = ()) -> Row:
    """Explain one model, and run it on as many simulated ranks as ``verified`` says.

    What cannot be built or compiled is a row as well, with its reason.
    """
    kind = ""
    try:
        model, inputs = build()
        kind = type(model).__name__
        found = measure(_explained(model, inputs, ranks, {"plan": "infer"}))
        own = _own(model, inputs, ranks)
        worst = _error(model, inputs, verified) if verified else ""
    except Exception as error:  # noqa: BLE001  (the table says what failed)
        what = "refused" if isinstance(error, FxspError) else "not traced" if kind else "not built"
        logging.getLogger(__name__).info("%s", traceback.format_exc())
        return Row(name, kind, forbids=f"{what}: {type(error).__name__}: {_short(str(error))}")
    forbids = [f"{_short(what)}: {work / found.total:.0%}" for what, work in found.whole.items() if work][:3]
    if ranks * found.rank - found.total > 2 * ranks * sum(found.whole.values()):
        forbids = ["pads, and pieces of sequences that are whole", *forbids]
    return Row(
        name,
        kind,
        f"{found.graphs} ({found.split})",
        f"{found.part:.3f}",
        str(found.sent),
        str(found.gathers),
        f"{found.infer:.2f} of {found.seconds:.2f}",
        own,
        worst,
        "; ".join(forbids) if found.part > _enough(ranks) else "",
    )


def _own(model: torch.nn.Module, inputs: dict[str, Any], ranks: int) -> str:
    """The same with the plan that the class carries, where it has one."""
    if not getattr(model, "_sp_plan", None) and not getattr(model, "_cp_plan", None):
        return ""
    explanation = _explained(model, inputs, ranks, {})
    if any(result.report.inferred is not None for result in explanation.results):
        return "does not fit"
    found = measure(explanation)
    return f"{found.part:.3f}, {found.sent}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without gradients, and without what models and compilers print and warn of."""
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _error(model: torch.nn.Module, inputs: dict[str, Any], sizes: Sequence[int]) -> str:
    """The largest error of the outputs on simulated ranks; what is not right says so."""
    with _quietly():
        evidence = fxsp.verify(model, world_size=tuple(sizes), options={"plan": "infer"}, **inputs)
    largest = max((error for graph in evidence.graphs for error in graph.outputs), default=0.0)
    return f"{largest:.0e}" if evidence.ok else f"WRONG {largest:.0e}"


def _explained(model: torch.nn.Module, inputs: dict[str, Any], ranks: int, options: dict[str, Any]) -> Explanation:
    with _quietly():
        return fxsp.explain(model, world_size=ranks, options=options, **inputs)


def _enough(ranks: int) -> float:
    return ENOUGH * 2 / ranks


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= 160 else f"{text[:157]}..."


def totals(rows: list[Row], ranks: int) -> str:
    """The last line."""
    parts = [row.part for row in rows]
    enough = sum(part is not None and part <= _enough(ranks) for part in parts)
    some = sum(part is not None and _enough(ranks) < part < 0.99 for part in parts)
    whole = sum(part is not None and part >= 0.99 for part in parts)
    return (
        f"{len(rows)} models: in {enough} a rank of {ranks} does at most {_enough(ranks):.2f} of the work, in {some} "
        f"more, {whole} run whole, {sum(part is None for part in parts)} are not compiled"
    )


def read(path: Path) -> Iterator[Row]:
    """The rows of a table that was written before."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == len(HEADINGS) and cells[0] not in (HEADINGS[0], "---"):
            yield Row(*cells)


def write(path: Path, rows: list[Row], ranks: int) -> None:
    """The table as Markdown."""
    import diffusers
    import transformers

    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    table = [HEADINGS, ("---",) * len(HEADINGS), *(astuple(row) for row in rows)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    path.write_text(
        f"{_PREAMBLE.format(ranks=ranks, **versions)}\n{text}\n\n{totals(rows, ranks)}.\n", encoding="utf-8"
    )


def all_models() -> dict[str, Build]:
    """Name -> a function that builds a model and its inputs."""
    from survey_diffusers import MODELS as OF_SOUND
    from survey_images import MODELS as OF_IMAGES
    from survey_transformers import MODELS as OF_TRANSFORMERS
    from survey_video import MODELS as OF_FILMS

    return {**OF_IMAGES, **OF_FILMS, **OF_SOUND, **OF_TRANSFORMERS}


def main() -> None:
    """Print a line for each model, and the totals."""
    models = all_models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help=f"some of: {', '.join(models)}")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--verify", nargs="+", type=int, default=(), metavar="RANKS", help="also run it on so many")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of what fails")
    arguments = parser.parse_args()
    unknown = set(arguments.models) - models.keys()
    if unknown:
        parser.error(f"there is no model {', '.join(sorted(unknown))}")
    if arguments.verbose:
        logging.basicConfig(level=logging.ERROR)
        logging.getLogger(__name__).setLevel(logging.INFO)
    torch.set_num_threads(1)
    rows = {row.name: row for row in read(arguments.markdown)} if arguments.markdown else {}
    print(Row(*HEADINGS).line)
    for name in arguments.models or models:
        rows[name] = survey(name, models[name], arguments.ranks, arguments.verify)
        print(rows[name].line, flush=True)
        if arguments.markdown:
            write(arguments.markdown, [rows[known] for known in models if known in rows], arguments.ranks)
    print(totals([rows[known] for known in models if known in rows], arguments.ranks))


if __name__ == "__main__":
    main()
