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


@dataclass(frozen=True)
class CellTopology:
    """``nodes`` states, each fed by every earlier state, after ``inputs`` that the cells before made.

    The output joins all nodes; with ``last_node_only`` it is the last one.
    """

    nodes: int = 4
    inputs: int = 2
    last_node_only: bool = False

    @property
    def targets(self) -> tuple[int, ...]:
        """The nodes as states."""
        return tuple(range(self.inputs, self.inputs + self.nodes))

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """``(source, target)`` of every edge in the order of the rows of α."""
        return tuple((source, target) for target in self.targets for source in range(target))

    @property
    def concat(self) -> tuple[int, ...]:
        """The states that the output joins."""
        return self.targets[-1:] if self.last_node_only else self.targets

    def stride(self, source: int, reduction: bool) -> int:
        """Of the edges that leave state ``source``: a reduction cell halves the resolution of its inputs."""
        return 2 if reduction and source < self.inputs else 1


class OneInput(nn.Module):
    """The output of the cell before, as it is."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class TwoInputs(nn.Module):
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
    """``node_j = Σ_{i<j} MixedOp_ij(state_i, weights_ij)``; the output joins the states ``topology.concat``.

    Takes what ``inputs`` makes the first states [B, C, H, W] of (one output of an earlier cell, or two), then
    ``weights`` [E, K], a row an edge of ``topology.edges`` → [B, len(concat) · C, H', W'], halved in a
    reduction cell. Pools are followed by a BatchNorm if ``norm_pools``.

    ``fused`` cells run by their plan, others one module after the other; those that ``recompute`` keep only
    their arguments for their backward pass; with ``drawn_only`` candidates of weight 0 do not run, see
    ``functional.cell``. Switch all of them whenever you like.

    Raises:
        UserError: ``weights`` is not [E, K].
    """

    recompute = False
    _drawn_only = False
    _fused = True

    def __init__(
        self,
        topology: CellTopology,
        primitives: Sequence[str],
        inputs: nn.Module,
        channels: int,
        *,
        reduction: bool = False,
        norm_pools: bool = True,
    ) -> None:
        super().__init__()
        self.topology = topology
        self.reduction = reduction
        self.inputs = inputs
        self.edges = nn.ModuleList(
            MixedOp(channels, topology.stride(source, reduction), primitives, norm_pools)
            for source, _ in topology.edges
        )
        self.channels_out = len(topology.concat) * channels
        self._weights_shape = (len(topology.edges), len(primitives))
        self._plan: CellPlan | None = None

    def stride(self, source: int) -> int:
        """Of every edge that leaves state ``source``."""
        return self.topology.stride(source, self.reduction)

    @property
    def fused(self) -> bool:
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        self._fused = fused
        self._switch_edges("fused", fused)

    @property
    def drawn_only(self) -> bool:
        return self._drawn_only

    @drawn_only.setter
    def drawn_only(self, drawn_only: bool) -> None:
        self._drawn_only = drawn_only
        self._switch_edges("drawn_only", drawn_only)

    def _switch_edges(self, switch: str, on: bool) -> None:
        for module in self.edges.modules():
            if isinstance(module, MixedOp):
                setattr(module, switch, on)

    @property
    def plan(self) -> CellPlan:
        """The plan of the cell as it is now."""
        if self._plan is None or not self._plan.fits(self.edges._modules.values(), self.training):
            self._plan = plan_cell(self)
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make plans of their own."""
        return {**super().__getstate__(), "_plan": None}

    def forward(self, *arguments: Tensor) -> Tensor:
        weights = arguments[-1]
        if weights.shape != self._weights_shape:
            raise UserError(f"weights must have shape {[*self._weights_shape]}, not {[*weights.shape]}")
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self, self._run, *arguments)
        return self._run(*arguments)

    def _run(self, *arguments: Tensor) -> Tensor:
        *outputs_before, weights = arguments
        states = self.inputs(*outputs_before)
        if self.fused and not torch.compiler.is_compiling():
            return functional.cell(self.plan, states, weights, drawn_only=self.drawn_only)
        return self._run_edges(states, weights)

    def _run_edges(self, states: list[Tensor], weights: Tensor) -> Tensor:
        first = 0
        for _ in self.topology.targets:
            rows = range(first, first + len(states))
            terms = [self.edges[row](state, weights[row]) for row, state in zip(rows, states, strict=True)]
            states.append(sum(terms[1:], start=terms[0]))
            first = rows.stop
        return torch.cat([states[state] for state in self.topology.concat], dim=1)
