"""The methods of attention, one object each, in the order in which reports name them; ties go to the first.

A new one is its file here and a line in this list, its operator in ``kernels/attention``, and what that means in
``fxsp/simulation/reference``.
"""

from __future__ import annotations

from fxsp.passes.attention.method import Method
from fxsp.passes.attention.methods.gather_kv import GatherKV
from fxsp.passes.attention.methods.local import Local
from fxsp.passes.attention.methods.ring import Hybrid, Ring
from fxsp.passes.attention.methods.split_kv import Merged
from fxsp.passes.attention.methods.ulysses import Ulysses

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {
    method.name: method for method in (Local(), Ulysses(), Merged(), GatherKV(), Hybrid(), Ring())
}
