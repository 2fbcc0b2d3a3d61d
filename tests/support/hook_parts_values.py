"""Arguments, however they are passed, and outputs in containers of every kind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hook_parts_base import Attend, D, In, Out, Part, calls, part, x

# --- how arguments are passed -----------------------------------------------------------------------------------------


class Optional(nn.Module):
    """Arguments of every kind; ``extra`` is often left out."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.lin = Attend(), nn.Linear(D, D)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, scale: float = 1.0, late: Tensor | None = None):
        if extra is not None:
            x = x + self.lin(extra)
        if late is not None:
            x = x * late
        return self.attend(x) * scale


@part
def arguments() -> Part:
    plan = {"": {"x": In(1, 3), "extra": In(1, 3), "late": In(1)}}
    return Part(
        Optional(),
        plan,
        [
            ((x(7),), {}),
            ((), {"x": x(7)}),
            ((x(7), x(7, seed=1)), {}),
            ((x(5),), {"extra": x(5, seed=1), "scale": 2.0}),
            ((), {"late": x(4, seed=2), "x": x(4)}),
            ((x(3), None), {"late": None}),
            ((x(1),), {}),
        ],
        tokens={"attend": (-7,)},
    )


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.attend(x + kwargs["more"]) if "more" in kwargs else self.attend(x)


@part
def keywords_without_a_name() -> Part:
    return Part(Anything(), {"": {"x": In(1), "more": In(1)}}, [((x(5),), {}), ((x(5),), {"more": x(5, seed=3)})])


class Pair(NamedTuple):
    cos: Tensor
    sin: Tensor


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()

    def forward(self, x: Tensor, rotary: Any, skip: Any = None) -> Tensor:
        x = x * rotary[0] + x.roll(1, -1) * rotary[1]
        return self.attend(x if skip is None else x + skip[1])


class Rotating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Rotated(), Rotated()])

    def forward(self, x: Tensor, kind: Any = tuple, skip: Any = None) -> Tensor:
        angles = torch.linspace(0, 1, x.shape[1] * D).view(1, x.shape[1], D)
        for block in self.blocks:
            values = [angles.cos(), angles.sin()]
            x = block(x, Pair(*values) if kind is Pair else kind(values), skip=skip)
        return x


@part
def tuples_as_arguments() -> Part:
    plan = {"blocks.*": {"x": In(1), "rotary": [In(1), In(1)], "skip": [None, In(1)]}}
    inputs = [((x(n), kind), {}) for n, kind in ((7, tuple), (4, list), (5, Pair))]
    return Part(Rotating(), plan, [*inputs, ((x(6), tuple, [x(2), x(6, seed=4)]), {})], {"blocks.0.attend": (-7,)})


# --- outputs ----------------------------------------------------------------------------------------------------------


class Prepare(nn.Module):
    """Returns its arguments and tables, in a container of some kind."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.lin = kind, nn.Linear(D, D)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Any:
        table = torch.linspace(0, 1, x.shape[1] * D).view(x.shape[1], D)
        values = [self.lin(x), table.cos(), x.mean(1, keepdim=True)]
        if self.kind is dict:
            return dict(zip("abc", values, strict=True))
        return self.kind(values)


class Prepared(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.prepare, self.attend, self.kind = Prepare(kind), Attend(), kind

    def forward(self, x: Tensor) -> Tensor:
        values = self.prepare(x)
        y, table, mean = values.values() if self.kind is dict else values
        assert type(values) is self.kind
        return self.attend(y * table + mean)


def _outputs(kind: Any) -> Part:
    plan = {"prepare": {0: In(1, 3, split_output=True), 1: In(0, split_output=True)}, "attend": Out(1)}
    return Part(Prepared(kind), plan, calls(x(7), x(2), x(9)), {"prepare": (7,), "attend": (-7,)})


@part
def outputs_of_a_tuple() -> Part:
    return _outputs(tuple)


@part
def outputs_of_a_list() -> Part:
    return _outputs(list)


@part
def outputs_of_a_dictionary() -> Part:
    return _outputs(dict)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x), self.b(x), x


class Gathered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = Two()

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.two(x)
        return a.cumsum(1) + (b + c).cumsum(1)


@part
def gather_of_a_list() -> Part:
    plan = {"": {"x": In(1)}, "two": [Out(1), Out(1), Out(1)]}
    return Part(Gathered(), plan, calls(x(7), x(3)), {"two": (-7,)})


class Some(nn.Module):
    """Of three outputs the second stays split, and the model's own output becomes whole by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.attend = Two(), Attend()

    def forward(self, x: Tensor) -> dict[str, Any]:
        a, b, c = self.two(x)
        return {"out": self.attend(b), "whole": [a.cumsum(1), c]}


@part
def gather_of_some_outputs() -> Part:
    return Part(Some(), {"": {"x": In(1)}, "two": [Out(1), None, Out(1)]}, calls(x(7), x(2)), {"attend": (-7,)})
