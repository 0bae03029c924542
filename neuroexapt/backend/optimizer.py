"""Measures from which sizes on the kernels pay off on this machine, and keeps the answer."""

import itertools
from pathlib import Path

import torch

from neuroexapt.backend import workloads
from neuroexapt.backend.candidates import KERNEL_TIERS, implements
from neuroexapt.backend.measure import time_calls
from neuroexapt.backend.memory import get_memory_info
from neuroexapt.backend.registry import (
    IMPLEMENTATIONS,
    Backend,
    list_backends,
    probe_tier,
    resolve,
    use_backend,
)
from neuroexapt.backend.tuning import (
    NEVER,
    Crossover,
    TuningConfig,
    apply_tuning,
    read_tuning,
    saved_tuning,
    write_tuning,
)

_SIZES = tuple(4**exponent for exponent in range(5, 13))  # 1,024 to 16,777,216 elements
_OPERANDS = (2, 4, 8, 16)
_SECONDS_A_CASE = 0.02
_SLOWER_AT_MOST = 1.05


def auto_configure_backend(save: bool = False) -> TuningConfig:
    """Measure from which sizes on each kernel beats PyTorch on this machine.

    ``save`` also puts them into the saved configuration and in force. Takes a minute or two on a GPU;
    without a GPU there is nothing to measure.
    """
    config = _measure(resolve("auto"))
    if save:
        apply_tuning(config)
    return config


class BackendOptimizer:
    """Shows what there is, measures what pays off, and keeps the result in a file of the user's choice."""

    def __init__(self) -> None:
        self.config = saved_tuning()

    def print_system_info(self) -> None:
        """Print every backend with its reason, and the memory of the best device."""
        for backend in list_backends():
            print(f"{backend.value:12} {'available' if backend.available else backend.reason}")
        memory = get_memory_info(resolve("auto").torch_device)
        if memory.total is not None and memory.free is not None:
            print(f"memory       {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")

    def optimize(self, backend: str = "auto") -> TuningConfig:
        """Measure the crossovers of ``backend`` ("auto", "cuda:triton", …) against PyTorch."""
        self.config = _measure(resolve(backend))
        return self.config

    def save_config(self, path: Path | str, backend: str = "auto") -> None:
        """Write the crossovers and the backend's name as JSON."""
        write_tuning(Path(path), self.config, backend)

    def load_config(self, path: Path | str) -> TuningConfig:
        """Read what ``save_config`` wrote; another machine's gives a warning and the defaults."""
        self.config = read_tuning(Path(path))
        return self.config


def _measure(backend: Backend) -> TuningConfig:
    if backend.device != "cuda":
        return TuningConfig.for_this_machine()
    tiers = KERNEL_TIERS if backend.tier == "auto" else (backend.tier,)
    available = [tier for tier in tiers if not probe_tier(tier)]
    crossovers = [
        _crossover(op, tier, dtype, operands)
        for tier, op, dtype in itertools.product(available, workloads.OPS, workloads.TOLERANCES)
        for operands in (_OPERANDS if op in workloads.SUMS else (1,))
        if implements(op, tier) and _takes(op, tier, dtype)
    ]
    return TuningConfig.for_this_machine(tuple(crossovers))


def _takes(op: str, tier: str, dtype: torch.dtype) -> bool:
    """Whether the kernel runs in ``dtype`` at all; what it refuses would be measured as PyTorch."""
    call = workloads.sample_call(op, _SIZES[0], dtype, torch.device("cuda"))
    return IMPLEMENTATIONS[op, tier].supports(*call.args, **call.kwargs).ok


def _crossover(op: str, tier: str, dtype: torch.dtype, operands: int) -> Crossover:
    """The smallest measured size from which on the kernel was never slower than PyTorch by more than 5 %."""
    smallest = NEVER
    for size in reversed(_SIZES):
        call = workloads.sample_call(op, size, dtype, torch.device("cuda"), operands)
        if _milliseconds(call, f"cuda:{tier}") > _SLOWER_AT_MOST * _milliseconds(call, "cuda:torch"):
            break
        smallest = size
    return Crossover(op, tier, str(dtype).removeprefix("torch."), operands, smallest)


def _milliseconds(call: workloads.Call, backend: str) -> float:
    with use_backend(backend):
        timing = time_calls(lambda: workloads.run_call(call), torch.device("cuda"), _SECONDS_A_CASE)
    return timing.median_ms
