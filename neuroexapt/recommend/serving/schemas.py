"""What the server takes and answers, as JSON, and the limits of it."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Limits:
    """What a call may ask for; beyond it, it is refused with the reason.

    ``history``: items of a history. ``recommendations``: of a request. ``requests``: in a call of
    ``/recommend_batch``, and no more than fit the queue. ``body_bytes``: of a call. ``queue``: requests that
    wait; more are refused.
    """

    history: int = 1000
    recommendations: int = 100
    requests: int = 32
    body_bytes: int = 2**20
    queue: int = 256


DEFAULT_LIMITS = Limits()


class Recommendation(BaseModel):
    """One item of an answer."""

    item_id: int
    score: float
    rank: int


class Answer(BaseModel):
    """What ``/recommend`` answers."""

    user_id: str | int | None
    session_id: str | int | None
    recommendations: list[Recommendation]
    inference_strategy: str
    optimizations_applied: list[str]
    inference_time_ms: float
    batch_size: int


class Answers(BaseModel):
    """What ``/recommend_batch`` answers, in the order of its requests."""

    answers: list[Answer]


class Refusal(BaseModel):
    """What every call that is not answered gets."""

    error: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": description}
    for status, description in {
        400: "The body is no text",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The body is not declared as JSON",
        422: "The body is malformed, or asks for what there is not",
        429: "Too many requests are waiting",
        500: "The server failed",
    }.items()
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def request_schemas(limits: Limits) -> tuple[type[BaseModel], type[BaseModel]]:
    """What ``/recommend`` and ``/recommend_batch`` take within these limits."""
    identity = Annotated[str, Field(max_length=200)] | int | None
    integers = Annotated[list[int], Field(max_length=limits.history)]

    class RecommendBody(_Body):
        user_id: identity = None
        session_id: identity = None
        history: integers
        timestamps: integers | None = None
        num_recommendations: int = Field(10, ge=1, le=limits.recommendations)
        exclude_seen: bool = False

    class BatchBody(_Body):
        requests: list[RecommendBody] = Field(min_length=1, max_length=min(limits.requests, limits.queue))

    return RecommendBody, BatchBody
