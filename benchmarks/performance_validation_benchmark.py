"""Separable convolutions and pools at the DARTS shapes: eager, torch.compile, our kernels, memory floor.

``python benchmarks/performance_validation_benchmark.py [--out FILE]`` appends to
``benchmarks/results/performance_validation.jsonl``. Each implementation is first held to the
reference in fp64; one that fails is reported and not timed. ``device_ms`` is a CUDA graph of twelve
calls on rotating inputs that exceed the L2 cache, replayed, divided by twelve; ``step_ms`` is the
wall time of one eager call with everything that launches it.
"""

import argparse
import datetime
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from neuroexapt.kernels import pool_triton, reference, sepconv_triton

BENCHMARK = "performance_validation"
RESULTS = Path(__file__).parent / "results" / f"{BENCHMARK}.jsonl"
BATCH = 64
SHAPES = ((16, 32), (32, 16), (64, 8))  # channels, pixels a side: the DARTS search network
SETS = 12
RUNS = 20
TOLERANCE = {"fp32": 2e-5, "tf32": 2e-2, "bf16": 4e-2}


@dataclass(frozen=True)
class Case:
    """One operation at one shape; ``inputs`` makes its leaves, ``moved`` counts tensors read and written."""

    name: str
    fused: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    inputs: Callable[[torch.dtype], list[Tensor]]

    def make_sets(self, dtype: torch.dtype) -> list[tuple[list[Tensor], Tensor]]:
        """Leaves and an output gradient, several times, with values that repeat from run to run."""
        torch.manual_seed(0)
        sets = []
        for _ in range(SETS):
            leaves = [tensor.requires_grad_() for tensor in self.inputs(dtype)]
            with torch.no_grad():
                dy = torch.randn_like(self.definition(*leaves))
            sets.append((leaves, dy))
        return sets


def sepconv_inputs(channels: int, size: int, kernel_size: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (
        (BATCH, channels, size, size),
        (channels, 1, kernel_size, kernel_size),
        (channels, channels, 1, 1),
    )
    scales = (1.0, 1 / kernel_size, channels**-0.5)
    return [
        (torch.randn(shape, device="cuda") * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def picture(channels: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(BATCH, channels, size, size, device="cuda").to(dtype)]


def cases() -> Iterator[Case]:
    for channels, size in SHAPES:
        shape = f"c{channels}-{size}x{size}-b{BATCH}"
        for name, kernel_size, options in (
            ("sep_conv_3x3", 3, {}),
            ("sep_conv_5x5", 5, {}),
            ("dil_conv_3x3", 3, {"dilation": 2}),
            ("dil_conv_5x5", 5, {"dilation": 2}),
            ("sep_conv_5x5-stride2", 5, {"stride": 2}),
        ):
            yield Case(
                f"{name}-{shape}",
                functools.partial(sepconv_triton.sepconv, **options),
                functools.partial(reference.sepconv, **options),
                functools.partial(sepconv_inputs, channels, size, kernel_size),
            )
        for name, kernel, definition, options in (
            ("avg_pool_3x3", pool_triton.avg_pool, reference.avg_pool, {"kernel_size": 3}),
            ("max_pool_3x3", pool_triton.max_pool, reference.max_pool, {"kernel_size": 3}),
            ("max_pool_5x5", pool_triton.max_pool, reference.max_pool, {"kernel_size": 5}),
            ("global_avg_pool", pool_triton.global_avg_pool, reference.global_avg_pool, {}),
        ):
            yield Case(
                f"{name}-{shape}",
                functools.partial(kernel, **options),
                functools.partial(definition, **options),
                functools.partial(picture, channels, size),
            )


def forward_backward(function: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def forward(function: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> Tensor:
    return function(*leaves)


def largest_error(function: Callable[..., Tensor], case: Case, leaves: list[Tensor], dy: Tensor) -> float:
    """Of output and gradients, each relative to its own largest value, against the definition in fp64."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = forward_backward(case.definition, exact, dy.double())
    actual = forward_backward(function, leaves, dy)
    return max(
        ((got.double() - wanted).abs().max() / wanted.abs().max()).item()
        for got, wanted in zip(actual, expected, strict=True)
    )


def device_times(call: Callable[..., object], sets: list[tuple[list[Tensor], Tensor]]) -> list[float]:
    """Milliseconds a call takes inside a replayed CUDA graph, once a run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*one) for one in sets]
    graph.replay()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(sets))
    del kept
    return times


def wall_times(call: Callable[..., object], sets: list[tuple[list[Tensor], Tensor]]) -> list[float]:
    """Milliseconds from an idle device through launches to its end, once a run."""
    times = []
    for run in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(*sets[run % len(sets)])
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def copy_bandwidth() -> float:
    """Bytes read and written a millisecond by a device copy far larger than the L2 cache."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    times = device_times(target.copy_, [(source, False)] * 4)
    return 2 * source.nbytes / statistics.median(times)


def moved_bytes(leaves: list[Tensor], dy: Tensor) -> int:
    """What one forward and backward must read and write: x twice, its gradient, y and its gradient."""
    return 3 * leaves[0].nbytes + 2 * dy.nbytes


class Report:
    """Appends measurements with their provenance, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.provenance = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
        }

    def add(
        self, case: str, implementation: str, dtype: str, metric: str, values: list[float], error: float
    ) -> None:
        p20, *_, p80 = statistics.quantiles(values, n=5) if len(values) > 1 else values * 2
        row = {
            "benchmark": BENCHMARK,
            "case": case,
            "implementation": implementation,
            "dtype": dtype,
            "metric": metric,
            "unit": "ms",
            "median": statistics.median(values),
            "p20": p20,
            "p80": p80,
            "runs": len(values),
            "max_error": error,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row | self.provenance) + "\n")


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def measure(case: Case, dtype_name: str, bandwidth: float, report: Report) -> None:
    dtype = torch.bfloat16 if dtype_name == "bf16" else torch.float32
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype_name == "tf32" else "ieee"
    sets = case.make_sets(dtype)
    torch._dynamo.reset()
    implementations = {"eager": case.definition, "fused": case.fused}
    if dtype_name == "fp32":  # compiling takes most of this benchmark's time
        implementations["compile"] = torch.compile(case.definition, dynamic=False)
    line = f"{case.name:36} {dtype_name}"
    for implementation, function in implementations.items():
        error = largest_error(function, case, *sets[0])
        if error > TOLERANCE[dtype_name]:
            print(f"{case.name} {implementation} {dtype_name}: error {error:.1e} is too large, not timed")
            continue
        both = functools.partial(forward_backward, function)
        device = device_times(both, sets)
        report.add(case.name, implementation, dtype_name, "device_ms", device, error)
        ahead = device_times(functools.partial(forward, function), sets)
        report.add(case.name, implementation, dtype_name, "forward_device_ms", ahead, error)
        report.add(case.name, implementation, dtype_name, "step_ms", wall_times(both, sets), error)
        both_us, forward_us = (1e3 * statistics.median(times) for times in (device, ahead))
        line += f" | {implementation} {both_us:6.1f} (forward {forward_us:5.1f})"
    floor = moved_bytes(*sets[0]) / bandwidth
    report.add(case.name, "floor", dtype_name, "device_ms", [floor], 0.0)
    print(f"{line} | floor {1e3 * floor:5.1f} µs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    options = parser.parse_args()
    report = Report(options.out)
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.2f} TB/s")
    for dtype_name in options.dtypes:
        for case in cases():
            measure(case, dtype_name, bandwidth, report)


if __name__ == "__main__":
    main()
