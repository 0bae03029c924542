"""Compile the Triton sums for a GPU that need not be there and print the resources they use.

Run as a program, ``python compile_softmax_sum.py ARCHITECTURE``: the tests run in a process where
Triton's interpreter has taken the compiler's place.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from neuroexapt.kernels import softmax_sum_triton as kernels

DIVISIBLE = [["tt.divisibility", 16]]


def sources(dtype: str, operands: int):
    """Every kernel as launched for ``operands`` aligned tensors of a size divisible by 16."""
    pointers = (f"*{dtype}",) * operands
    padded, block = kernels._tile_shape(operands, 4 if dtype == "fp32" else 2)
    common = {"KP": padded, "BLOCK": block, "IS_LOGITS": True, "ALIGNED": True}
    tensors = {"scores": "*fp32", "partials": "*fp32", "grad_scores": "*fp32", "n": "i32", "splits": "i32"}
    tensors |= {"xs": pointers, "grad_xs": pointers, "y": f"*{dtype}", "grad_y": f"*{dtype}"}
    yield kernels.softmax_sum_fwd_kernel, tensors, common
    for wanted in (-1, 1):  # every gradient, only the first
        yield kernels.softmax_sum_bwd_kernel, tensors, common | {"WANTS_SCORES": True, "WANTED": wanted}
    reduce = {"K": operands, "KP": padded, "ROWS": block, "IS_LOGITS": True}
    yield kernels.softmax_sum_bwd_reduce_kernel, tensors, reduce


def compile_for(kernel, tensors: dict, constants: dict, architecture: int) -> bytes:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else tensors[name] for name in names}
    attributes = {}
    for i, name in enumerate(names):
        kind = signature[name]
        if isinstance(kind, tuple):
            attributes |= {(i, j): DIVISIBLE for j in range(len(kind))}
        elif kind != "constexpr":
            attributes[(i,)] = DIVISIBLE
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": kernels._WARPS}).asm["cubin"]


def main(architecture: int) -> None:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for dtype in ("fp32", "fp16", "bf16"):
        for operands in (4, 8, 33):
            for kernel, tensors, constants in sources(dtype, operands):
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(compile_for(kernel, tensors, constants, architecture))
                    file.flush()
                    subprocess.run([cuobjdump, "--dump-resource-usage", file.name], check=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
