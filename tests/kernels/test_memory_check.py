"""No kernel reads or writes beyond its tensors: each of them under compute-sanitizer, on a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer on PATH")
def test_kernels_stay_inside_their_tensors():
    command = ["compute-sanitizer", "--target-processes", "application-only", "--report-api-errors", "no"]
    command += ["--error-exitcode", "3", sys.executable, "-m", "tests.kernels.awkward_calls"]
    # Each tensor an allocation of its own, since inside a pool its neighbours would hide an overrun.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in run.stdout
