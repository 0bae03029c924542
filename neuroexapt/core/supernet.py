"""Search networks: stacks of search cells that share one α per cell type."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from neuroexapt.core.cells import CellTopology, SearchCell, TwoInputs
from neuroexapt.core.operations import MixedOp, Zero
from neuroexapt.errors import UserError

STEM_MULTIPLIER = 3
ALPHA_INIT_STD = 1e-3
EXECUTIONS = ("fused", "reference")
PRECISIONS = ("fp32", "bf16")


def reduction_layers(layers: int) -> frozenset[int]:
    """The cells at one and two thirds of the depth halve the resolution and double the width."""
    if layers < 3:
        raise UserError(
            f"layers={layers} leaves no room for a normal cell before the two reduction cells; use at least 3"
        )
    return frozenset({layers // 3, 2 * layers // 3})


def make_stem(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


def mixed_ops(cell: SearchCell) -> list[MixedOp]:
    """The candidates of each edge, also where only some of the channels pass through them."""
    return [module for module in cell.edges.modules() if isinstance(module, MixedOp)]


class Topology(Protocol):
    """What a row of α stands for."""

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """``(source, target)`` of every edge, states by number."""


class Supernet(nn.Module):
    """A network with every candidate operation in place; each space has one of its own.

    ``forward(x, weights)`` maps [B, in_channels, H, W] to logits [B, num_classes]; ``weights`` holds one
    [E, K] tensor of mixing weights for each type of cell, by default the softmax of ``alphas`` over K, or
    [N, E, K] for the N cells of a type in turn.
    Parameters come in the order of the network, then α. ``cells`` may hold other blocks between search cells.
    """

    cells: nn.ModuleList
    alphas: nn.ParameterDict
    precision = "fp32"

    def __init__(self, topology: Topology, primitives: Sequence[str]) -> None:
        super().__init__()
        self.topology = topology
        self.primitives = tuple(primitives)

    def _make_alphas(self, *cells: str) -> nn.ParameterDict:
        """α of these types of cells, near zero as published; all candidates are kept."""
        shape = len(self.topology.edges), len(self.primitives)
        return self._make_alphas_of(dict.fromkeys(cells, shape))

    def _make_alphas_of(self, shapes: Mapping[str, tuple[int, int]]) -> nn.ParameterDict:
        """Those of types of cells that have different edges and primitives."""
        self.candidates = nn.Module()
        for cell, shape in shapes.items():
            self.candidates.register_buffer(cell, torch.ones(shape, dtype=torch.bool))
        return nn.ParameterDict(
            {cell: nn.Parameter(ALPHA_INIT_STD * torch.randn(shape)) for cell, shape in shapes.items()}
        )

    def primitives_of(self, cell: str) -> tuple[str, ...]:
        """The candidate operations of a type of cells."""
        return self.primitives

    def kept(self, cell: str) -> Tensor:
        """Which candidates are left on the edges of a type of cells: [E, K], bool."""
        return self.candidates.get_buffer(cell)

    @torch.no_grad()
    def keep(self, cell: str, kept: Tensor) -> None:
        """Rule out all candidates of a type of cells but ``kept`` [E, K], for good. ``none`` takes their
        places, so that neither their parameters nor their cost remain.
        """
        self.kept(cell).logical_and_(kept)
        remaining = self.kept(cell).tolist()
        for edges in self.mixed_ops(cell):
            for edge, row in zip(edges, remaining, strict=True):
                for k, is_kept in enumerate(row):
                    if not is_kept:
                        edge.ops[k] = Zero(edge.stride)

    def mixed_ops(self, cell: str) -> Iterator[list[MixedOp]]:
        """The candidates of each edge, for every cell of a type in turn."""
        return (mixed_ops(found) for found in self.search_cells() if self.cell_type(found) == cell)

    def choices(self) -> dict[str, Tensor]:
        """``alphas``, with −∞ for candidates that were ruled out; to be relaxed."""
        kept = dict(self.candidates.named_buffers())
        return {
            name: alpha.masked_fill(~kept[name], -torch.inf) if name in kept else alpha
            for name, alpha in self.alphas.items()
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Also rules out what was ruled out in the network that the state comes from."""
        for cell, kept in self.candidates.named_buffers():
            self.keep(cell, state_dict[f"candidates.{cell}"].to(kept.device))
        return super().load_state_dict(state_dict, strict, assign)

    def forward(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        if weights is None:
            weights = {name: torch.softmax(alpha, dim=-1) for name, alpha in self.choices().items()}
        in_turn = {name: iter(w) if w.dim() == 3 else repeat(w) for name, w in weights.items()}
        if self.precision == "fp32":
            return self._run(x, in_turn)
        # No cache: every weight is cast once a pass, and a graph must not find one of another pass.
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return self._run(x, in_turn).float()

    def _run(self, x: Tensor, weights: Mapping[str, Iterator[Tensor]]) -> Tensor:
        """``weights``: those of the next cell of each type."""
        raise NotImplementedError

    def search_cells(self) -> Iterator[SearchCell]:
        return (cell for cell in self.cells if isinstance(cell, SearchCell))

    def require_cells(self, method: str) -> None:
        """Refuse a method of search cells where there are none."""
        if next(self.search_cells(), None) is None:
            raise UserError(
                f"{method} works on cells of pictures, and this space has none; choose another --strategy"
            )

    def cell_type(self, cell: SearchCell) -> str:
        """The name of its α."""
        raise NotImplementedError

    def set_execution(self, execution: str) -> None:
        """``fused``: every cell by its plan (the default); ``reference``: module by module.

        The results are the same but for rounding, and so is the state: switch at any time.
        """
        if execution not in EXECUTIONS:
            raise UserError(f"unknown execution {execution!r}; choose one of {', '.join(EXECUTIONS)}")
        for cell in self.search_cells():
            cell.fused = execution == "fused"

    def set_precision(self, precision: str) -> None:
        """``bf16``: what is kept between operations, gradients of it included, is in bf16 (autocast).

        Parameters, their gradients, statistics and sums are fp32 as before. Switch at any time.
        """
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
        self.precision = precision

    def set_recompute(self, recompute: bool) -> None:
        """Whether cells compute anew for the backward pass what they would else keep: a tenth of the memory.

        Results stay bit for bit the same; a step takes longer by its forward passes.
        """
        for cell in self.search_cells():
            cell.recompute = recompute

    def set_drawn_only(self, drawn_only: bool) -> None:
        """Whether candidates of weight 0 are left out rather than run: see ``functional.cell``. Switch at
        any time.
        """
        for module in self.modules():
            if isinstance(module, MixedOp | SearchCell):
                module.drawn_only = drawn_only

    def arch_parameters(self) -> list[nn.Parameter]:
        """α: what the architecture optimizer updates."""
        return list(self.alphas.values())

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """w with names: every parameter but α."""
        return ((name, p) for name, p in self.named_parameters() if not name.startswith("alphas."))

    def weights(self) -> list[nn.Parameter]:
        """w: what the weight optimizer updates."""
        return [parameter for _, parameter in self.named_weights()]


class DartsSupernet(Supernet):
    """The network of DARTS (Liu et al., ICLR 2019), with α for ``"normal"`` and for ``"reduce"`` cells."""

    topology: CellTopology

    def __init__(
        self,
        topology: CellTopology,
        primitives: Sequence[str],
        *,
        in_channels: int,
        num_classes: int,
        channels: int,
        layers: int,
    ) -> None:
        super().__init__(topology, primitives)
        self._sizes = in_channels, num_classes, channels
        self._build(layers)
        self.alphas = self._make_alphas("normal", "reduce")

    def _build(self, layers: int) -> None:
        in_channels, num_classes, channels = self._sizes
        self.stem = make_stem(in_channels, STEM_MULTIPLIER * channels)

        self.cells = nn.ModuleList()
        channels_s0 = channels_s1 = STEM_MULTIPLIER * channels
        reduction_prev = False
        for layer in range(layers):
            reduction = layer in reduction_layers(layers)
            channels = 2 * channels if reduction else channels
            inputs = TwoInputs(channels_s0, channels_s1, channels, reduction_prev, affine=False)
            cell = SearchCell(self.topology, self.primitives, inputs, channels, reduction=reduction)
            self.cells.append(cell)
            channels_s0, channels_s1 = channels_s1, cell.channels_out
            reduction_prev = reduction

        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels_s1, num_classes)

    def rebuild(self, layers: int) -> None:
        """Start anew with ``layers`` cells and new weights, on the CPU; α and what was ruled out stay."""
        self._build(layers)
        for cell in self.alphas:
            self.keep(cell, self.kept(cell))

    def cell_type(self, cell: SearchCell) -> str:
        return "reduce" if cell.reduction else "normal"

    def _run(self, x: Tensor, weights: Mapping[str, Iterator[Tensor]]) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.search_cells():
            s0, s1 = s1, cell(s0, s1, next(weights[self.cell_type(cell)]))
        return self.classifier(self.global_pooling(s1).flatten(1))
