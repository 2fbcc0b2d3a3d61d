"""Where the ranks run: a device, how many of it a node has, and what collectives cost within a node and between nodes.

A machine is given (``options={"machine": ...}``) by its name, by a file, or is found again where :func:`fxsp.calibrate`
has measured the group at hand.  All that is decided by cost asks it: ways to attend, plans that are inferred, the
timeline of a report.  Without any it is the device at hand with one link for everything, by which bytes alone decide.

A name is that of a device (:mod:`fxsp.known_devices`), and how many of it a node has: ``h100x8`` is nodes of eight, as
many as the ranks need, ``2xh100x8`` two of them and no more, ``h100`` one node of any size.  Nodes are linked by one
adapter of 400G for each device.  Consecutive ranks of a group are on one node.

A file is JSON, with rates in operations and bytes per second, times in seconds::

    {"name": "ours", "device": {"name": "H100", "flops": 6e14, "bandwidth": 2.9e12, "launch": 2e-06}, "per_node": 8,
     "inside": {"all_to_all": {"latency": 2e-05, "bandwidth": 3.1e+11}, "any": "nvlink4"},
     "between": {"any": {"latency": 3e-05, "bandwidth": 4e+10}}}

``any`` stands for the collectives that are not named (of :data:`KINDS`), a string for a link that is known by name;
``per_node`` may be null (one node, and ``between`` is not needed).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fxsp.device import Device, Link, device_named, device_of, link_named
from fxsp.errors import OptionError
from fxsp.known_devices import DEVICES, LINKS, NETWORK
from fxsp.types import Length, as_length

__all__ = ["KINDS", "Machine", "Travel", "machine_of", "read_machine"]

#: What is sent: tokens and heads that are exchanged; values that are gathered; sums; blocks to the next rank.
KINDS = ("all_to_all", "all_gather", "all_reduce", "neighbour")
_NAME = re.compile(r"(?:(\d+)x)?([a-z][a-z0-9]*?)(?:x(\d+))?")


@dataclass(frozen=True)
class Travel:
    """Messages of one kind, and the bytes of all of them, among blocks of ``span`` consecutive ranks."""

    kind: str
    span: int
    messages: int
    sent: Length


@dataclass(frozen=True)
class Machine:
    """Devices in nodes.  ``device.link`` is that within a node, for kinds that ``inside`` does not have."""

    name: str
    device: Device
    #: Between nodes, for kinds that ``outside`` does not have.
    between: Link
    #: Devices of a node (None: all are on one), and nodes (None: as many as it takes).
    per_node: int | None = None
    nodes: int | None = None
    #: Kinds of collectives and their links, within a node and among ranks of several.
    inside: tuple[tuple[str, Link], ...] = ()
    outside: tuple[tuple[str, Link], ...] = ()

    def link(self, kind: str, span: int) -> Link:
        """What a collective among ``span`` consecutive ranks of the group costs a rank."""
        on_one = self.per_node is None or span <= 1 or self.per_node % span == 0
        within = dict(self.inside).get(kind, self.device.link)
        if on_one:
            return within
        assert self.per_node is not None
        across = dict(self.outside).get(kind)
        if across is not None:
            return across
        if kind != "all_to_all" or span <= self.per_node:
            return self.between  # the rank whose neighbour is on another node sets the pace
        # What stays in the node travels beside what leaves it.
        part = (span - self.per_node) / (span - 1)
        return Link(self.between.latency, min(self.between.bandwidth / part, within.bandwidth / (1 - part)))

    def seconds(self, travels: Iterable[Travel]) -> float:
        """What all of it takes, one after the other."""
        by_link: dict[Link, tuple[int, Length]] = {}
        for travel in travels:
            link = self.link(travel.kind, travel.span)
            messages, sent = by_link.get(link, (0, 0))
            by_link[link] = messages + travel.messages, as_length(sent + travel.sent)
        return sum(link.seconds(messages, sent) for link, (messages, sent) in by_link.items())

    def of(self, ranks: int) -> Machine:
        """The machine as so many ranks see it: those of one node do not ask how many others fit in it."""
        one = self.per_node is not None and ranks <= self.per_node
        return replace(self, per_node=None, nodes=None) if one else self

    def linked(self, latency: float | None, bandwidth: float | None) -> Machine:
        """The machine with one link for everything where options describe it."""
        if latency is None and bandwidth is None:
            return self
        device = self.device.linked(latency, bandwidth)
        return Machine(self.name, device, device.link, self.per_node, self.nodes)

    def seen_by(self, ranks: int) -> Device:
        """The device with the link that an exchange among so many ranks has: for a timeline."""
        link = self.of(ranks).link("all_to_all", ranks)
        return replace(self.device, name=f"{self.name}: {self.device.name}", link=link)

    def check(self, ranks: int) -> None:
        """Raises :class:`OptionError` if it has fewer devices than there are ranks."""
        if self.nodes is not None and self.per_node is not None and ranks > self.nodes * self.per_node:
            have = f"{self.nodes} node{'s' if self.nodes > 1 else ''} of {self.per_node}"
            raise OptionError(f"option 'machine': {self.name} is {have}, but there are {ranks} ranks")

    def to_json(self) -> str:
        """The text of its file."""
        device = {name: getattr(self.device, name) for name in ("name", "flops", "bandwidth", "launch")}
        inside, between = (
            {kind: {"latency": link.latency, "bandwidth": link.bandwidth} for kind, link in (*links, ("any", other))}
            for links, other in ((self.inside, self.device.link), (self.outside, self.between))
        )
        data = {"name": self.name, "device": device, "per_node": self.per_node, "nodes": self.nodes}
        return json.dumps(data | {"inside": inside, "between": between}, indent=1) + "\n"


def machine_of(kind: str, ranks: int, given: Machine | None, latency: float | None, bandwidth: float | None) -> Machine:
    """What is decided with for so many ranks on a device type of torch, as options describe it."""
    if given is not None:
        return given.of(ranks).linked(latency, bandwidth)
    link, device = Link.of(kind, latency, bandwidth), device_of(kind)
    return Machine(device.name, replace(device, link=link), link)


def read_machine(given: str | Path) -> Machine:
    """The machine of a name, or of a file; :class:`OptionError` if it is neither, or the file cannot be read."""
    text = str(given)
    found = _NAME.fullmatch(text)
    if found is not None and found[2] in DEVICES:
        nodes, per_node = (int(n) if n else None for n in (found[1], found[3]))
        if 0 in (nodes, per_node) or (nodes is not None and per_node is None):
            raise OptionError(f"option 'machine' is {text!r}: write the devices of a node, as in 2x{found[2]}x8")
        return Machine(text, device_named(found[2]), link_named(NETWORK), per_node, nodes)
    path = Path(given)
    if not path.is_file():
        raise OptionError(
            f"option 'machine' is {text!r}: neither a file nor a known machine.\n"
            f"  Known devices: {', '.join(DEVICES)}; h100x8 is nodes of eight, 2xh100x8 two of them. "
            "fxsp.calibrate(group) measures the machine at hand, and returns it."
        )
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"option 'machine': {path} does not describe a machine: {type(error).__name__}: {error}\n"
            f"  What stands in such a file: help(fxsp.machine). Links by name: {', '.join(LINKS)}"
        ) from error


def _parsed(data: Mapping[str, Any]) -> Machine:
    about = data["device"]
    per_node, nodes = (_count(data.get(name), name) for name in ("per_node", "nodes"))
    inside, within = _links(data["inside"])
    outside, between = _links(data["between"]) if per_node is not None or data.get("between") else ((), within)
    flops, bandwidth = (_number(about[name], name) for name in ("flops", "bandwidth"))
    launch = _number(about.get("launch", 0.0), "launch", zero=True)
    device = Device(str(about["name"]), flops, bandwidth, launch, within)
    return Machine(str(data["name"]), device, between, per_node, nodes, inside, outside)


def _links(data: Mapping[str, Any]) -> tuple[tuple[tuple[str, Link], ...], Link]:
    """Those of some kinds, in the order of :data:`KINDS`, and the one for the others: without ``any``, the slowest."""
    if unknown := sorted(set(data) - {*KINDS, "any"}):
        raise ValueError(f"no such collectives: {', '.join(unknown)}; there are {', '.join(KINDS)}, any")
    links = {
        kind: link_named(x)
        if isinstance(x, str)
        else Link(_number(x["latency"], "latency", zero=True), _number(x["bandwidth"], "bandwidth"))
        for kind, x in data.items()
    }
    if not links:
        raise ValueError("no links")
    other = links.get("any") or min(links.values(), key=lambda link: link.bandwidth)
    return tuple((kind, links[kind]) for kind in KINDS if kind in links), other


def _number(value: Any, name: str, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < math.inf):
        raise ValueError(f"{name} is {value!r}, no number")
    if value == 0 and not zero:
        raise ValueError(f"{name} is 0")
    return float(value)


def _count(value: Any, name: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} is {value!r}, no number of at least 1")
    return value
