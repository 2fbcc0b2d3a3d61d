"""``fxsp.parallelize``: a model or a pipeline, compiled as suits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from torch import nn

from fxsp.config import Options
from fxsp.errors import OptionError
from fxsp.parts import DENOISERS, denoisers, repeated_blocks
from fxsp.torch_internals import is_stand_in

__all__ = ["parallelize"]

_T = TypeVar("_T")


def parallelize(
    model: _T,
    mesh: Any = None,
    plan: Any = None,
    regional: bool | Literal["auto"] = "auto",
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> _T:
    """Compile ``model`` in place for its tokens to be split over the ranks, and return it.

    ``model`` is any ``nn.Module``, or a pipeline of diffusers, of which the denoisers are compiled: ``transformer``,
    ``transformer_2``, ``unet``.  ``mesh`` is a one-dimensional ``DeviceMesh`` of the ranks that share a sequence
    (default: all processes), ``plan`` replaces the model's own; ``options`` are further options of the backend
    (:class:`fxsp.Options`), ``dynamic`` is that of ``torch.compile``.  Call it on every rank; nothing is compiled
    before the first call of the model.

    This is ``module.compile(backend="sp", options=...)``, of the model as a whole, or of each of its repeated blocks
    (``regional=True``), which takes one compilation for each kind of block however many there are.  ``"auto"`` takes
    blocks where they are known and no plan is given: entries of a plan speak of the model's own inputs, too, which
    blocks do not see.  :func:`fxsp.report_of` says what was made of it.

    Raises ``TypeError`` for what is neither a model nor a pipeline, and :class:`~fxsp.errors.OptionError` for unknown
    options, and for ``regional=True`` of a model without repeated blocks.
    """
    if regional not in (True, False, "auto"):
        raise OptionError(f'regional is {regional!r}; it is True, False or "auto"')
    given = dict(options or {})
    given |= {name: value for name, value in (("mesh", mesh), ("plan", plan)) if value is not None}
    Options.parse(given)  # what is wrong with them is said here, and not in the first call
    for module in _models(model):
        blocks = [] if regional is False or (regional == "auto" and "plan" in given) else repeated_blocks(module)
        if regional is True and not blocks:
            raise OptionError(
                f"regional=True, but no repeated blocks are known of {type(module).__name__}: neither _repeated_blocks "
                "nor _no_split_modules names several modules, and no ModuleList of one class has most weights in it.\n"
                '  Compile blocks by themselves (block.compile(backend="sp")), or the model as a whole (regional=False)'
            )
        for part in blocks or [module]:
            part.compile(backend="sp", options=dict(given), dynamic=dynamic)
    return model


def _models(model: Any) -> list[nn.Module]:
    if is_stand_in(model):
        raise TypeError("parallelize takes a model as it is, and this one is what torch.compile has made of one")
    if isinstance(model, nn.Module):
        return [model]
    found = list({id(module): module for module in denoisers(model).values()}.values())
    if found:
        return found
    what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise TypeError(
        f"parallelize takes a torch.nn.Module, or a pipeline with a model named {', '.join(DENOISERS)}, not {what}.\n"
        '  For a function: torch.compile(function, backend="sp"); of another pipeline, give its models one by one'
    )
