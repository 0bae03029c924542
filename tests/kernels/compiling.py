"""Compile the Triton kernels for a GPU that need not be there, and read what the assembler made of them.

Run as a program, since Triton's interpreter, which other tests turn on, replaces its compiler in the
whole process: ``python -m tests.kernels.compiling 90`` prints one JSON object a kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from neuroexapt.kernels import (
    interaction_operator_triton,
    pool_triton,
    sepconv_triton,
    sequence_recommendation_interaction_triton,
)

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
# What a tensor's name holds where it is kept in fp32.
_SUMS = (
    *("partial", "stats", "mean", "var"),
    *("exact", "sums", "totals", "summaries", "before", "after", "decay"),
)
_LAUNCH_OPTIONS = ("num_warps", "num_stages")
# Channels, pixels a side and dtype; the pictures of the DARTS search network at batch 64.
_PICTURES = ((16, 32, torch.float32), (64, 8, torch.float32), (16, 32, torch.bfloat16))


def resources(kernel: triton.JITFunction, arch: int, dtype: torch.dtype, constants: dict) -> dict:
    """Registers and spilled bytes a thread and shared memory of ``kernel`` on ``sm_<arch>``.

    Pointers are ``dtype``, or fp32 where the kernel keeps sums in it; the last stride of each tensor
    is 1; every other argument outside ``constants`` is a 32-bit integer.
    """
    options = {name: constants[name] for name in _LAUNCH_OPTIONS if name in constants}
    names = kernel.arg_names
    constants = {name: constants[name] for name in names if name in constants}
    constants |= {name: 1 for name in names if name.endswith("_w")}
    signature = {name: "constexpr" if name in constants else _argument_type(name, dtype) for name in names}
    pointers = [name.endswith("_ptr") and name not in constants for name in names]
    aligned = {(i,): [["tt.divisibility", 16]] for i, is_pointer in enumerate(pointers) if is_pointer}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resource_usage(binary.asm["cubin"])
    return {
        "kernel": kernel.__name__,
        "dtype": str(dtype),
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": binary.metadata.shared,
    }


def _argument_type(name: str, dtype: torch.dtype) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "scale" else "i32"
    if name.startswith("winner"):
        return "*u8"
    if name in ("times_ptr", "lengths_ptr"):
        return "*i64"
    return "*fp32" if any(word in name for word in _SUMS) else _POINTERS[dtype]


def _resource_usage(cubin: bytes) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def sepconv_cases(channels: int, size: int, kernel_size: int, precision: str) -> list[tuple]:
    """Each kernel of a separable convolution with the constants that its launch would give it."""
    x = torch.Size([64, channels, size, size])
    conv = {"C": channels, "K": kernel_size, "STRIDE": 1, "DILATION": 1, "RELU": True}
    pointwise = {"C_OUT": channels, "PRECISION": precision}
    forward = conv | pointwise | sepconv_triton._forward_plan(x, channels)[-1]
    backward_pointwise = conv | pointwise | sepconv_triton._backward_pointwise_plan(x, channels)[-1]
    backward_depthwise = conv | sepconv_triton._backward_depthwise_plan(x, kernel_size)[-1]
    sizes = {"PW_SIZE": channels**2, "DW_SIZE": channels * kernel_size**2}
    return [
        (sepconv_triton.sepconv_fwd_kernel, forward | {"STATS": True}),
        (
            sepconv_triton.sepconv_stats_kernel,
            {"C_OUT": channels, "TILE_PIXELS": forward["BLOCK_P"], "BLOCK_T": 128, "BLOCK_O": 16},
        ),
        (
            sepconv_triton.sepconv_bwd_pointwise_kernel,
            backward_pointwise | {"NEED_E": True, "NEED_PW": True},
        ),
        (
            sepconv_triton.sepconv_bwd_depthwise_kernel,
            backward_depthwise | {"NEED_DX": True, "NEED_DW": True},
        ),
        (sepconv_triton.sepconv_bwd_reduce_kernel, sizes | sepconv_triton._REDUCE),
    ]


def pool_cases(channels: int, size: int) -> list[tuple]:
    blocks = pool_triton._blocks(channels, size * size)
    pool = blocks | {"K": 5, "STRIDE": 2}
    return [
        (pool_triton.pool_fwd_kernel, pool | {"MAX": False, "WINNER": False}),
        (pool_triton.pool_fwd_kernel, pool | {"MAX": True, "WINNER": True}),
        (pool_triton.pool_bwd_kernel, pool | {"MAX": False}),
        (pool_triton.pool_bwd_kernel, pool | {"MAX": True}),
        (
            pool_triton.global_avg_pool_fwd_kernel,
            pool_triton._blocks(channels, size * size, largest=1024),
        ),
    ]


def interaction_cases() -> list[tuple]:
    """Both interactions at sizes that they are timed at, sequences in several chunks."""
    fields, sequences = interaction_operator_triton, sequence_recommendation_interaction_triton
    vectors = fields._blocks(27, 64, torch.bfloat16) | {"PRECISION": "tf32x3"}
    forward = sequences._blocks(256) | {"PRECISION": "tf32x3", "SINGLE": False, "offsets_ptr": None}
    backward = forward | {"num_warps": 2 * forward["num_warps"]}
    return [
        (fields.interaction_operator_fwd_kernel, vectors),
        (fields.interaction_operator_bwd_kernel, vectors),
        (sequences.sequence_recommendation_interaction_fwd_kernel, forward),
        (sequences.sequence_recommendation_interaction_join_kernel, forward),
        (sequences.sequence_recommendation_interaction_similarity_kernel, forward),
        (sequences.sequence_recommendation_interaction_bwd_summary_kernel, forward),
        (sequences.sequence_recommendation_interaction_after_kernel, forward),
        (sequences.sequence_recommendation_interaction_bwd_kernel, backward),
    ]


def main(arch: int) -> None:
    for channels, size, dtype in _PICTURES:
        for kernel, constants in sepconv_cases(channels, size, 5, "tf32x3") + pool_cases(channels, size):
            print(json.dumps(resources(kernel, arch, dtype, constants)), flush=True)
    for kernel, constants in interaction_cases():
        print(json.dumps(resources(kernel, arch, torch.bfloat16, constants)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
