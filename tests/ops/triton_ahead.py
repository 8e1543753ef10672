"""Compiling a Triton kernel for a GPU that is not there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_for(capability: int, kernel: Any, options: dict[str, int], **arguments: Any) -> Any:
    """The kernel compiled as a launch with such arguments would.

    Tensors and descriptors are given as their type (``*fp32``), the others as values; those of annotation
    ``constexpr``, None and 1 are compiled in, as a launch does, and what 16 divides is said to be so.
    """
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, str):
            signature[parameter.name] = value
        elif parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        kind = signature[parameter.name]
        if kind.startswith("*") or (kind == "i32" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers a thread and bytes of its stack, which is where they spill to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", text)}
