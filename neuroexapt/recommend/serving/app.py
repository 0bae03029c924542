"""The application: ``/recommend``, ``/recommend_batch``, ``/health``, ``/metrics``.

A call that cannot be answered gets 4xx with ``{"error": reason}``; 429 is for as long as too many wait.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from neuroexapt.errors import UserError
from neuroexapt.recommend.controller import IntegratedController
from neuroexapt.recommend.request import Request
from neuroexapt.recommend.serving.batching import Batcher, QueueFullError
from neuroexapt.recommend.serving.body_limit import BodyLimit
from neuroexapt.recommend.serving.metrics import CountCalls, Metrics
from neuroexapt.recommend.serving.schemas import (
    DEFAULT_LIMITS,
    REFUSALS,
    Answer,
    Answers,
    Limits,
    request_schemas,
)


def create_app(
    controller: IntegratedController, limits: Limits = DEFAULT_LIMITS, patience_ms: float = 0.0
) -> FastAPI:
    """The application that answers with ``controller``, which is warmed up as the application starts.

    Args:
        patience_ms: how long a request waits for others to be computed with, where nothing is running.
    """

    def infer(requests: Sequence[Request]) -> list[dict[str, Any]]:
        answers = controller.infer_batch(requests)
        metrics.count_batch(answers)
        return answers

    batcher = Batcher(infer, controller.largest_batch, patience_ms / 1000, limits.queue)
    metrics = Metrics(lambda: batcher.waiting)
    RecommendBody, BatchBody = request_schemas(limits)

    async def answer(body: Any, request: Request) -> dict[str, Any]:
        return {
            "user_id": body.user_id,
            "session_id": body.session_id,
            **await batcher.submit(request),
        }

    def to_request(body: Any) -> Request:
        return controller.make_request(
            body.history, body.timestamps, body.num_recommendations, body.exclude_seen
        )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(controller.warm_up)
        async with batcher.running():
            yield

    app = FastAPI(title="neuroexapt recommender", lifespan=lifespan)
    _explain_refusals(app)

    @app.post("/recommend", response_model=Answer, responses=REFUSALS)
    async def recommend(body: RecommendBody) -> Response:  # type: ignore[valid-type]
        """The items that most likely follow a history."""
        return _json(await answer(body, to_request(body)))

    @app.post("/recommend_batch", response_model=Answers, responses=REFUSALS)
    async def recommend_batch(body: BatchBody) -> Response:  # type: ignore[valid-type]
        """The same for several histories, refused as a whole where one of them is."""
        bodies = body.requests  # type: ignore[attr-defined]
        requests = [to_request(body) for body in bodies]
        batcher.require_room(len(requests))
        return _json({"answers": await asyncio.gather(*map(answer, bodies, requests))})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """That the server answers, and what its recommender is like."""
        return {
            "status": "ok",
            "num_items": controller.model.num_items,
            "max_length": controller.model.max_length,
            "waiting_requests": batcher.waiting,
        }

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counts and latencies in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(BodyLimit, largest=limits.body_bytes)
    app.add_middleware(
        CountCalls, metrics=metrics, paths=("/recommend", "/recommend_batch", "/health", "/metrics")
    )
    return app


def _explain_refusals(app: FastAPI) -> None:
    """Give every refusal the form ``{"error": reason}``, in one line, without repeating the input."""

    @app.exception_handler(RequestValidationError)
    async def malformed(call: Call, error: RequestValidationError) -> Response:
        if "json" not in call.headers.get("content-type", "").lower():
            return JSONResponse({"error": "send JSON, with the header content-type: application/json"}, 415)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        detail = f": {first['ctx']['error']}" if first["type"] == "json_invalid" else ""
        return JSONResponse({"error": f"{place}: {first['msg']}{detail}"}, 422)

    @app.exception_handler(UserError)
    async def impossible(_: Any, error: UserError) -> Response:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(HTTPException)
    async def refused(_: Any, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(QueueFullError)
    async def busy(_: Any, error: QueueFullError) -> Response:
        reason = "too many requests are waiting; try again in a second"
        return JSONResponse({"error": reason}, 429, headers={"Retry-After": "1"})

    @app.exception_handler(Exception)  # which goes on to the log
    async def failed(_: Any, error: Exception) -> Response:
        return JSONResponse({"error": "the server failed; its log says how"}, 500)


def _json(answer: dict[str, Any]) -> Response:
    """Not through the response model, which would check every score anew."""
    return Response(json.dumps(answer, separators=(",", ":")), media_type="application/json")
