"""Networks of inverted residual blocks (Sandler et al., CVPR 2018), each block a choice of its own."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from neuroexapt.core.derived import DerivedNetwork, drop_path
from neuroexapt.core.genotypes import BlockGenotype
from neuroexapt.core.operations import Identity, MixedOp, Zero
from neuroexapt.core.supernet import Supernet, make_stem, reduction_layers
from neuroexapt.errors import UserError


class InvertedResidual(nn.Module):
    """1x1 convolution that widens → depthwise kxk → 1x1 that narrows, each with BN; plus x where it fits."""

    def __init__(
        self, channels_in: int, channels: int, kernel_size: int, expansion: int, stride: int, affine: bool
    ) -> None:
        super().__init__()
        wide = expansion * channels_in
        self.adds_input = stride == 1 and channels_in == channels
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, wide, 1, bias=False),
            nn.BatchNorm2d(wide, affine=affine),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, kernel_size, stride, kernel_size // 2, groups=wide, bias=False),
            nn.BatchNorm2d(wide, affine=affine),
            nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels, affine=affine),
        )

    def forward(self, x: Tensor, drop_path_probability: float | Tensor | None = None) -> Tensor:
        y = self.body(x)
        if not self.adds_input:
            return y
        return x + (y if drop_path_probability is None else drop_path(y, drop_path_probability))


@dataclass(frozen=True)
class BlockPlace:
    """Where a block stands: its widths before and after, and its stride."""

    channels_in: int
    channels: int
    stride: int

    @property
    def may_be_skipped(self) -> bool:
        return self.stride == 1 and self.channels_in == self.channels

    def make(self, name: str, affine: bool) -> nn.Module:
        """``mb_k5_e3``: kernel size 5, expansion 3; ``skip_connect`` where nothing has to change."""
        if name == "skip_connect":
            if not self.may_be_skipped:
                raise UserError("a block that changes width or resolution cannot be skip_connect")
            return Identity()
        if not (sizes := re.fullmatch(r"mb_k(\d+)_e(\d+)", name)):
            raise UserError(f"unknown block {name!r}: write mb_k5_e3 for kernel size 5 and expansion 3")
        kernel_size, expansion = map(int, sizes.groups())
        return InvertedResidual(self.channels_in, self.channels, kernel_size, expansion, self.stride, affine)


def block_places(channels: int, layers: int) -> list[BlockPlace]:
    """Two of the blocks halve the resolution and double the width."""
    places = []
    for layer in range(layers):
        stride = 2 if layer in reduction_layers(layers) else 1
        places.append(BlockPlace(channels, stride * channels, stride))
        channels *= stride
    return places


class MixedBlock(MixedOp):
    """The candidates of one block; those that do not fit there are ``Zero``."""

    def __init__(self, place: BlockPlace, primitives: Sequence[str]) -> None:
        nn.Module.__init__(self)
        self.stride = place.stride
        self.primitives = tuple(primitives)
        self.ops = nn.ModuleList(
            Zero(place.stride)
            if primitive == "skip_connect" and not place.may_be_skipped
            else place.make(primitive, affine=False)
            for primitive in primitives
        )


@dataclass(frozen=True)
class ChainTopology:
    """Each of ``nodes`` states follows from the one before."""

    nodes: int

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        return tuple((state, state + 1) for state in range(self.nodes))


class BlockSupernet(Supernet):
    """The search network: block after block, with a row of α for each."""

    def __init__(
        self, primitives: Sequence[str], *, in_channels: int, num_classes: int, channels: int, layers: int
    ) -> None:
        super().__init__(ChainTopology(layers), primitives)
        places = block_places(channels, layers)
        self.stem = make_stem(in_channels, channels)
        self.cells = nn.ModuleList(MixedBlock(place, primitives) for place in places)
        self.classifier = nn.Linear(places[-1].channels, num_classes)
        self.alphas = self._make_alphas("block")

    def _run(self, x: Tensor, weights: Mapping[str, Iterator[Tensor]]) -> Tensor:
        x = self.stem(x)
        for block, row in zip(self.cells, next(weights["block"]), strict=True):
            x = block(x, row)
        return self.classifier(x.mean(dim=(2, 3)))

    def mixed_ops(self, cell: str) -> Iterator[list[MixedOp]]:
        yield [block for block in self.cells if isinstance(block, MixedOp)]


class BlockNetwork(DerivedNetwork):
    """The network of a genotype. Drop-path drops whole blocks."""

    def __init__(
        self, genotype: BlockGenotype, *, in_channels: int, num_classes: int, channels: int, layers: int
    ) -> None:
        super().__init__(genotype)
        self.genotype: BlockGenotype = genotype
        if len(genotype.blocks) != layers:
            raise UserError(f"the genotype has {len(genotype.blocks)} blocks; give --layers that number")
        places = block_places(channels, layers)
        self.stem = make_stem(in_channels, channels)
        self.cells = nn.ModuleList(
            place.make(name, affine=True) for place, name in zip(places, genotype.blocks, strict=True)
        )
        self.classifier = nn.Linear(places[-1].channels, num_classes)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for block in self.cells:
            x = block(x, self._drop_path_now) if isinstance(block, InvertedResidual) else block(x)
        return self.classifier(x.mean(dim=(2, 3))), x

    def inherited(self, number: int, searched: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        assert isinstance(searched, MixedOp)
        return [(self.cells[number], searched.candidate(self.genotype.blocks[number]))]
