"""The fused search cell in Triton, for machines without a CUDA compiler; stored in fp32 or bf16.

It runs as the one in CUDA C++ does, see ``neuroexapt.cuda_ops.cell``, with any number of channels up to 128.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.core.drawn import statistics_of_drawn
from neuroexapt.core.plan import CellPlan
from neuroexapt.cuda_ops import cell as fused
from neuroexapt.kernels import cell_kernels_triton

MAX_PIXELS, MAX_PICTURE, MAX_TERMS = 2**30, 2**31, 96
"""Of a batch, values of one picture, and of what enters a node or leaves a state."""


def cell(plan: CellPlan, states: Sequence[Tensor], weights: Tensor, *, drawn_only: bool = False) -> Tensor:
    """What ``functional.cell`` computes, in the dtypes and with the products of ``cuda_ops.cell.cell``.

    All candidates run in any case.
    """
    keeping = statistics_of_drawn(plan, weights) if drawn_only else nullcontext()
    with torch.cuda.device_of(states[0]), keeping:
        return fused.run(plan, states, weights, cell_kernels_triton, drawn_only=drawn_only)


def supports(
    plan: CellPlan, states: Sequence[Tensor], weights: Tensor, *, drawn_only: bool = False
) -> Support:
    """Whether the kernels take these arguments."""
    reason = next(_refusals(plan, states, weights), "")
    return Support(not reason, reason)


def _refusals(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> Iterator[str]:
    yield from fused.refusals(plan, fused.flows_of(plan), states, weights)
    batch, channels, height, width = states[0].shape
    if channels > cell_kernels_triton.MAX_CHANNELS:
        yield f"{channels} channels"
    if batch * height * width >= MAX_PIXELS:
        yield "2^30 pixels or more in a batch"
    if channels * height * width >= MAX_PICTURE:
        yield "2^31 values or more in a picture"
    if any(len(node.terms) + len(node.edges) > MAX_TERMS for node in plan.nodes):
        yield "too many terms enter one node"
    if any(len(s.convs) + len(s.modules) + len(s.edges) >= MAX_TERMS for s in plan.states):
        yield "too many operations leave one state"


register_impl("cell", "triton", cell, supports)
