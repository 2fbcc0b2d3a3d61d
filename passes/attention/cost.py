"""What each way to run an attention costs: bytes on the wire, messages, and the time that they take.

Per rank; ``q`` are the local bytes of queries and output, ``kv`` those of keys and values, on ``P = u * r`` ranks:

========== ============================== =============================== ===================================
method     bytes, forward                 bytes, backward                 messages forward (and backward)
========== ============================== =============================== ===================================
ulysses    (q + kv) (P-1)/P               the same                        2: an all-to-all in, one out (2)
ring       kv (r-1)                       kv (r-1) (1 + w)                r-1 (2 (r-1))
hybrid     (q + kv) (u-1)/u + kv (r-1)    (q + kv) (u-1)/u                2 + r-1 (2 + 2 (r-1))
                                          + kv (r-1) (1 + w)
gather_kv  kv (P-1)                       kv (P-1) w                      1 (1)
merged     see :mod:`fxsp.passes.attention.methods.split_kv`, for queries that are whole
========== ============================== =============================== ===================================

``w`` is how much wider the sum of gradients is than they are: 2 for halves, which are added in fp32, else 1.  A ring
passes keys and values on once more in the backward pass, with their gradients behind.  The backward pass counts where
gradients may be asked for.

Time is ``messages * latency + bytes / bandwidth``, each part of it over the link that it takes: an exchange of heads
among ``u`` consecutive ranks stays in a node that holds them, and keys and values go on between nodes
(:mod:`fxsp.machine`).  Passing on overlaps with computing in a ring, which is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxsp.machine import Machine, Travel
from fxsp.types import Length

__all__ = ["Way", "said"]


@dataclass(frozen=True)
class Way:
    """One way to run an attention: a method with its degrees; ``refusal`` says why it is not legal."""

    method: str
    #: Bytes that a rank sends, forward and (None: it is not asked for) backward.
    sent: Length
    backward: Length | None = None
    #: One after the other, forward.
    messages: int = 1
    refusal: str = ""
    #: Ranks that exchange heads, and ranks in a ring.  ulysses is (P, 1), ring (1, P), hybrid has both above 1: ranks
    #: ``i*u .. (i+1)*u`` exchange heads, and pass keys and values on to the ranks ``u`` further.
    ulysses: int = 1
    ring: int = 1
    #: How often key/value heads are repeated before they travel.
    spread: int = 1
    #: Bytes of keys and values that a rank holds gathered.
    held: Length = 0
    #: Another way is taken instead only if it takes at most this part of the time; 0: none is; None: the faster.
    margin: float | None = None
    #: All of it, forward and backward, by what is sent and how far.
    travels: tuple[Travel, ...] = ()
    #: More to say of it in the report.
    note: str = ""

    @property
    def name(self) -> str:
        both = self.ulysses > 1 and self.ring > 1
        return f"{self.method} {self.ulysses} x {self.ring}" if both else self.method

    @property
    def messages_backward(self) -> int:
        """As many, and a ring passes gradients on, too."""
        return 0 if not self.backward else self.messages + (self.ring - 1)

    def seconds(self, machine: Machine) -> float:
        return machine.seconds(self.travels)

    def text(self, machine: Machine) -> str:
        """The cost, or why it is not legal."""
        return self.refusal or f"sends {self.sent} bytes per rank in {self.cost(machine)}"

    def cost(self, machine: Machine) -> str:
        """Messages, the bytes of the backward pass, and the time; nothing where nothing is sent for it."""
        return (
            said(self.messages, self.backward, self.messages_backward, self.seconds(machine)) if self.messages else ""
        )


def said(messages: int, back: Length | None, messages_back: int, seconds: float) -> str:
    """Messages, the bytes of the backward pass (None: there is none), and the time of both."""
    backward = "" if back is None else f" and {back} bytes in {messages_back} backward"
    return f"{messages} message{'' if messages == 1 else 's'}{backward}, {seconds * 1e6:.3g} us"
