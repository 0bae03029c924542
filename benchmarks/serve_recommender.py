"""Load on ``neuroexapt serve-recommender``: the highest rate of requests at a 99th percentile below 20 ms.

``python benchmarks/serve_recommender.py [--model FILE] [--rates 100 200 400] [--seconds 60] [--cpus 2]``
serves the file, or a recommender of Amazon Beauty's size with made-up weights (12,101 items, width 64,
histories of 50), in a process that keeps to ``--cpus`` cores. This process makes the load, on other cores
where there are any, else on the same.

Calls are sent at a fixed rate, whether earlier ones are answered or not, and timed from the moment they were
due. One in ten is malformed and must be refused with 4xx and a reason; every other must be answered. Rates
are tried for some seconds each (``trial_ms``), until one misses the aim; two thirds of the last that kept it
are then held for ``--seconds`` (``latency_ms``), and two thirds of that where it is missed. Answers are first
compared with those of the controller in this process. ``resident_mib`` is the server's memory a tenth into
that time and at its end.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _harness import Results, open_results, results_parser

from neuroexapt.core.genotypes import RECOMMENDERS
from neuroexapt.recommend.controller import IntegratedController, create_integrated_controller
from neuroexapt.recommend.model import SequenceRecommender
from neuroexapt.spaces.seqrec import SEQREC

AIM_MS = 20.0
BEAUTY_ITEMS, BEAUTY_LENGTH, BEAUTY_WIDTH = 12_101, 50, 64
RATES = (100, 200, 400, 600, 800, 1000, 1250, 1500, 2000)
TRIAL_SECONDS = 3.0
HELD_SHARE = 2 / 3
MALFORMED_EVERY = 10
MALFORMED = (
    b"{",
    b"[]",
    b'{"history": "1, 2, 3"}',
    b'{"history": [0]}',
    b'{"history": [99999999]}',
    b'{"history": [1.5]}',
    b'{"history": [1, NaN]}',
    b'{"history": [1], "num_recommendations": -1}',
    b'{"history": [1], "num_recommendations": 1000000}',
    b'{"history": [1], "timestamps": [1, 2]}',
    b'{"history": [' + b"1," * 2000 + b"1]}",
    b'{"history": [1], "surprise": true}',
    b"\xff\xfe",
    b"[" * 5000,
    b'{"history": [' + b"1," * 600_000 + b"1]}",
)


class Connection:
    """One kept-alive HTTP/1.1 connection; a general client would take more time than the server."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self._streams is None or self._streams[0].at_eof():  # the server closes connections that idle
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        answer = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), answer

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            self._streams = None


@dataclass
class Outcome:
    """What became of the calls of one load."""

    rate: float
    seconds: float
    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    resident_mib: list[float] = field(default_factory=list)

    @property
    def p99_ms(self) -> float:
        return statistics.quantiles(self.latencies_ms, n=100, method="inclusive")[98]

    @property
    def kept_the_aim(self) -> bool:
        return not self.wrong and self.p99_ms < AIM_MS

    def figures(self) -> dict[str, Any]:
        cuts = statistics.quantiles(self.latencies_ms, n=100, method="inclusive")
        return {
            "rate": self.rate,
            "seconds": self.seconds,
            "calls": len(self.latencies_ms),
            "p50": cuts[49],
            "p80": cuts[79],
            "p99": cuts[98],
            "largest": max(self.latencies_ms),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "wrong": dict(self.wrong),
            "resident_mib": [self.resident_mib[len(self.resident_mib) // 10], self.resident_mib[-1]],
        }


def bodies(num_items: int, longest: int) -> Iterator[tuple[bytes, bool]]:
    """Bodies of requests without end, and whether each is malformed; the same in every run."""
    draw = random.Random(0)
    malformed = itertools.cycle(MALFORMED)
    for number in itertools.count(1):
        if number % MALFORMED_EVERY == 0:
            yield next(malformed), True
        else:
            history = [draw.randint(1, num_items) for _ in range(draw.randint(0, longest + 10))]
            request = {"user_id": number, "history": history, "exclude_seen": number % 2 == 0}
            yield json.dumps(request).encode(), False


async def load(
    port: int, pid: int, rate: float, seconds: float, requests: Iterator[tuple[bytes, bool]]
) -> Outcome:
    """Send ``rate`` calls a second for ``seconds`` and wait for the answers."""
    outcome = Outcome(rate, seconds)
    free: list[Connection] = []

    async def send(due: float, body: bytes, malformed: bool) -> None:
        connection = free.pop() if free else Connection("127.0.0.1", port)
        try:
            status, answer = await connection.call("POST", "/recommend", body)
        except (OSError, asyncio.IncompleteReadError) as error:
            outcome.wrong[type(error).__name__] += 1
            return
        free.append(connection)
        outcome.latencies_ms.append(1000 * (time.perf_counter() - due))
        outcome.statuses[status] += 1
        if (problem := _problem(status, answer, malformed)) is not None:
            outcome.wrong[problem] += 1

    start, sent = time.perf_counter(), set()
    for number, (body, malformed) in zip(range(int(rate * seconds)), requests):  # noqa: B905  without end
        due = start + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        call = asyncio.create_task(send(due, body, malformed))
        sent.add(call)
        call.add_done_callback(sent.discard)
        if number % max(1, int(rate)) == 0:
            outcome.resident_mib.append(_resident_mib(pid))
    while sent:
        await asyncio.wait(sent)
    outcome.resident_mib.append(_resident_mib(pid))
    for connection in free:
        connection.close()
    return outcome


def _problem(status: int, answer: bytes, malformed: bool) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if malformed:
        fine = 400 <= status < 500 and json.loads(answer).get("error")
        return None if fine else f"malformed, but {status}"
    if status != 200:
        return f"{status}: {answer[:80]!r}"
    ranks = [entry["rank"] for entry in json.loads(answer)["recommendations"]]
    return None if ranks == list(range(1, 11)) else f"ranks {ranks}"


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


@contextlib.contextmanager
def serving(model: Path, cpus: int, options: list[str]) -> Iterator[tuple[int, int]]:
    """A server of ``model`` in a process of its own: its port and process id."""
    ours = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "neuroexapt", "serve-recommender", str(model), "--port=0"]
    os.sched_setaffinity(0, ours[:cpus])  # which the new process inherits
    server = subprocess.Popen([*command, "--device=cpu", *options], stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(0, ours[cpus:] or ours)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        if not address:
            raise SystemExit("the server did not start")
        yield int(address.rpartition(":")[2]), server.pid
    finally:
        server.terminate()
        if server.wait(20) != 0:
            raise SystemExit(f"the server ended with {server.returncode}")


async def largest_difference(port: int, controller: IntegratedController, calls: int) -> float:
    """Of the server's scores from the controller's, item by item and rank by rank."""
    connection, worst = Connection("127.0.0.1", port), 0.0
    for body, malformed in itertools.islice(bodies(controller.model.num_items, 50), calls):
        if malformed:
            continue
        request = json.loads(body)
        _, answer = await connection.call("POST", "/recommend", body)
        expected = controller.infer_with_optimal_strategy(
            request["user_id"],
            request["history"],
            controller.model.num_items,
            strategy="eager",
            exclude_seen=request["exclude_seen"],
        )["recommendations"]
        score_of = {entry["item_id"]: entry["score"] for entry in expected}
        for found, best in zip(json.loads(answer)["recommendations"], expected[:10], strict=True):
            of_item = score_of.get(found["item_id"], math.inf)
            worst = max(worst, abs(found["score"] - of_item), abs(found["score"] - best["score"]))
    connection.close()
    return worst


def beauty_sized_recommender(path: Path) -> None:
    """An HSTU of two layers with made-up weights, as large as that for Amazon Beauty."""
    torch.manual_seed(0)
    network = SEQREC.network(
        RECOMMENDERS["HSTU"],
        num_items=BEAUTY_ITEMS,
        max_length=BEAUTY_LENGTH,
        has_times=False,
        channels=BEAUTY_WIDTH,
        layers=2,
    )
    SequenceRecommender(network, torch.arange(BEAUTY_ITEMS + 1)).save(path)


async def measure(arguments: argparse.Namespace, results: Results, port: int, pid: int, model: Path) -> bool:
    alone = {"strategies": ["eager"], "max_batch_size": 1}
    controller = create_integrated_controller({"model": model, "device": "cpu", "serving": alone})
    controller.warm_up()  # not while a connection is open, which the server would close as idle
    difference = await largest_difference(port, controller, 40)
    case = f"{arguments.model.stem if arguments.model else 'beauty-d64-n50'}-{arguments.cpus}cpus"
    if not difference < 1e-3:
        results.add_status(case, "server", "float32", f"scores differ by {difference:.1e}")
        return False
    requests = bodies(controller.model.num_items, controller.model.max_length)
    best = None
    for rate in arguments.rates:
        outcome = await load(port, pid, rate, arguments.trial_seconds, requests)
        results.record(case, "server", "float32", "trial_ms", unit="ms", **outcome.figures())
        print(f"{rate:6g} requests/s: p99 {outcome.p99_ms:.1f} ms {dict(outcome.wrong)}", flush=True)
        if not outcome.kept_the_aim:
            break
        best = rate
    if best is None:
        results.add_status(case, "server", "float32", f"p99 above {AIM_MS} ms at every rate")
        return False
    while (best := best * HELD_SHARE) > 1:
        outcome = await load(port, pid, best, arguments.seconds, requests)
        figures = outcome.figures() | {"unit": "ms", "max_error": difference, "cpus": arguments.cpus}
        metric = "latency_ms" if outcome.kept_the_aim else "trial_ms"
        results.record(case, "server", "float32", metric, **figures)
        print(json.dumps(figures), flush=True)
        if outcome.kept_the_aim:
            return True
    return False


def main() -> None:
    parser = results_parser("serve_recommender", __doc__ or "")
    parser.add_argument("--model", type=Path, help="file of a trained recommender")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="requests a second to try")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load that counts")
    parser.add_argument("--trial-seconds", type=float, default=TRIAL_SECONDS, help="of each rate tried")
    parser.add_argument("--cpus", type=int, default=2, help="cores for the server")
    parser.add_argument("--quick", action="store_true", help="a few seconds in all")
    arguments, options = parser.parse_known_args()
    if arguments.quick:
        arguments.rates, arguments.seconds, arguments.trial_seconds = [50.0, 100.0], 5.0, 2.0
    torch.set_num_threads(1)
    results = open_results("serve_recommender", arguments, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder) / "beauty.safetensors"
        if arguments.model is None:
            beauty_sized_recommender(model)
        with serving(model, arguments.cpus, options) as (port, pid):
            fine = asyncio.run(measure(arguments, results, port, pid, model))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
