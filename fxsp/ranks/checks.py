"""Are the inputs equal on all ranks?

The values of the inputs are compared at the first call of each compiled graph: data in full, weights by a sample of
each, the state of the generators that the graph draws from.  ``options={"check_inputs": True}`` compares at every call
(each parameter once, in full), which synchronizes with the host; ``False`` never does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxsp import torch_internals
from fxsp.ranks.alike import Alike, random_states
from fxsp.ranks.channel import Channel

__all__ = ["check_inputs", "value_topics"]

#: Words in a row of the table whose sums a digest is made of, and elements of a weight that a sample has.
_ROW, _SAMPLE = 1024, 64


def _sums(value: Tensor) -> Tensor:
    """int64[2]: all words of 64 bits as a table, the sums of its rows and of its columns, weighted by position.

    The values are read twice, and nothing of their size is made.
    """
    flat = value.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // (8 * _ROW) * (8 * _ROW)
    table = flat[:whole].view(torch.int64).view(-1, _ROW)
    rest = flat[whole:]
    rest = torch.nn.functional.pad(rest, (0, -rest.numel() % 8)).view(torch.int64)
    sums = torch.cat([table.sum(1), rest]), torch.cat([table.sum(0), rest])
    return torch.stack([(x * _weights(x.numel(), x.device)).sum() for x in sums])


def _weights(count: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern, so that what is added in one place does not cancel elsewhere."""
    return torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15 | 1


def _stable(parts: tuple[Any, ...]) -> int:
    """A hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) % 2**62


def check_inputs(
    run: Callable[..., Any], alike: Alike, channel: Channel, each_call: bool = False
) -> Callable[..., Any]:
    """``run``, but raising :class:`InputMismatchError` on every rank if the values of an input differ between ranks.

    At the first call, or at each call; see the module.
    """
    # One graph may serve several instances of a model: each has parameters of its own.
    checked_parameters = WeakIdKeyDictionary()
    compared = False

    def checked(*args: Any) -> Any:
        nonlocal compared
        if each_call or not compared:
            new = [(n, a) for n, a in zip(alike.names, args, strict=True) if a not in checked_parameters]
            shapes = ", ".join(f"{name} {list(a.shape)}" for name, a in new if _is_data(a))
            what = f"calls the graph of {alike.graph}, compiled before, for {shapes or 'no tensors'}"
            topics = value_topics(new, weights_in_full=each_call) | random_states(alike.draws)
            channel.agree(f"call of {alike.graph}", what, topics)
            # Whoever calls again after an error is compared again.
            compared = True
            for _, value in new:
                if isinstance(value, torch.nn.Parameter) and each_call:
                    checked_parameters[value] = None
        return run(*args)

    return checked


def value_topics(inputs: Sequence[tuple[str, Any]], *, weights_in_full: bool) -> dict[str, str]:
    """The values of inputs as topics, one for data and one for weights."""
    found: dict[int, Tensor | list[int]] = {}
    samples: dict[Any, list[tuple[int, Tensor]]] = {}
    for i, (_, value) in enumerate(inputs):
        tensors = torch_internals.plain_tensors(value)
        if tensors is None:
            found[i] = [_stable((_text(value),)), 0]
        elif isinstance(value, torch.nn.Parameter) and not weights_in_full:
            for tensor in tensors:
                samples.setdefault((tensor.device, tensor.dtype), []).append((i, _sample(tensor)))
        else:
            found[i] = torch.stack([_sums(tensor) for tensor in tensors]).sum(0)
    # One copy to the host for each device, and one for each dtype of the weights.
    texts = {i: str(row) for i, row in found.items() if not isinstance(row, Tensor)}
    for device in {row.device for row in found.values() if isinstance(row, Tensor)}:
        here = [i for i, row in found.items() if isinstance(row, Tensor) and row.device == device]
        rows = torch.stack([found[i] for i in here]).tolist()  # type: ignore[misc]
        texts.update({i: _hexadecimal(row) for i, row in zip(here, rows, strict=True)})
    for group in samples.values():
        everything = bytes(torch.cat([sample for _, sample in group]).cpu().view(torch.uint8).numpy())
        start = 0
        for i, sample in group:
            end = start + sample.numel() * sample.itemsize
            texts[i] = texts.get(i, "") + hashlib.blake2b(everything[start:end], digest_size=8).hexdigest()
            start = end
    lines: dict[str, list[str]] = {"values": [], "weights": []}
    for i, (name, value) in enumerate(inputs):
        topic = "weights" if isinstance(value, torch.nn.Parameter) else "values"
        lines[topic].append(f"{name} {_text(value)} with digest {texts[i]}")
    return {topic: "\n".join(rows) for topic, rows in lines.items()}


def _sample(weight: Tensor) -> Tensor:
    """Elements of a weight at even distances, its first and its last ones among them; a view, where it can be."""
    flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach().flatten()
    step = max((flat.numel() - 1) // (_SAMPLE - 1), 1)
    return flat[::step]


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)[:200]


def _hexadecimal(numbers: Sequence[int]) -> str:
    return "".join(f"{n % 2**64:016x}"[:8] for n in numbers)


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)
