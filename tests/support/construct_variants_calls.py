"""Arguments and results of all kinds, and ways to compile and to call."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from construct_variants_base import Built, add, hook, model, variant
from constructs import DIM, PLAN, ROOT_PLAN, Block, Construct, Root, Wrap
from fxsp import SequenceParallelInput

# --- arguments and results ------------------------------------------------------------------------------------------


class Keywords(Root):
    def forward(self, *, x: Tensor, scale: float = 1.0, steps: int = 2, flag: bool = True, extra: Any = None) -> Any:
        for _ in range(steps):
            x = self.block(self.first(x)) * scale
        return (self.last(x) if flag else x), None, extra["a"]


def _keywords(wrap: Wrap) -> Built:
    root = Keywords()
    fast = wrap(root)
    return lambda x: fast(x=x, scale=0.5, extra={"a": x * 2, "b": (1, None)}), root


add(Construct("keywords", _keywords), "", "")
add(Construct("keywords_split_at_the_root", _keywords, plan=ROOT_PLAN), "", "")


class Containers(Root):
    def forward(self, pair: tuple[Tensor, int], more: dict[str, Any]) -> Tensor:
        (x, n), (c, k) = pair, more["c"]
        return self.last(self.block(self.first(x))) * c + k + n


@variant(plan={"": {"pair": [SequenceParallelInput(split_dim=1), None]}})
def containers(wrap: Wrap) -> Built:
    root = Containers()
    fast = wrap(root)
    return lambda x: fast((x, 3), {"c": (x.cos(), 2)}), root


class Pair(NamedTuple):
    hidden: Tensor
    nothing: Any


class NamedBlock(Block):
    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        return Pair(super().forward(x), None)


class NamedRoot(Root):
    def __init__(self) -> None:
        super().__init__(NamedBlock())

    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        out = self.block(self.first(x))
        return Pair(self.last(out.hidden), {"n": None, "k": 3, "y": out.hidden})


model(plan=PLAN)(NamedRoot)


class Numbers(Root):
    def forward(self, x: Tensor, t: float, n: int) -> Tensor:
        return self.last(self.block(self.first(x)) * t) + n


@variant(calls=3)
def numbers_that_change(wrap: Wrap) -> Built:
    root = Numbers()
    fast = wrap(root)
    calls = iter(range(1, 100))

    def run(x: Tensor) -> Tensor:
        n = next(calls)
        return fast(x, 0.1 * n, n)

    return run, root


# --- ways to compile and to call ------------------------------------------------------------------------------------


@variant()
def functional_call(wrap: Wrap) -> Built:
    root = Root()
    fast = wrap(lambda parameters, x: torch.func.functional_call(root, parameters, (x,)))
    return lambda x: fast({name: p * 1.5 for name, p in root.named_parameters()}, x), root


@variant(backward=False, whole="no entry of the plan applies")
def gradient_of_the_model(wrap: Wrap) -> Built:
    """``torch.func.grad`` around everything: it is not opened, so nothing in it is split."""
    root = Root()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(root, parameters, (x,)).square().mean()

    return wrap(lambda x: torch.func.grad(loss)(dict(root.named_parameters()), x)), root


@variant()
def partial_function(wrap: Wrap) -> Built:
    root = Root()
    return wrap(functools.partial(lambda scale, x: root(x) * scale, 2.0)), root


@variant()
def copied_model(wrap: Wrap) -> Built:
    root = Root()
    twin = copy.deepcopy(root)
    return wrap(twin), twin


@variant(calls=2)
def train_and_eval(wrap: Wrap) -> Built:
    root = Root(Block(nn.Dropout(0.4)))
    fast = wrap(root)
    return lambda x: fast.train(not root.training)(x) if fast is not root else root.train(not root.training)(x), root


@variant(calls=2)
def one_into_another(wrap: Wrap) -> Built:
    both = nn.ModuleList([Root(), Root()])
    first, second = wrap(both[0]), wrap(both[1])
    return lambda x: second(first(x)), both


class Recurrent(Root):
    """Dynamo skips a forward that calls an RNN: the block is a frame of its own, and the plan is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(DIM, DIM, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.block(x))[0])


model()(Recurrent)


@hook(whole="no entry of the plan applies")
def linearized(y: Tensor) -> Tensor:
    """A graph break, and graphs that belong to no module of the model."""
    return torch.func.linearize(lambda z: z.sin() * z.mean(1, keepdim=True), y)[1](y)
