"""The cell of the search network: a complete directed acyclic graph with a MixedOp on every edge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from neuroexapt import functional
from neuroexapt.core import merged  # noqa: F401  (registers the plan's PyTorch tier)
from neuroexapt.core.operations import FactorizedReduce, MixedOp, ReLUConvBN
from neuroexapt.core.plan import CellPlan, plan_cell
from neuroexapt.core.recompute import recomputed
from neuroexapt.errors import UserError

INPUTS = 2
"""States 0 and 1 of every cell: the outputs of the two cells before."""


@dataclass(frozen=True)
class CellTopology:
    """``nodes`` intermediate states, each fed by every earlier state."""

    nodes: int = 4

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """``(source, target)`` of every edge in the order of the rows of α."""
        targets = range(INPUTS, INPUTS + self.nodes)
        return tuple((source, target) for target in targets for source in range(target))

    @property
    def concat(self) -> tuple[int, ...]:
        return tuple(range(INPUTS, INPUTS + self.nodes))

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("c_{k-2}", "c_{k-1}", *(str(node) for node in range(self.nodes)))


def edge_stride(source: int, reduction: bool) -> int:
    """A reduction cell halves its resolution on the edges that leave its inputs."""
    return 2 if reduction and source < INPUTS else 1


class CellInputs(nn.Module):
    """Bring the outputs of the two cells before to this cell's width and resolution.

    s0 is twice as large as s1 when the cell before was a reduction cell, so it is reduced here.
    """

    def __init__(
        self, channels_s0: int, channels_s1: int, channels: int, reduction_prev: bool, affine: bool
    ) -> None:
        super().__init__()
        self.preprocess0: nn.Module
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(channels_s0, channels, affine)
        else:
            self.preprocess0 = ReLUConvBN(channels_s0, channels, 1, affine=affine)
        self.preprocess1 = ReLUConvBN(channels_s1, channels, 1, affine=affine)

    def forward(self, s0: Tensor, s1: Tensor) -> list[Tensor]:
        return [self.preprocess0(s0), self.preprocess1(s1)]


class SearchCell(nn.Module):
    """``node_j = Σ_{i<j} MixedOp_ij(state_i, weights_ij)``; the output joins all nodes.

    ``s0``, ``s1``: [B, C0, H0, W0], [B, C1, H, W]; ``weights``: [E, K], a row an edge of ``topology.edges``
    → [B, nodes · C, H', W'], halved in a reduction cell.

    ``fused`` cells run by their plan, others one module after the other; those that ``recompute`` keep only
    ``s0``, ``s1`` and ``weights`` for their backward pass. Switch both whenever you like.

    Raises:
        UserError: ``weights`` is not [E, K].
    """

    recompute = False
    _fused = True

    def __init__(
        self,
        topology: CellTopology,
        primitives: Sequence[str],
        channels_s0: int,
        channels_s1: int,
        channels: int,
        reduction: bool,
        reduction_prev: bool,
    ) -> None:
        super().__init__()
        self.topology = topology
        self.reduction = reduction
        self.inputs = CellInputs(channels_s0, channels_s1, channels, reduction_prev, affine=False)
        self.edges = nn.ModuleList(
            MixedOp(channels, edge_stride(source, reduction), primitives) for source, _ in topology.edges
        )
        self.channels_out = topology.nodes * channels
        self._weights_shape = (len(topology.edges), len(primitives))
        self._plan: CellPlan | None = None

    def stride(self, source: int) -> int:
        """Of every edge that leaves state ``source``."""
        return edge_stride(source, self.reduction)

    @property
    def fused(self) -> bool:
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        self._fused = fused
        for edge in self.edges:
            if isinstance(edge, MixedOp):
                edge.fused = fused

    @property
    def plan(self) -> CellPlan:
        """The plan of the cell as it is now."""
        if self._plan is None or not self._plan.fits(self.edges._modules.values(), self.training):
            self._plan = plan_cell(self)
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make plans of their own."""
        return {**super().__getstate__(), "_plan": None}

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        if weights.shape != self._weights_shape:
            raise UserError(f"weights must have shape {[*self._weights_shape]}, not {[*weights.shape]}")
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self, self._run, s0, s1, weights)
        return self._run(s0, s1, weights)

    def _run(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        states = self.inputs(s0, s1)
        if self.fused and not torch.compiler.is_compiling():
            return functional.cell(self.plan, states, weights)
        return self._run_edges(states, weights)

    def _run_edges(self, states: list[Tensor], weights: Tensor) -> Tensor:
        first = 0
        for _ in range(self.topology.nodes):
            rows = range(first, first + len(states))
            terms = [self.edges[row](state, weights[row]) for row, state in zip(rows, states, strict=True)]
            states.append(sum(terms[1:], start=terms[0]))
            first = rows.stop
        return torch.cat(states[INPUTS:], dim=1)
