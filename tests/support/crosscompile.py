"""Triton kernels compiled for a device that is not there, and what can be read from the machine code.

::

    with fake_gpu():
        x, lse = torch.empty(1, 8, 100, 64, device="cuda"), torch.empty(1, 8, 100, device="cuda")
        for launch in launches(merge, x, lse, x, lse):
            code = compile_for(launch, "sm_90")
            code.loads, code.stores, code.registers, code.spilled

It needs Triton, which brings the assembler and the disassembler, and no GPU.  A launch is specialised as Triton does it
at run time: pointers that 16 divides, sizes and strides that are 1 or that 16 divides.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxsp.torch_internals import fake_mode, functionalized, kernel_calls

__all__ = ["TARGETS", "Code", "Launch", "compile_for", "fake_gpu", "launches"]

#: Name of a target -> Triton's backend, architecture, threads of a warp.
TARGETS: dict[str, tuple[str, Any, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel (``triton.JITFunction``) and its arguments by name; tensors are fake."""

    kernel: Any
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel does with memory."""

    target: str
    #: Bytes that one thread moves in each load from, and store to, device memory.
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    registers: int
    #: Bytes or registers that did not fit, and went to memory.
    spilled: int


class _Absent:
    """What Triton asks of a driver while torch looks through a kernel for what it writes to."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS["sm_90"])


@contextmanager
def fake_gpu(symbolic: bool = False) -> Iterator[Any]:
    """In it tensors may be made on ``"cuda"`` without a GPU, of no data; the value is their fake mode.

    ``symbolic``: the mode has a shape environment, for tensors of symbolic sizes.
    """
    from triton.runtime import driver

    before: Any = driver._active
    if not torch.cuda.is_available():
        driver.set_active(_Absent())
    try:
        with fake_mode(symbolic) as mode:
            yield mode
    finally:
        driver.set_active(before)


def launches(function: Callable[..., Any], *args: Any) -> list[Launch]:
    """The kernels that ``function(*args)`` launches, in order; tensors are fakes, and this is in :func:`fake_gpu`."""
    graph = make_fx(functionalized(function))(*args).graph
    return [Launch(kernel, arguments) for kernel, arguments in kernel_calls(graph)]


def compile_for(launch: Launch, target: str) -> Code:
    """Compile for one of :data:`TARGETS`.  Raises what Triton raises if it cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            attributes[parameter.num,] = [["tt.divisibility", 16]]
    backend = TARGETS[target]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled: Any = triton.compile(source, target=GPUTarget(*backend), options={"enable_fp_fusion": True})
    if backend[0] == "cuda":
        return _read_sass(target, compiled.asm["cubin"])
    return _read_gcn(target, compiled.asm["amdgcn"])


@cache
def _disassembler() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _dump(what: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([_disassembler(), what, file.name], capture_output=True, text=True, check=True).stdout


def _read_sass(target: str, cubin: bytes) -> Code:
    sass, usage = _dump("--dump-sass", cubin), _dump("--dump-resource-usage", cubin)

    def widths(name: str) -> tuple[int, ...]:
        found = []
        for suffixes in re.findall(rf"\b{name}\.E((?:\.\w+)*)", sass):
            bits = re.search(r"\.(256|128|64|[SU]?16|[SU]8)\b", suffixes)
            found.append(int(bits[1].lstrip("SU")) // 8 if bits else 4)
        return tuple(found)

    def number(name: str) -> int:
        match = re.search(rf"\b{name}:(\d+)", usage)
        if match is None:
            raise RuntimeError(f"the disassembler does not tell {name}: {usage}")
        return int(match[1])

    # Local memory is what a thread keeps outside its registers.
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Code(target, widths("LDG"), widths("STG"), number("REG"), number("STACK") + number("LOCAL") + local)


def _read_gcn(target: str, text: str) -> Code:
    bytes_of = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}

    def widths(name: str) -> tuple[int, ...]:
        found = re.findall(rf"\b(?:global|buffer|flat)_{name}_([a-z]+)(?:_d16(?:_hi)?)?(?:x(\d))?\b", text)
        return tuple(bytes_of[unit] * int(times or 1) for unit, times in found)

    def number(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s*(\d+)", text)))

    return Code(
        target, widths("load"), widths("store"), number("vgpr_count"),
        number("vgpr_spill_count") + number("sgpr_spill_count"),
    )  # fmt: skip
