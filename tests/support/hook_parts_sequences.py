"""Text that stays whole before what is split, and several split sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hook_parts_base import Attend, D, In, Part, Partial, part, x

# --- partial inputs ---------------------------------------------------------------------------------------------------


class Joint(nn.Module):
    """``[text, image]`` in one sequence; ``ids`` and ``count`` tell how long the text is."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.text, self.image = Attend(), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, ids: Tensor | None = None, count: int = 0) -> Tensor:
        n = count if ids is None else ids.shape[0 if ids.dim() <= 2 else 1]
        x = self.attend(x)
        return torch.cat([self.text(x[:, :n]), self.image(x[:, n:])], 1)


@part
def partial_by_number() -> Part:
    inputs = [((x(n),), {"count": 3}) for n in (10, 4, 3, 7)]
    return Part(Joint(), {"": {"x": Partial(1, 3)}}, inputs, {"attend": (3, -7)})


@part
def partial_by_a_tensor() -> Part:
    ids = [torch.zeros(3), torch.zeros(4, 3), torch.zeros(2, 5, 3)]
    inputs = [((x(12),), {"ids": value}) for value in ids]
    return Part(Joint(), {"": {"x": Partial(1, "ids")}}, inputs, {"attend": (3, -9)})


@part
def partial_by_an_integer() -> Part:
    inputs = [((x(12), None, n), {}) for n in (5, 0, 12)]
    return Part(Joint(), {"": {"x": Partial(1, "count", 3)}}, inputs, {"attend": (5, -7)})


class JointInside(nn.Module):
    """The length of the text is an argument of the model, not of the block."""

    def __init__(self, outputs: bool) -> None:
        super().__init__()
        self.prepare, self.block = nn.Identity() if outputs else None, Attend()

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        both = torch.cat([encoder_hidden_states, x], 1)
        if self.prepare is not None:
            both = self.prepare(both)
        return self.block(both)[:, encoder_hidden_states.shape[1] :]


@part
def partial_by_an_argument_of_the_model() -> Part:
    inputs = [((x(9), x(4, seed=5)), {}), ((x(3),), {"encoder_hidden_states": x(2, seed=5)})]
    return Part(JointInside(False), {"block": {"x": Partial(1, "encoder_hidden_states")}}, inputs, {"block.q": (4, -9)})


@part
def partial_outputs() -> Part:
    plan = {"prepare": {0: Partial(1, "encoder_hidden_states", split_output=True)}}
    return Part(JointInside(True), plan, [((x(8), x(3, seed=5)), {})], {"block": (3, -8)})


# --- several sequences ------------------------------------------------------------------------------------------------


class Streams(nn.Module):
    """Joint attention of two split sequences of different length, as in Flux; and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.cross, self.out = Attend(), Attend(), nn.Linear(D, D)

    def forward(self, image: Tensor, text: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        both = self.attend(torch.cat([text, image], 1))
        text, image = both.split([text.shape[1], image.shape[1]], 1)
        return self.out(self.cross(image, context)), text * 2


STREAMS = [((x(10), x(3, seed=6), x(5, seed=7)), {}), ((x(4), x(7, seed=6), x(1, seed=7)), {})]
STREAMS += [((x(1), x(2, seed=6), x(2, seed=7)), {})]


@part
def two_sequences() -> Part:
    return Part(Streams(), {"": {"image": In(1), "text": In(1)}}, STREAMS, {"cross": (-10,)})


@part
def three_sequences() -> Part:
    return Part(Streams(), {"": {"image": In(1), "text": In(1), "context": In(1)}}, STREAMS)


@part
def cross_attention_to_split_keys() -> Part:
    inputs = [((x(n),), {"context": x(m, seed=8)}) for n, m in ((7, 5), (2, 9), (4, 1))]
    return Part(Attend(), {"": {"x": In(1), "context": In(1)}}, inputs)


@part
def whole_queries_of_split_keys() -> Part:
    return Part(Attend(), {"": {"context": In(1)}}, [((x(7),), {"context": x(5, seed=8)})])
