"""Timing and checking backends. A failure keeps its status and gets no time, a time has passed its check."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from neuroexapt.backend import workloads
from neuroexapt.backend.dispatch import explain
from neuroexapt.backend.registry import Backend, get_available_backends, use_backend

_WARM_UP_CALLS = 3
_TIMED_CALLS = (5, 1000)  # at least, at most
_CHECK_ELEMENTS = 2**13


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, issued one by one, until the device has finished it."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    calls: int


@dataclass(frozen=True)
class BackendResult:
    """What one backend made of a workload; ``status`` is "ok" or the reason why there is no timing."""

    backend: str
    workload: str
    status: str
    timing: Timing | None = None
    peak_mib: float | None = None
    max_error: float | None = None


@dataclass(frozen=True)
class OpCheck:
    """One op on one backend and dtype against the reference in fp64, forward and every gradient."""

    op: str
    dtype: str
    impl: str
    ok: bool
    max_error: float | None
    reason: str


def time_calls(
    run: Callable[[], object], device: torch.device, seconds: float, calls: tuple[int, int] = _TIMED_CALLS
) -> Timing:
    """Time ``run`` for about ``seconds``, after a warm-up that compiles what needs compiling.

    ``calls``: how many are timed at least and at most; at least two.
    """
    fewest, most = calls
    for _ in range(_WARM_UP_CALLS):
        run()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < fewest or (time.perf_counter() < deadline and len(times) < most):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        times.append(1000 * (time.perf_counter() - start))
    p20, median, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return Timing(median, p20, p80, len(times))


def benchmark_backends(duration_seconds: float = 10, workload: str = "mixed_op") -> tuple[BackendResult, ...]:
    """Time forward and backward of ``workload`` on every available backend, within about that time.

    ``workload`` is ``mixed_op``, one edge of a search, or an op's name. ``max_error`` is the largest over
    the workload's ops, measured in the same run.
    """
    backends = get_available_backends()
    return tuple(_benchmark(backend, workload, duration_seconds / len(backends)) for backend in backends)


def check_backend(backend: Backend) -> tuple[OpCheck, ...]:
    """Hold every op of ``backend`` against the reference in fp64, in each dtype that it computes in."""
    dtypes = workloads.TOLERANCES if backend.device == "cuda" else [torch.float32]
    return tuple(_check(op, dtype, backend) for op in workloads.OPS for dtype in dtypes)


def _benchmark(backend: Backend, workload: str, seconds: float) -> BackendResult:
    device = backend.torch_device
    ops = workloads.OPS if workload == "mixed_op" else (workload,)
    try:
        with use_backend(backend.value):
            run = workloads.workload(workload, device)
            timing = time_calls(run, device, seconds)
            peak = _peak_mib(run, device)
        checks = [_check(op, torch.float32, backend) for op in ops]
    except RuntimeError as error:  # out of memory, a kernel that does not compile
        return BackendResult(backend.value, workload, str(error).splitlines()[0])
    failed = [f"{check.op}: {check.reason}" for check in checks if not check.ok]
    if failed:
        return BackendResult(backend.value, workload, "; ".join(failed))
    worst = max(check.max_error for check in checks if check.max_error is not None)
    return BackendResult(backend.value, workload, "ok", timing, peak, worst)


def _check(op: str, dtype: torch.dtype, backend: Backend) -> OpCheck:
    torch.manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    call = workloads.sample_call(op, _CHECK_ELEMENTS, dtype, backend.torch_device)
    with use_backend(backend.value), workloads.full_precision():
        impl = explain(op, *call.args, **call.kwargs).impl
        try:
            error = workloads.error_of(call, workloads.run_call(call))
        except RuntimeError as failure:  # a kernel that does not compile or run
            return OpCheck(op, name, impl, False, None, str(failure).splitlines()[0])
    ok = error <= workloads.TOLERANCES[dtype]
    return OpCheck(op, name, impl, ok, error, "" if ok else f"error {error:.1e} against the reference")


def _peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The most memory that one run takes beyond what was allocated before it."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
