"""How constructs that few think of are registered, each with what becomes of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from constructs import Block, Construct, Root, Wrap, tokens

__all__ = ["GATHERED", "SPLIT", "WHOLE", "Built", "add", "hook", "model", "no_gradients", "variant"]

Hook = Callable[[Tensor], Tensor]
Built = tuple[Callable[..., Any], nn.Module]
Build = Callable[[Wrap], Built]

#: Tokens stay split: no implicit gather.
SPLIT: dict[str, Construct] = {}
#: The tokens are gathered for an operator: the construct, and words of the implicit gather.
GATHERED: dict[str, tuple[Construct, str]] = {}
#: A graph runs whole: the construct, and words of the reason.
WHOLE: dict[str, tuple[Construct, str]] = {}


def add(item: Construct, gathers: str, whole: str) -> None:
    if whole:
        WHOLE[item.name] = item, whole
    elif gathers:
        GATHERED[item.name] = item, gathers
    else:
        SPLIT[item.name] = item


def variant(*, gathers: str = "", whole: str = "", **settings: Any) -> Callable[[Build], Build]:
    """Register a construct; ``gathers`` and ``whole`` are words of what the report says, without them it is split."""

    def register(build: Build) -> Build:
        add(Construct(build.__name__, build, **settings), gathers, whole)
        return build

    return register


def hook(*, gathers: str = "", whole: str = "", gradients: bool = True) -> Callable[[Hook], Hook]:
    """Register what a block applies to its attention's output."""

    def register(apply: Hook) -> Hook:
        def build(wrap: Wrap) -> Built:
            model = Root(Block(apply)).requires_grad_(gradients)
            return wrap(model), model

        settings: dict[str, Any] = {} if gradients else {"inputs": no_gradients, "backward": False}
        add(Construct(apply.__name__, build, **settings), gathers, whole)
        return apply

    return register


def model(*, gathers: str = "", whole: str = "", **settings: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a model."""

    def register(make: type[nn.Module]) -> type[nn.Module]:
        def build(wrap: Wrap) -> Built:
            made = make()
            return wrap(made), made

        add(Construct(make.__name__, build, **settings), gathers, whole)
        return make

    return register


def no_gradients() -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in tokens())
