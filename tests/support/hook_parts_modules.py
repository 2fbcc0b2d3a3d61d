"""Entries of a plan for modules deep in a model, for all of a list, and for one that is called twice."""

from __future__ import annotations

from torch import Tensor

from hook_parts_base import Attend, Body, Deep, In, Out, Part, calls, part, sdpa, x


@part
def nested_modules() -> Part:
    plan = {"body": {"x": In(1)}, "body.blocks.1": Out(1), "body.blocks.2": {"x": In(1)}, "out": Out(1)}
    return Part(Deep(), plan, calls(x(7), x(4)), {"body.blocks.1": (-7,), "body.blocks.2.attn": (-7,), "out": (-7,)})


@part
def wildcards() -> Part:
    """Every attention splits and gathers by itself; between them everything is whole."""
    plan = {"body.blocks.*.attn": {"x": In(1)}, "body.blocks.*.attn.o": Out(1)}

    class Own(Attend):
        def forward(self, x: Tensor) -> Tensor:
            return self.o(sdpa(self.q(x), self.k(x), self.v(x), self.heads))

    model = Deep()
    for block in model.body.blocks:
        block.attn = Own()
    tokens = {"body.blocks.0.attn": (7,), "body.blocks.0.ff.0": (7,), "body.blocks.2.attn.o": (-7,)}
    return Part(model, plan, calls(x(7), x(5)), tokens)


@part
def one_module_called_twice() -> Part:
    model = Body(1)
    model.blocks.append(model.blocks[0])
    return Part(model, {"blocks.*": {"x": In(1)}}, calls(x(7), x(1)), {"blocks.0.attn": (-7,)})
