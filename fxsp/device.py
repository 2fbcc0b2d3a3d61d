"""What a device and the links between its like can do: one description for choosing, for inferring and for drawing.

Ways to attend are chosen by their bytes and messages over a link (:mod:`fxsp.passes.attention.choose`), plans are
inferred by operations, bytes and messages (:mod:`fxsp.passes.infer.price`), and a timeline draws when each of them
would happen (:mod:`fxsp.cost.timeline`).

Devices that are known by name are a table with its sources (:mod:`fxsp.known_devices`); the numbers of :data:`CPU` are
what small products reach on one core, and gloo between processes of one machine.  Several devices, in one node or more,
are a :class:`~fxsp.machine.Machine`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxsp.known_devices import DEVICES, LAUNCH, LINKS
from fxsp.lengths import hint
from fxsp.types import Length

__all__ = ["CPU", "H100", "Device", "Link", "device_named", "device_of", "link_named"]


@dataclass(frozen=True)
class Link:
    """What a message costs: ``latency`` in seconds, and ``bandwidth`` in bytes per second that a rank sends."""

    latency: float
    bandwidth: float

    @classmethod
    def of(cls, kind: str, latency: float | None = None, bandwidth: float | None = None) -> Link:
        """What is chosen with, for a device type, as options describe it; without, bytes decide: no latency."""
        return cls(latency or 0.0, device_of(kind).link.bandwidth if bandwidth is None else bandwidth)

    def seconds(self, messages: int, sent: Length) -> float:
        """What so many messages, of ``sent`` bytes in all, take."""
        return messages * self.latency + hint(sent) / self.bandwidth


@dataclass(frozen=True)
class Device:
    """Operations and bytes of its memory per second, seconds to start a kernel, and the link to the other ranks."""

    name: str
    flops: float
    bandwidth: float
    launch: float
    link: Link

    def seconds(self, operations: int, moved: int) -> float:
        """What a kernel takes that computes and moves so much: the longer of the two."""
        return self.launch + max(operations / self.flops, moved / self.bandwidth)

    def linked(self, latency: float | None, bandwidth: float | None) -> Device:
        """The device with the link that ways to attend are chosen with, where options describe it."""
        if latency is None and bandwidth is None:
            return self
        own = self.link
        link = Link(own.latency if latency is None else latency, own.bandwidth if bandwidth is None else bandwidth)
        name = f"{self.name.partition(',')[0]}, {link.latency * 1e6:g} us and {link.bandwidth / 1e9:g} GB/s to others"
        return replace(self, name=name, link=link)


CPU = Device("a CPU core, gloo", flops=5e9, bandwidth=5e9, launch=0.0, link=Link(50e-6, 2e9))


def link_named(name: str) -> Link:
    """A link of :data:`fxsp.known_devices.LINKS`."""
    _, latency, bandwidth, _ = LINKS[name]
    return Link(latency, bandwidth)


def device_named(name: str) -> Device:
    """A device of :data:`fxsp.known_devices.DEVICES`, with the link to others of its node."""
    title, flops, bandwidth, link, _ = DEVICES[name]
    return Device(f"{title}, {LINKS[link][0]}", flops, bandwidth, LAUNCH, link_named(link))


H100 = device_named("h100")


def device_of(kind: str) -> Device:
    """For a device type of torch (``"cpu"``, ``"cuda"``, ``"meta"``): what no CPU is, is meant for a large GPU."""
    return CPU if kind == "cpu" else H100
