"""Which implementation runs a call, and the record of what ran.

A call on the GPU takes the first of the candidate tiers that supports its arguments and, where the
choice is automatic, that is known to pay off at its size; every other call runs the reference in
plain PyTorch. Nothing here looks at a tensor's values, so nothing synchronises with the GPU.
"""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroexapt.backend import candidates, registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """The tier that runs an op's call, and why."""

    op: str
    impl: str
    reason: str


Observer = Callable[[Decision, Callable[..., Any], tuple, dict], Any]

_calls: Counter[Decision] = Counter()
_observer: ContextVar[Observer | None] = ContextVar("neuroexapt_observer", default=None)


def dispatch(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` with the implementation that ``explain`` names."""
    decision = explain(op, *args, **kwargs)
    run = registry.IMPLEMENTATIONS[op, decision.impl].fn
    if torch.compiler.is_compiling():
        return run(*args, **kwargs)
    _calls[decision] += 1
    _log_once(decision)
    observer = _observer.get()
    return run(*args, **kwargs) if observer is None else observer(decision, run, args, kwargs)


def explain(op: str, *args: Any, **kwargs: Any) -> Decision:
    """Which implementation a call would run, and why."""
    x, operands = _subject(args)
    if x.device.type != "cuda":
        return Decision(op, "torch", f"the input is on {x.device.type}")
    tiers, refusals = _candidates(op, x.dtype, operands)
    for tier, min_elements in tiers:
        support = registry.IMPLEMENTATIONS[op, tier].supports(*args, **kwargs)
        if not support.ok:
            refusals += (f"{tier}: {support.reason}",)
        elif x.numel() < min_elements:
            refusals += (f"{tier}: would not pay off at this size",)
        elif min_elements and op in candidates.WANT_NCHW and _is_channels_last(x):
            refusals += (f"{tier}: PyTorch is faster in channels-last",)
        else:
            return Decision(op, tier, "pays off at this size" if min_elements else "chosen by name")
    return Decision(op, "torch", "; ".join(refusals))


def dispatch_report() -> dict[Decision, int]:
    """How often each decision was taken since the start or the last reset.

    Calls inside ``torch.compile`` are decided once, while it traces, and not counted.
    """
    return dict(_calls)


def reset_dispatch_report() -> None:
    """Forget the calls counted so far."""
    _calls.clear()


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, ``observer(decision, run, args, kwargs)`` takes the place of ``run(*args, **kwargs)``.

    Holds for this thread, and not for what ``torch.compile`` has traced. Of nested ones the innermost counts.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _subject(args: Sequence[Any]) -> tuple[Tensor, int]:
    """The tensor that stands for the call's size, and the number of operands of that size."""
    first_operand = next(arg for arg in args if isinstance(arg, Tensor | Sequence))
    if isinstance(first_operand, Tensor):
        return first_operand, 1
    return first_operand[0], len(first_operand)


def _candidates(op: str, dtype: torch.dtype, operands: int) -> tuple[tuple, tuple]:
    if torch.compiler.is_compiling():
        from neuroexapt.backend import tracing

        return tracing.candidates(op, dtype, operands)
    return candidates.candidates(op, dtype, operands)


@functools.cache
def _log_once(decision: Decision) -> None:
    """Say once what runs an op and why."""
    logger.info("%s runs on %s: %s", decision.op, decision.impl, decision.reason)
