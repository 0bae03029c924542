"""Timing on the GPU, and results with their provenance: what every benchmark of this folder shares.

``device_ms`` replays a CUDA graph of calls on rotating inputs that together exceed the L2 cache, so it
holds no launch overhead and no cache luck; ``step_ms`` is the wall time of eager calls, launches and all.
"""

import argparse
import datetime
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_REPLAYS = 30
_WALL_CALLS = 50
_WARM_UP_CALLS = 3
_COPY_BYTES = 2**30


@dataclass(frozen=True)
class Spread:
    """Median and percentiles of ``runs`` measurements."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least two values."""
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(deciles[4], deciles[1], deciles[7], len(values))

    @classmethod
    def exactly(cls, value: float) -> "Spread":
        """A figure that was counted, or follows from others."""
        return cls(value, value, value, 1)


def sets_beyond_l2(bytes_per_set: int) -> int:
    """How many sets of inputs it takes to fill the L2 cache twice over."""
    l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    return max(2, math.ceil(2 * l2_bytes / bytes_per_set))


def device_ms(calls: Sequence[Callable[[], Any]]) -> Spread:
    """Milliseconds a call, by replaying one CUDA graph of all ``calls``.

    Results are kept until the graph is complete, so that each call writes memory of its own. ``calls`` are
    called once, on this function's stream: ``current_stream`` is that of the capture.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = [call() for call in calls]
    for _ in range(_WARM_UP_CALLS):
        graph.replay()
    times = [_elapsed_ms(graph.replay) / len(calls) for _ in range(_REPLAYS)]
    del results
    return Spread.of(times)


def wall_ms(call: Callable[[], Any]) -> Spread:
    """Milliseconds of one eager call until the GPU has finished it."""
    for _ in range(_WARM_UP_CALLS):
        call()
    times = []
    for _ in range(_WALL_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return Spread.of(times)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that one call takes beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def copy_gbps() -> Spread:
    """Bandwidth of a large copy on the device, bytes read plus bytes written.

    Launched directly: as a node of a CUDA graph the same copy was a third slower.
    """
    source = torch.randn(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    for _ in range(_WARM_UP_CALLS):
        target.copy_(source)
    return Spread.of(
        [2 * _COPY_BYTES / 1e6 / _elapsed_ms(lambda: target.copy_(source)) for _ in range(_REPLAYS)]
    )


def _elapsed_ms(run: Callable[[], Any]) -> float:
    """Milliseconds that the device takes for what ``run`` launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Results:
    """Appends one JSON object a line to a benchmark's file and prints it in short."""

    def __init__(self, benchmark: str, path: Path, commit: str) -> None:
        self.path = path
        self.provenance = {
            "benchmark": benchmark,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": metadata.version("triton"),
            "cuda": torch.version.cuda,
            "commit": commit,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        case: str,
        implementation: str,
        dtype: str,
        metric: str,
        unit: str,
        spread: Spread,
        max_error: float | None = None,
    ) -> None:
        """Record one figure; ``max_error`` is that of the correctness check it was gated on."""
        figure = {
            "case": case,
            "implementation": implementation,
            "dtype": dtype,
            "metric": metric,
            "unit": unit,
            **asdict(spread),
            "max_error": max_error,
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(self.provenance | figure) + "\n")
        print(f"{case:28} {dtype:9} {implementation:12} {metric:10} {spread.median:10.4f} {unit}", flush=True)


def results_from_arguments(benchmark: str, description: str) -> Results:
    """The results file that the command line names, by default the one kept in the repository."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{benchmark}.jsonl", help="file to append to")
    parser.add_argument("--commit", help="commit to record (default: ask git)")
    arguments = parser.parse_args()
    return Results(benchmark, arguments.out, arguments.commit or _git_commit())


def _git_commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS.parent,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
