"""What each way to run an attention costs: bytes on the wire, messages, and the time that they take.

Per rank, forward; ``q`` are the local bytes of queries and output, ``kv`` those of keys and values, on ``P = u * r``
ranks:

========== ============================== ==================================================
method     bytes                          messages, one after the other
========== ============================== ==================================================
ulysses    (q + kv) (P-1)/P               2: an all-to-all in, one out
ring       kv (P-1)                       P-1
hybrid     (q + kv) (u-1)/u + kv (r-1)    2 + r-1
gather_kv  kv (P-1)                       1
========== ============================== ==================================================

Time is ``messages * latency + bytes / bandwidth``.  Passing on overlaps with computing in a ring, which is not counted;
of equal times the fewer messages win.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxsp.passes.decide import hint
from fxsp.types import Length, as_length

__all__ = ["Candidate", "Link", "exchange_bytes", "factorizations"]


@dataclass(frozen=True)
class Link:
    """What a message costs: ``latency`` in seconds, and ``bandwidth`` in bytes per second that a rank sends."""

    latency: float
    bandwidth: float

    @classmethod
    def of(cls, device: str, latency: float | None = None, bandwidth: float | None = None) -> Link:
        """For a device type; None: no latency, so that bytes decide, and 2 GB/s on the CPU, 100 GB/s elsewhere."""
        usual = 2e9 if device == "cpu" else 1e11
        return cls(latency or 0.0, usual if bandwidth is None else bandwidth)


@dataclass(frozen=True)
class Candidate:
    """One way to run an attention; ``refusal`` says why it is not legal."""

    method: str
    ulysses: int
    ring: int
    sent: Length
    spread: int = 1
    refusal: str = ""

    @property
    def name(self) -> str:
        return f"hybrid {self.ulysses} x {self.ring}" if self.method == "hybrid" else self.method

    @property
    def messages(self) -> int:
        if self.method == "gather_kv":
            return 1
        return (2 if self.ulysses > 1 else 0) + self.ring - 1

    def seconds(self, link: Link) -> float:
        return self.messages * link.latency + hint(self.sent) / link.bandwidth

    def text(self, link: Link) -> str:
        """The cost, or why it is not legal."""
        if self.refusal:
            return self.refusal
        count = "1 message" if self.messages == 1 else f"{self.messages} messages"
        return f"sends {self.sent} bytes per rank in {count}, {self.seconds(link) * 1e6:.3g} us"


def exchange_bytes(q_bytes: Length, kv_bytes: Length, ulysses: int, ring: int) -> Length:
    """Bytes that a rank sends, forward: ``u`` ranks exchange heads, then keys and values go around ``r`` ranks.

    ``q_bytes`` are the local bytes of queries and output, ``kv_bytes`` those of keys and values.
    """
    sent = (q_bytes + kv_bytes) * (ulysses - 1) / ulysses + kv_bytes * (ring - 1)
    return round(sent) if isinstance(sent, float) else as_length(sent)


def factorizations(size: int) -> list[tuple[str, int, int]]:
    """``(method, u, r)`` for each ``u * r == size``, the largest exchange of heads first."""
    pairs = [(u, size // u) for u in range(size, 0, -1) if size % u == 0]
    return [("ulysses" if r == 1 else "ring" if u == 1 else "hybrid", u, r) for u, r in pairs]
