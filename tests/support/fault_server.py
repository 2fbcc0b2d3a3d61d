"""Loaded once, before the processes of :mod:`faults` are forked: what each of them would load, and a first compile."""

from __future__ import annotations

import torch
import torch._inductor.compile_fx
import torch.distributed._functional_collectives
from torch._inductor.codecache import CacheBase, torch_key

import fxsp  # noqa: F401
from small import SPLIT, Model, inputs

torch.set_num_threads(1)
with torch.no_grad():
    torch.compile(Model(), backend="sp", options={"plan": SPLIT, "inner": "aot_eager"})(inputs())
torch.compiler.reset()
# Of torch's and Triton's files: parts of the keys of caches, which take long.
torch_key()
CacheBase.get_system()
