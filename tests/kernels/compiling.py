"""Compile the Triton kernels for a GPU that need not be there, and read what the assembler made of them.

What is compiled are calls of the operators, forward and backward, on tensors of the CPU: every launch ends
with its compilation. So the kernels get the arguments and constants that real launches give them.

Run as a program, since Triton's interpreter, which other tests turn on, replaces its compiler in the
whole process: ``python -m tests.kernels.compiling 90`` prints one JSON object a launch.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from neuroexapt.core.cells import CellTopology, SearchCell, TwoInputs
from neuroexapt.core.operations import PRIMITIVES, ReLUConvBN
from neuroexapt.core.plan import plan_cell
from neuroexapt.kernels.cell_triton import cell
from neuroexapt.kernels.fused_attention_layernorm_triton import fused_attention_layernorm
from neuroexapt.kernels.hierarchical_sequence_fusion_triton import hierarchical_sequence_fusion
from neuroexapt.kernels.hstu_hierarchical_attention_triton import hstu_hierarchical_attention
from neuroexapt.kernels.interaction_operator_triton import interaction_operator
from neuroexapt.kernels.pool_triton import avg_pool, global_avg_pool, max_pool
from neuroexapt.kernels.preprocess_triton import relu_conv_bn
from neuroexapt.kernels.sepconv_triton import sepconv_with_stats
from neuroexapt.kernels.sequence_recommendation_interaction_triton import sequence_recommendation_interaction

# Channels, pixels a side and dtype; the pictures of the DARTS search network at batch 64.
_PICTURES = ((16, 32, torch.float32), (64, 8, torch.float32), (16, 32, torch.bfloat16))


class AbsentGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_launches(arch: int) -> None:
    """From now on let launches compile for ``sm_<arch>`` and print what they use instead of running."""
    triton.runtime.driver.set_active(AbsentGpu(arch))
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        usage = _resource_usage(binary.asm["cubin"])
        report = {
            "kernel": kernel.__name__,
            "registers": usage["REG"],
            "spilled_bytes": usage["STACK"] + usage["LOCAL"],
            "shared_bytes": binary.metadata.shared,
        }
        print(json.dumps(report), flush=True)

    JITFunction.run = compile_only


def _resource_usage(cubin: bytes) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def backward(*results: Tensor) -> None:
    torch.autograd.backward(results, [torch.zeros_like(y) for y in results])


def call_convolutions_and_pools() -> None:
    for channels, size, dtype in _PICTURES:
        x = tensor(64, channels, size, size, dtype=dtype)
        weights = tensor(channels, 1, 5, 5, dtype=dtype), tensor(channels, channels, 1, 1, dtype=dtype)
        backward(sepconv_with_stats(x, *weights)[0])
        backward(avg_pool(x, 5, 2))
        backward(max_pool(x, 5, 2))
        backward(global_avg_pool(x))


def call_cells() -> None:
    """A normal and a reduction cell, with and without gradients of their weights, and what precedes them."""
    for dtype in (torch.float32, torch.bfloat16):
        backward(relu_conv_bn(tensor(64, 64, 32, 32, dtype=dtype), ReLUConvBN(64, 16, 1, affine=False).op))
    for reduction, channels, dtype in ((False, 16, torch.float32), (True, 64, torch.bfloat16)):
        inputs = TwoInputs(channels, channels, channels, False, affine=False)
        search_cell = SearchCell(CellTopology(1), PRIMITIVES, inputs, channels, reduction=reduction)
        search_cell.requires_grad_(not reduction)
        states = [tensor(64, channels, 16, 16, dtype=dtype) for _ in range(2)]
        backward(cell(plan_cell(search_cell), states, torch.rand(2, len(PRIMITIVES), requires_grad=True)))


def call_with_all_options() -> None:
    """Operators of sequences that are given everything they take, over rows that fill their kernels."""
    backward(interaction_operator(tensor(8, 64), tensor(8, 26, 64)))
    decay, *tables = (tensor(*shape, dtype=torch.float32) for shape in ((), (399,), (64,)))
    place = {"offsets": torch.tensor([0, 200, 300]), "max_length": 200}
    times = {"timestamps": torch.arange(300)}
    backward(*sequence_recommendation_interaction(tensor(300, 256), tensor(2, 256), decay, **times, **place))
    heads = [tensor(300, 2, 64) for _ in range(3)]
    biases = dict(zip(("position_bias", "time_bias"), tables, strict=True)) | times
    backward(hstu_hierarchical_attention(*heads, windows=(None, 32), **biases, **place))
    call_on_rows(tensor(300, 64), heads, dropout=0.1, **place)


def call_without_options() -> None:
    """What is None then has no type, so that code which reads it must not be compiled."""
    decay = tensor(dtype=torch.float32)
    for length in (50, 200):  # one chunk and several
        pools, _ = sequence_recommendation_interaction(tensor(2, length, 64), tensor(2, 64), decay)
        backward(pools)
    heads = [tensor(2, 200, 2, 64) for _ in range(3)]
    backward(hstu_hierarchical_attention(*heads))
    call_on_rows(tensor(2, 200, 256), heads)


def call_on_rows(x: Tensor, heads: list[Tensor], dropout: float = 0.0, **place: Any) -> None:
    """Attention with what follows, and fused windows."""
    width = x.shape[-1]
    bias, *norm = (tensor(width) for _ in range(3))
    weights = tensor(width, 128), bias, *norm
    backward(fused_attention_layernorm(x, *heads, *weights, dropout=dropout, **place))
    weights = tensor(4, width), tensor(width, 2 * width), bias, tensor(width, width), *norm
    backward(hierarchical_sequence_fusion(x, *weights, **place))


def main(arch: int) -> None:
    compile_launches(arch)
    call_convolutions_and_pools()
    call_cells()
    call_with_all_options()
    if arch == 90:  # what is left out is so on every GPU
        call_without_options()


if __name__ == "__main__":
    main(int(sys.argv[1]))
