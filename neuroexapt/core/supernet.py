"""The search network: a stack of search cells that share one α per cell type."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from neuroexapt.core.cells import CellTopology, SearchCell
from neuroexapt.errors import UserError

STEM_MULTIPLIER = 3
ALPHA_INIT_STD = 1e-3
EXECUTIONS = ("fused", "reference")


def reduction_layers(layers: int) -> frozenset[int]:
    """The cells at one and two thirds of the depth halve the resolution and double the width."""
    if layers < 3:
        raise UserError(
            f"layers={layers} leaves no room for a normal cell before the two reduction cells; use at least 3"
        )
    return frozenset({layers // 3, 2 * layers // 3})


def make_stem(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


class Supernet(nn.Module):
    """The network of DARTS (Liu et al., ICLR 2019) with every candidate operation in place.

    ``forward(x, weights)`` maps [B, in_channels, H, W] to logits [B, num_classes]; ``weights`` holds one
    [E, K] tensor of mixing weights for ``"normal"`` and one for ``"reduce"`` cells, by default the softmax of
    ``alphas`` over K. Parameters come in the order stem, cells, classifier, α.
    """

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
        super().__init__()
        self.topology = topology
        self.primitives = tuple(primitives)
        self.stem = make_stem(in_channels, STEM_MULTIPLIER * channels)

        self.cells = nn.ModuleList()
        channels_s0 = channels_s1 = STEM_MULTIPLIER * channels
        reduction_prev = False
        for layer in range(layers):
            reduction = layer in reduction_layers(layers)
            channels = 2 * channels if reduction else channels
            cell = SearchCell(
                topology, primitives, channels_s0, channels_s1, channels, reduction, reduction_prev
            )
            self.cells.append(cell)
            channels_s0, channels_s1 = channels_s1, cell.channels_out
            reduction_prev = reduction

        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels_s1, num_classes)
        self.alphas = nn.ParameterDict(
            {
                cell: nn.Parameter(ALPHA_INIT_STD * torch.randn(len(topology.edges), len(self.primitives)))
                for cell in ("normal", "reduce")
            }
        )

    def forward(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        if weights is None:
            weights = {name: torch.softmax(alpha, dim=-1) for name, alpha in self.alphas.items()}
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, weights["reduce" if cell.reduction else "normal"])
        return self.classifier(self.global_pooling(s1).flatten(1))

    def set_execution(self, execution: str) -> None:
        """``fused``: every cell by its plan (the default); ``reference``: module by module.

        The results are the same but for rounding, and so is the state: switch at any time.
        """
        if execution not in EXECUTIONS:
            raise UserError(f"unknown execution {execution!r}; choose one of {', '.join(EXECUTIONS)}")
        for cell in self.cells:
            assert isinstance(cell, SearchCell)
            cell.fused = execution == "fused"

    def set_recompute(self, recompute: bool) -> None:
        """Whether cells compute anew for the backward pass what they would else keep: a tenth of the memory.

        Results stay bit for bit the same; a step takes longer by its forward passes.
        """
        for cell in self.cells:
            assert isinstance(cell, SearchCell)
            cell.recompute = recompute

    def arch_parameters(self) -> list[nn.Parameter]:
        """α: what the architecture optimizer updates."""
        return list(self.alphas.values())

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """w with names: every parameter but α."""
        return ((name, p) for name, p in self.named_parameters() if not name.startswith("alphas."))

    def weights(self) -> list[nn.Parameter]:
        """w: what the weight optimizer updates."""
        return [parameter for _, parameter in self.named_weights()]
