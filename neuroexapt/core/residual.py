"""The networks of NAS-Bench-201 (Dong & Yang, ICLR 2020): stages of cells of one input, with residual blocks
between them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch.nn as nn
from torch import Tensor

from neuroexapt.core.cells import CellTopology, OneInput, SearchCell
from neuroexapt.core.derived import DerivedCell, DerivedNetwork
from neuroexapt.core.genotypes import CellGenotype
from neuroexapt.core.operations import ReLUConvBN
from neuroexapt.core.supernet import Supernet, make_stem, reduction_layers


class ResidualBlock(nn.Module):
    """Two relu → 3x3 convolution → BN beside a pooled shortcut; [B, C, H, W] → [B, channels, H/2, W/2]."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ReLUConvBN(channels_in, channels, 3, stride=2, padding=1),
            ReLUConvBN(channels, channels, 3, padding=1),
        )
        # Odd sizes are rounded up, as the convolutions do; for even ones it is the published pool.
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(channels_in, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def make_stages(
    channels: int, layers: int, make_cell: Callable[[int], nn.Module]
) -> tuple[nn.ModuleList, int]:
    """Cells of one width, with residual blocks that double it, and the last width."""
    blocks = nn.ModuleList()
    for layer in range(layers):
        if layer in reduction_layers(layers):
            blocks.append(ResidualBlock(channels, 2 * channels))
            channels *= 2
        else:
            blocks.append(make_cell(channels))
    return blocks, channels


def make_head(channels: int, num_classes: int) -> nn.Sequential:
    """BN → relu → mean over the picture → logits."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )


class ResidualSupernet(Supernet):
    """The search network, with one α for all cells. Pools have no BatchNorm, as published."""

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

        def make_cell(channels: int) -> SearchCell:
            return SearchCell(topology, primitives, OneInput(), channels, norm_pools=False)

        self.stem = make_stem(in_channels, channels)
        self.cells, channels = make_stages(channels, layers, make_cell)
        self.head = make_head(channels, num_classes)
        self.alphas = self._make_alphas("cell")

    def cell_type(self, cell: SearchCell) -> str:
        return "cell"

    def _run(self, x: Tensor, weights: Mapping[str, Iterator[Tensor]]) -> Tensor:
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x) if isinstance(cell, ResidualBlock) else cell(x, next(weights["cell"]))
        return self.head(x)


class ResidualNetwork(DerivedNetwork):
    """The network of a genotype, as the benchmark trained it."""

    def __init__(
        self, genotype: CellGenotype, *, in_channels: int, num_classes: int, channels: int, layers: int
    ) -> None:
        super().__init__(genotype)
        (chosen,) = genotype.cells.values()

        def make_cell(channels: int) -> DerivedCell:
            return DerivedCell(chosen.edges, chosen.concat, OneInput(), channels)

        self.stem = make_stem(in_channels, channels)
        self.cells, channels = make_stages(channels, layers, make_cell)
        self.head = make_head(channels, num_classes)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for cell in self.cells:
            x = (
                cell(x, drop_path_probability=self._drop_path_now)
                if isinstance(cell, DerivedCell)
                else cell(x)
            )
        return self.head(x), x
