"""Recommendations from a trained recommender, by the fastest way to execute it on this machine."""

import logging
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroexapt.backend import get_backend, resolve
from neuroexapt.errors import UserError
from neuroexapt.recommend.config import SECTIONS, refuse_unknown, section
from neuroexapt.recommend.failures import in_one_line
from neuroexapt.recommend.manager import TritonOperatorManager
from neuroexapt.recommend.model import SequenceRecommender
from neuroexapt.recommend.request import Request, make_request, split_behaviors, to_tensors
from neuroexapt.recommend.strategies import REFERENCE, STRATEGIES, Execution, Inputs, check_names

logger = logging.getLogger(__name__)

_SERVING = ("strategies", "max_batch_size")
_NO_MODEL = (
    "there is no trained recommender; train one, as `python examples/sequence_recommendation.py --data FILE` "
    "does, and give its file as config['model']"
)
_KEPT_LATENCIES = 10_000


class IntegratedController:
    """Answers requests for recommendations; made by ``create_integrated_controller``.

    Every request scores the full catalogue. A user is known by the history that comes with the request alone,
    so an unknown user is served like any other. Of a history longer than the model's the latest items count;
    an empty one is answered with the items that the training data has most often. Safe to call from several
    threads.

    ``triton_manager``: which operators may run on kernels.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        refuse_unknown(config, SECTIONS, "config")
        serving = section(config, "serving", _SERVING)
        self.triton_manager = TritonOperatorManager(config)
        self.largest_batch: int = serving.get("max_batch_size", 32)
        self._names: Sequence[str] = serving.get("strategies", tuple(STRATEGIES))
        check_names(self._names)
        if not isinstance(self.largest_batch, int) or self.largest_batch < 1:
            raise UserError(f"max_batch_size must be an integer from 1 on, not {self.largest_batch!r}")
        backend = resolve(config["device"]) if "device" in config else get_backend()
        self._device = backend.torch_device
        self._model = _trained_model(config.get("model"), self._device)
        self._execution: Execution | None = None
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._requests = 0
        self._latencies: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT_LATENCIES))
        self._failures: Counter[tuple[str, str]] = Counter()

    @property
    def model(self) -> SequenceRecommender:
        """The recommender; a UserError says how to get one where the config names none."""
        if self._model is None:
            raise UserError(_NO_MODEL)
        return self._model

    def warm_up(self) -> None:
        """Prepare and measure the strategies now, which else the first request does."""
        with self._lock:
            self._prepared()

    def retry(self) -> None:
        """Prepare and measure the strategies again, kernels and strategies that failed before included."""
        with self._lock:
            self.triton_manager.retry_kernels()
            self._execution = None
            self._prepared()

    def infer_with_optimal_strategy(
        self,
        user_id: Any,
        user_behaviors: Sequence[Any],
        num_recommendations: int = 10,
        session_id: Any = None,
        strategy: str = "auto",
        exclude_seen: bool = False,
    ) -> dict[str, Any]:
        """The items that most likely come next.

        Args:
            user_id, session_id: repeated in the answer.
            user_behaviors: the history, oldest first: item ids, or mappings with ``item_id`` and perhaps
                ``timestamp`` in seconds.
            num_recommendations: how many; fewer come back where the catalogue has no more.
            strategy: ``auto``, the fastest, one of ``STRATEGIES``, or ``reference``.
            exclude_seen: recommend nothing that is in the history, however long that is.

        Returns:
            ``recommendations``, a list of ``{item_id, score, rank}`` from rank 1 on; ``inference_strategy``,
            ``optimizations_applied``, ``inference_time_ms``, ``batch_size``, ``user_id``, ``session_id``.

        Raises:
            UserError: an item id is out of range, another argument makes no sense, or there is no model.
            BackendUnavailableError: ``strategy`` cannot run here; the message says why.
        """
        items, timestamps = split_behaviors(user_behaviors)
        request = self.make_request(items, timestamps, num_recommendations, exclude_seen)
        (answer,) = self.infer_batch([request], strategy)
        return {"user_id": user_id, "session_id": session_id, **answer}

    def make_request(
        self,
        items: Sequence[int],
        timestamps: Sequence[int] | None = None,
        num_recommendations: int = 10,
        exclude_seen: bool = False,
    ) -> Request:
        """One request of ``infer_batch``, checked."""
        return make_request(items, timestamps, num_recommendations, exclude_seen, self.model.num_items)

    def infer_batch(self, requests: Sequence[Request], strategy: str = "auto") -> list[dict[str, Any]]:
        """An answer for each request, computed together; more than the largest batch in several runs."""
        size = self.largest_batch
        chunks = [requests[start : start + size] for start in range(0, len(requests), size)]
        with self._lock:
            return [answer for chunk in chunks for answer in self._infer(chunk, strategy)]

    def get_comprehensive_stats(self) -> dict[str, Any]:
        """What ran, how often and how fast.

        ``inference_counts``: runs by strategy; ``requests``; ``latencies``: median and 99th percentile of the
        latest runs by strategy, ms; ``failures`` with their reasons; ``triton_stats``: the manager's,
        which count the recommender's calls except inside of what was compiled, captured or exported.
        Once warmed up also ``warm_up``: what was measured, by strategy and batch size, ms; ``optimizations``:
        the kernels that each strategy runs on; ``unavailable_strategies`` with their reasons.
        """
        with self._lock:
            return {
                "triton_stats": self.triton_manager.get_operator_stats(),
                "requests": self._requests,
                "inference_counts": dict(self._counts),
                "latencies": {name: _percentiles(values) for name, values in self._latencies.items()},
                "failures": [
                    {"strategy": name, "reason": reason, "count": count}
                    for (name, reason), count in self._failures.items()
                ],
                **(self._execution.stats() if self._execution else {}),
            }

    def _prepared(self) -> Execution:
        if self._execution is None:
            self._execution = Execution(
                self.model, self._device, self._names, self.largest_batch, self.triton_manager
            )
        return self._execution

    def _infer(self, requests: Sequence[Request], strategy: str) -> list[dict[str, Any]]:
        execution = self._prepared()
        size = next(size for size in execution.batch_sizes if size >= len(requests))
        if strategy == "auto":
            strategy = execution.fastest(size)
        execution.require(strategy)
        start = time.perf_counter()
        inputs = to_tensors(requests, size, self.model.max_length, self.model.has_times)
        with torch.no_grad():
            scores, strategy = self._scores(execution, strategy, inputs)
            ranked = rank(scores[: len(requests)], requests, self.model.item_counts)
        milliseconds = 1000 * (time.perf_counter() - start)
        self._requests += len(requests)
        self._counts[strategy] += 1
        self._latencies[strategy].append(milliseconds)
        common = {
            "inference_strategy": strategy,
            "optimizations_applied": list(execution.optimizations.get(strategy, ())),
            "inference_time_ms": milliseconds,
            "batch_size": len(requests),
        }
        return [{"recommendations": items, **common} for items in ranked]

    def _scores(self, execution: Execution, strategy: str, inputs: Inputs) -> tuple[Tensor, str]:
        """Scores, and the strategy that gave them: another than the one given, where that fails."""
        if strategy == REFERENCE:
            return execution.run(REFERENCE, inputs), REFERENCE
        try:
            return execution.run(strategy, inputs), strategy
        except Exception as error:  # a kernel, a replay or a session that fails, each in its own way
            failure = strategy, in_one_line(error)
            if failure not in self._failures:
                logger.warning("strategy %s failed, running in plain PyTorch: %s", *failure)
            self._failures[failure] += 1
            execution.withdraw(*failure)
        return execution.run(REFERENCE, inputs), REFERENCE


def create_integrated_controller(config: Mapping[str, Any]) -> IntegratedController:
    """A controller for a configuration with these sections, all optional.

    ``model``: a file that ``SequenceRecommender.save`` wrote, the folder of a run that trained one, or a
    ``SequenceRecommender``; without one the controller has its ``triton_manager`` only. ``device``: a
    backend's name; default: the one in force. ``serving``: ``{strategies, max_batch_size}``.
    ``triton_operators``, ``optimizations``, ``hstu``: the manager's.

    Raises:
        UserError: a key is unknown, a value makes no sense, or the model cannot be read.
    """
    return IntegratedController(config)


def rank(scores: Tensor, requests: Sequence[Request], item_counts: Tensor) -> list[list[dict[str, Any]]]:
    """The best items of each row of scores, which is changed on the way.

    Args:
        scores: [len(requests), num_items + 1], −∞ where an item is not to be recommended.
        item_counts: [num_items + 1], the scores after an empty history.
    """
    for row, request in enumerate(requests):
        if not request.items:
            scores[row, 1:] = item_counts[1:].to(scores)
        if request.exclude_seen:
            scores[row, list(request.items)] = -torch.inf
    most = min(max(request.num_recommendations for request in requests), scores.shape[1] - 1)
    best = scores.topk(most)
    rows = zip(requests, best.values.tolist(), best.indices.tolist(), strict=True)
    return [
        [
            {"item_id": item, "score": score, "rank": rank}
            for rank, (item, score) in enumerate(zip(items, values, strict=True), start=1)
            if rank <= request.num_recommendations and score > -math.inf
        ]
        for request, values, items in rows
    ]


def _trained_model(given: Any, device: torch.device) -> SequenceRecommender | None:
    if given is None:
        return None
    if isinstance(given, (str, Path)):
        given = SequenceRecommender.load(Path(given))
    if not hasattr(given, "scores"):
        raise UserError(f"model must be a file or a SequenceRecommender, not {given!r}")
    return given.to(device).eval().requires_grad_(False)


def _percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    median, p99 = np.percentile(list(milliseconds), (50, 99))
    return {"median_ms": float(median), "p99_ms": float(p99)}
