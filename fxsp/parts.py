"""Which modules of what people have are to be compiled: the denoisers of a pipeline, the repeated blocks of a model.

Nothing is imported to find out: a pipeline is an object with modules of certain names, blocks are named by the model
(``_repeated_blocks`` of diffusers, ``_no_split_modules`` of transformers) or stand side by side in a ``ModuleList``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["DENOISERS", "denoisers", "repeated_blocks"]

#: What a pipeline calls the models that it runs in every step (Wan 2.2 has two).
DENOISERS = ("transformer", "transformer_2", "unet")


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The models that a pipeline runs in every step, by name; none for what is no pipeline."""
    if isinstance(pipeline, nn.Module | type):
        return {}
    found = {name: getattr(pipeline, name, None) for name in DENOISERS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, several of a class, none inside of another; empty if they are not known.

    Those that its classes name; else the modules of ``ModuleList``s, each of one class, if these hold most of the
    parameters (embeddings aside).
    """
    named = _several(_named(model))
    if named:
        return _outermost(model, named)
    listed = _outermost(model, _several(_listed(model)))
    if 2 * _size(listed) > _size([model]):
        return listed
    return []


def _named(model: nn.Module) -> Iterator[nn.Module]:
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        names = {name for part in model.modules() for name in getattr(type(part), attribute, None) or ()}
        # FSDP2 derives a class of its own.
        found = [part for part in model.modules() if any(kind.__name__ in names for kind in type(part).__mro__)]
        if len(found) > 1:
            yield from found
            return


def _listed(model: nn.Module) -> Iterator[nn.Module]:
    for part in model.modules():
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1:
            kinds = {type(block) for block in part}
            if len(kinds) == 1 and not any(_is_layer(block) for block in part):
                yield from part


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a single layer of torch, as ``nn.Linear`` is."""
    return type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())


def _several(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    found = list(blocks)
    kinds = [type(block) for block in found]
    return [block for block in found if kinds.count(type(block)) > 1]


def _outermost(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """In the order of the model; without those inside of another one, and the model itself."""
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    wanted = {id(block) for block in blocks} - inside - {id(model)}
    return [part for part in model.modules() if id(part) in wanted]


def _size(modules: list[nn.Module]) -> int:
    counted: dict[int, int] = {}
    for module in modules:
        for part in module.modules():
            if not isinstance(part, nn.Embedding):
                counted |= {id(p): p.numel() for p in part.parameters(recurse=False)}
    return sum(counted.values())
