"""Compile a Triton kernel for a GPU that need not be there, and read what the assembler made of it."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Resources(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compiled_resources(
    kernel: triton.JITFunction, arch: int, dtype: torch.dtype, constants: dict, **options: int
) -> Resources:
    """Registers a thread, bytes spilled a thread and shared memory of ``kernel`` on ``sm_<arch>``.

    Pointers are ``dtype``, or fp32 where the kernel keeps sums in it; the last stride of each tensor
    is 1; every other argument outside ``constants`` is a 32-bit integer.
    """
    names = kernel.arg_names
    constants = constants | {name: 1 for name in names if name.endswith("_w")}
    signature = {name: "constexpr" if name in constants else _argument_type(name, dtype) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _resource_usage(binary.asm["cubin"], binary.metadata.shared)


def _argument_type(name: str, dtype: torch.dtype) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    keeps_sums = any(word in name for word in ("partial", "stats", "mean", "var"))
    return "*fp32" if keeps_sums else _POINTER[dtype]


def _resource_usage(cubin: bytes, shared_bytes: int) -> Resources:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Resources(registers, max(stack, local), shared_bytes)
