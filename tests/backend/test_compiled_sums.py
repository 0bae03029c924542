"""What the compilers make of the sums for GPUs that need not be there: registers, spills, wide accesses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from neuroexapt.cuda_ops.build import SOURCES
from tests.cuda_compilation import assembler_report, needs_nvcc


def resources(assembler_output: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes spilled) from what ``ptxas -v`` says."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, assembler_output, re.DOTALL)
    return [(name, int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found]


@needs_nvcc
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_cuda_kernels_spill_nothing(architecture, tmp_path):
    kernels = resources(assembler_report("softmax_sum.cu", architecture, tmp_path))
    assert len(kernels) == 19  # 3 dtypes, wide or not: forward and two backwards; and one reduction
    assert [kernel for kernel in kernels if kernel[2]] == []
    # 64 leaves room for 2 blocks of 512 threads in a multiprocessor, which backward counts on.
    assert max(registers for _, registers, _ in kernels) <= 64


@needs_nvcc
def test_the_cuda_kernels_move_16_bytes_at_a_time(tmp_path):
    ptx = tmp_path / "softmax_sum.ptx"
    subprocess.run(
        ["nvcc", "-std=c++17", "-ptx", "-arch=sm_90", SOURCES / "softmax_sum.cu", "-o", ptx], check=True
    )
    for dtype in ("IfN", "I6__halfN", "I13__nv_bfloat16N"):
        for kernel in ("fwd", "bwd"):
            (body, *_) = re.findall(
                rf"entry \S*{kernel}_kernel{dtype}\S*Wide\S*\(.*?^}}", ptx.read_text(), re.M | re.S
            )
            assert "ld.global.nc.v4" in body
            assert re.search(r"st\.global\S*\.v4", body)


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_triton_kernels_spill_nothing(architecture):
    pytest.importorskip("triton")
    program = Path(__file__).with_name("compile_softmax_sum.py")
    done = subprocess.run(
        [sys.executable, program, str(architecture)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    registers = [int(count) for count in re.findall(r"REG:(\d+)", done.stdout)]
    assert len(registers) == 36  # 3 dtypes, 3 numbers of operands, 4 kernels
    assert max(registers) <= 168
    # What is spilled goes to the stack.
    assert set(re.findall(r"STACK:(\d+)", done.stdout)) == {"0"}
