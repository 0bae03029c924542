"""Compiling the CUDA sources for a GPU that need not be here."""

import shutil
import subprocess
from pathlib import Path

import pytest

from neuroexapt.cuda_ops.build import SOURCES

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")


def assembler_report(source: str, architecture: int, folder: Path) -> str:
    """What the assembler says of the registers, stack and spills of every kernel in ``source``."""
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command += [SOURCES / source, "-o", folder / "kernels.cubin"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr
