"""What the server counts and times, in Prometheus' terms."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one application; ``waiting`` gives the length of its queue."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.calls = Counter("recommender_calls", "Calls answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "recommender_call_seconds", "Time to answer", ["path"], buckets=_SECONDS, registry=registry
        )
        self.batches = Histogram(
            "recommender_batch_size", "Requests answered together", buckets=_SIZES, registry=registry
        )
        self.inferences = Counter(
            "recommender_inferences", "Batches computed", ["strategy"], registry=registry
        )
        queue = Gauge("recommender_waiting_requests", "Requests in the queue", registry=registry)
        queue.set_function(waiting)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def count_call(self, path: str, status: int, start: float) -> None:
        """Count and time a call that began at ``start`` on ``time.perf_counter``."""
        self.calls.labels(path, status).inc()
        self.seconds.labels(path).observe(time.perf_counter() - start)

    def count_batch(self, answers: Sequence[dict[str, Any]]) -> None:
        """Count the answers of one batch."""
        self.batches.observe(len(answers))
        self.inferences.labels(answers[0]["inference_strategy"]).inc()


class CountCalls:
    """ASGI middleware: counts and times every call. Unknown paths are one, else they would pile up."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Iterable[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_call(path, message["status"], start)
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception:  # answered outside of here
            self._metrics.count_call(path, 500, start)
            raise
