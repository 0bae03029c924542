"""Timing on the GPU, and results with their provenance: what every benchmark of this folder shares.

``device_ms`` replays a CUDA graph of calls on rotating inputs that together exceed the L2 cache, so it
holds no launch overhead and no cache luck; ``step_ms`` is the wall time of eager calls, launches and all.
``paced_ms`` and ``device_work`` are for whole steps of training.
"""

import argparse
import datetime
import gc
import itertools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from neuroexapt.engine.device import get_device_name

RESULTS = Path(__file__).parent / "results"
_REPLAYS = 30
_WALL_CALLS = 50
_WARM_UP_CALLS = 3
_COPY_BYTES = 2**30
_PACED_CALLS = 5
_FEWEST_PACED_CALLS = 10


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


def paced_ms(call: Callable[[], Any], seconds: float, device: torch.device) -> Spread:
    """Milliseconds from the end of one call to the end of the next for about ``seconds``.

    Calls are launched without waiting for the one before, as the steps of a training are.
    """
    for _ in range(_WARM_UP_CALLS):
        call()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < _FEWEST_PACED_CALLS or time.perf_counter() < deadline:
        times += _paced_on_gpu(call) if device.type == "cuda" else _paced_on_cpu(call)
    return Spread.of(times)


def _paced_on_gpu(call: Callable[[], Any]) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(1 + _PACED_CALLS)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def _paced_on_cpu(call: Callable[[], Any]) -> list[float]:
    start = time.perf_counter()
    call()
    return [1000 * (time.perf_counter() - start)]


class Work(NamedTuple):
    """A kernel, copy or fill that the GPU ran."""

    name: str
    ms: float


def device_work(call: Callable[[], Any]) -> list[Work]:
    """Everything that the GPU runs for one call, one by one even where a CUDA graph launches it."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    # Not profiler.events(), which takes minutes to make a tree of what is a list.
    return [
        Work(event.name(), event.duration_ns() / 1e6)
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    ]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that one call takes beyond what was allocated before it."""
    gc.collect()  # else what is freed during the call would count as room for it
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

    def __init__(self, benchmark: str, path: Path, commit: str, device: str = "cuda") -> None:
        self.path = path
        self.provenance = {
            "benchmark": benchmark,
            "device": get_device_name(torch.device(device)),
            "torch": torch.__version__,
            "triton": metadata.version("triton"),
            "cuda": torch.version.cuda,
            "commit": commit,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def commit(self) -> str:
        return self.provenance["commit"]

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
        self.record(case, implementation, dtype, metric, unit=unit, **asdict(spread), max_error=max_error)
        print(f"{case:28} {dtype:9} {implementation:13} {metric:13} {spread.median:10.4g} {unit}", flush=True)

    def add_status(self, case: str, implementation: str, dtype: str, status: str) -> None:
        """Record why there are no figures."""
        self.record(case, implementation, dtype, "status", status=status)
        print(f"{case:28} {dtype:9} {implementation:13} {status}", flush=True)

    def record(self, case: str, implementation: str, dtype: str, metric: str, **values: Any) -> None:
        """Append a line that holds ``values``."""
        name = {"case": case, "implementation": implementation, "dtype": dtype, "metric": metric}
        with open(self.path, "a") as file:
            file.write(json.dumps(self.provenance | name | values) + "\n")


def results_from_arguments(benchmark: str, description: str) -> Results:
    """The results file that the command line names, by default the one kept in the repository."""
    return open_results(benchmark, results_parser(benchmark, description).parse_args())


def results_parser(benchmark: str, description: str) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{benchmark}.jsonl", help="file to append to")
    parser.add_argument("--commit", help="commit to record (default: ask git)")
    return parser


def open_results(benchmark: str, arguments: argparse.Namespace, device: str = "cuda") -> Results:
    """The results file that the arguments of ``results_parser`` name; ends the script where there is no
    ``device``.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{benchmark} is measured on an NVIDIA GPU; --help tells what runs without one")
    return Results(benchmark, arguments.out, arguments.commit or _git_commit(), device)


def _git_commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS.parent,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
