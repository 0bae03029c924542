"""Which implementation runs a call, and the record of what ran.

A call on the GPU takes the first of the candidate tiers that supports its arguments and, where the
choice is automatic, that is known to pay off at its size; every other call runs the reference in
plain PyTorch. Nothing here looks at a tensor's values, so nothing synchronises with the GPU.
"""

import functools
import importlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroexapt.backend import registry
from neuroexapt.backend.registry import Support
from neuroexapt.backend.tuning import smallest_worthwhile_size
from neuroexapt.kernels import reference

logger = logging.getLogger(__name__)

# Imported on the first call that could use them, since that import needs Triton.
_MODULES = {
    ("softmax_sum", "ext"): "neuroexapt.cuda_ops.softmax_sum",
    ("weighted_sum", "ext"): "neuroexapt.cuda_ops.softmax_sum",
    ("softmax_sum", "triton"): "neuroexapt.kernels.softmax_sum_triton",
    ("weighted_sum", "triton"): "neuroexapt.kernels.softmax_sum_triton",
    ("sepconv", "triton"): "neuroexapt.kernels.sepconv_triton",
    ("avg_pool", "triton"): "neuroexapt.kernels.pool_triton",
    ("max_pool", "triton"): "neuroexapt.kernels.pool_triton",
    ("global_avg_pool", "triton"): "neuroexapt.kernels.pool_triton",
}
# Best first: both tiers move the same bytes, and the extension costs less to launch.
_KERNEL_TIERS = ("ext", "triton")


@dataclass(frozen=True)
class Decision:
    """The tier that runs an op's call, and why."""

    op: str
    impl: str
    reason: str


_calls: Counter[Decision] = Counter()


def dispatch(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` with the implementation that ``explain`` names."""
    decision = explain(op, *args, **kwargs)
    if not torch.compiler.is_compiling():
        _calls[decision] += 1
        _log_once(decision)
    return registry.IMPLEMENTATIONS[op, decision.impl].fn(*args, **kwargs)


def explain(op: str, *args: Any, **kwargs: Any) -> Decision:
    """Which implementation a call would run, and why."""
    x, operands = _subject(args[0])
    if x.device.type != "cuda":
        return Decision(op, "torch", f"the input is on {x.device.type}")
    chosen, tiers, refusals = _candidates(op)
    for tier in tiers:
        support = registry.IMPLEMENTATIONS[op, tier].supports(*args, **kwargs)
        if not support.ok:
            refusals += (f"{tier}: {support.reason}",)
        elif chosen == tier:
            return Decision(op, tier, "chosen by name")
        elif x.numel() >= smallest_worthwhile_size(op, tier, x.dtype, operands):
            return Decision(op, tier, "pays off at this size")
        else:
            refusals += (f"{tier}: too small or too few operands to pay off",)
    return Decision(op, "torch", "; ".join(refusals) or "chosen by name")


def dispatch_report() -> dict[Decision, int]:
    """How often each decision was taken since the start or the last reset.

    Calls inside ``torch.compile`` are decided once, while it traces, and not counted.
    """
    return dict(_calls)


def reset_dispatch_report() -> None:
    """Forget the calls counted so far."""
    _calls.clear()


def _subject(first_argument: Tensor | Sequence[Tensor]) -> tuple[Tensor, int]:
    """The tensor that stands for the call's size, and the number of operands of that size."""
    if isinstance(first_argument, Tensor):
        return first_argument, 1
    return first_argument[0], len(first_argument)


@torch.compiler.assume_constant_result
def _candidates(op: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The chosen tier, the kernel tiers that may run ``op``, and why others may not."""
    chosen = registry.get_backend().tier
    wanted = _KERNEL_TIERS if chosen == "auto" else (chosen,)
    reasons = {tier: _unusable(op, tier) for tier in wanted if tier != "torch"}
    usable = tuple(tier for tier, reason in reasons.items() if not reason)
    refusals = tuple(f"{tier}: {reason}" for tier, reason in reasons.items() if reason)
    return chosen, usable, refusals


def _unusable(op: str, tier: str) -> str:
    """Empty where ``tier`` runs here and implements ``op``, which is then registered."""
    reason = registry.probe_tier(tier)
    if reason:
        return reason
    module = _MODULES.get((op, tier))
    if module is not None:
        _register_all_of(module)
    return "" if (op, tier) in registry.IMPLEMENTATIONS else f"does not implement {op}"


@functools.cache
def _register_all_of(module: str) -> None:
    """Import a kernel module; what a user registered before stays in force."""
    registered_before = dict(registry.IMPLEMENTATIONS)
    importlib.import_module(module)
    registry.IMPLEMENTATIONS.update(registered_before)


@functools.cache
def _log_once(decision: Decision) -> None:
    """Say once what runs an op and why."""
    logger.info("%s runs on %s: %s", decision.op, decision.impl, decision.reason)


for _op in ("weighted_sum", "softmax_sum", "sepconv", "avg_pool", "max_pool", "global_avg_pool"):
    registry.register_impl(_op, "torch", getattr(reference, _op), lambda *args, **kwargs: Support(True))
