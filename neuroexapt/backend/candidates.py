"""Which kernels could run an op here. Kernel modules are imported when first asked for."""

import contextlib
import functools
import importlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

import torch

from neuroexapt.backend import registry
from neuroexapt.backend.registry import Support
from neuroexapt.backend.tuning import smallest_worthwhile_size
from neuroexapt.kernels import reference

# Imported on the first call that could use them, since that import needs Triton.
MODULES = {
    ("softmax_sum", "ext"): "neuroexapt.cuda_ops.softmax_sum",
    ("weighted_sum", "ext"): "neuroexapt.cuda_ops.softmax_sum",
    ("softmax_sum", "triton"): "neuroexapt.kernels.softmax_sum_triton",
    ("weighted_sum", "triton"): "neuroexapt.kernels.softmax_sum_triton",
    ("relu_conv_bn", "ext"): "neuroexapt.cuda_ops.preprocess",
    ("factorized_reduce", "ext"): "neuroexapt.cuda_ops.preprocess",
    ("relu_conv_bn", "triton"): "neuroexapt.kernels.preprocess_triton",
    ("factorized_reduce", "triton"): "neuroexapt.kernels.preprocess_triton",
    ("cell", "ext"): "neuroexapt.cuda_ops.cell",
    ("cell", "triton"): "neuroexapt.kernels.cell_triton",
    ("sepconv", "ext"): "neuroexapt.cuda_ops.sepconv",
    ("sepconv", "triton"): "neuroexapt.kernels.sepconv_triton",
    ("avg_pool", "triton"): "neuroexapt.kernels.pool_triton",
    ("max_pool", "triton"): "neuroexapt.kernels.pool_triton",
    ("global_avg_pool", "triton"): "neuroexapt.kernels.pool_triton",
    ("fused_attention_layernorm", "triton"): "neuroexapt.kernels.fused_attention_layernorm_triton",
    ("hstu_hierarchical_attention", "triton"): "neuroexapt.kernels.hstu_hierarchical_attention_triton",
    (
        "hierarchical_sequence_fusion",
        "triton",
    ): "neuroexapt.kernels.hierarchical_sequence_fusion_triton",
    ("interaction_operator", "triton"): "neuroexapt.kernels.interaction_operator_triton",
    (
        "sequence_recommendation_interaction",
        "triton",
    ): "neuroexapt.kernels.sequence_recommendation_interaction_triton",
}
# A step of the published network in bf16 and channels-last takes 39 ms without and 96 ms with their kernels.
WANT_NCHW = frozenset({"sepconv", "avg_pool", "max_pool", "global_avg_pool"})
# Best first, as measured: see TRITON_CUDA_OPTIMIZATION_SUITE.md.
KERNEL_TIERS = ("ext", "triton")

_launches_are_free: ContextVar[bool] = ContextVar("neuroexapt_launches_are_free", default=False)
_switched_off: ContextVar[frozenset[str]] = ContextVar("neuroexapt_switched_off", default=frozenset())


@contextlib.contextmanager
def free_launches() -> Iterator[None]:
    """Choose kernels by device time inside the block, as for what becomes a CUDA graph.

    They save that at every size; from small tensors it is the Python around each launch that keeps them.
    """
    token = _launches_are_free.set(True)
    try:
        yield
    finally:
        _launches_are_free.reset(token)


@contextlib.contextmanager
def without_kernels(ops: Iterable[str]) -> Iterator[None]:
    """Run ``ops`` in plain PyTorch inside the block; the choice among kernels stays as it is for others."""
    token = _switched_off.set(_switched_off.get().union(ops))
    try:
        yield
    finally:
        _switched_off.reset(token)


def candidates(
    op: str, dtype: torch.dtype, operands: int
) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """The kernel tiers that may run ``op``, and why others may not.

    Each comes with the size of tensor from which on it pays off, 0 where the user chose it by name.
    """
    if op in _switched_off.get():
        return (), ("its kernels are switched off",)
    chosen = registry.get_backend().tier
    usable, refusals = [], []
    for tier in KERNEL_TIERS if chosen == "auto" else (chosen,):
        reason = _why_not(op, tier)
        if reason:
            refusals.append(f"{tier}: {reason}")
        elif chosen != "auto":
            usable.append((tier, 0))
        elif _launches_are_free.get():
            usable.append((tier, 1))
        else:
            usable.append((tier, smallest_worthwhile_size(op, tier, dtype, operands)))
    return tuple(usable), tuple(refusals)


def implements(op: str, tier: str) -> bool:
    """Whether ``op`` has an implementation on ``tier``, which is then registered."""
    module = MODULES.get((op, tier))
    if module is not None:
        _register_all_of(module)
    return (op, tier) in registry.IMPLEMENTATIONS


@functools.cache
def _register_all_of(module: str) -> None:
    """Import a kernel module; what a user registered before stays in force."""
    registered_before = dict(registry.IMPLEMENTATIONS)
    importlib.import_module(module)
    registry.IMPLEMENTATIONS.update(registered_before)


def _why_not(op: str, tier: str) -> str:
    """Empty where ``tier`` runs here and implements ``op``."""
    return registry.probe_tier(tier) or ("" if implements(op, tier) else f"does not implement {op}")


for _op in (
    "weighted_sum",
    "softmax_sum",
    "sepconv",
    "avg_pool",
    "max_pool",
    "global_avg_pool",
    "relu_conv_bn",
    "factorized_reduce",
    "fused_attention_layernorm",
    "hierarchical_sequence_fusion",
    "interaction_operator",
    "sequence_recommendation_interaction",
    "hstu_hierarchical_attention",
):
    registry.register_impl(_op, "torch", getattr(reference, _op), lambda *args, **kwargs: Support(True))
