"""A chain of inverted residual blocks, as ProxylessNAS (Cai et al., ICLR 2019) searches it: kernel size and
expansion of every block, or none at all.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroexapt.core.blocks import BlockNetwork, BlockSupernet, ChainTopology, block_places
from neuroexapt.core.genotypes import BlockGenotype
from neuroexapt.core.supernet import reduction_layers
from neuroexapt.errors import UserError
from neuroexapt.spaces.space import Space, check_pictures


@dataclass(frozen=True)
class MobileSpace(Space):
    """``layers`` counts blocks; the two that halve the resolution double the width and cannot be skipped."""

    name: str
    kernel_sizes: tuple[int, ...] = (3, 5, 7)
    expansions: tuple[int, ...] = (3, 6)

    @property
    def primitives(self) -> tuple[str, ...]:  # type: ignore[override]
        blocks = itertools.product(self.kernel_sizes, self.expansions)
        return ("skip_connect", *(f"mb_k{kernel_size}_e{expansion}" for kernel_size, expansion in blocks))

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {"layers": 12, "auxiliary": False}

    def check(self, input_size: Sequence[int], channels: int, layers: int, batch_size: int) -> None:
        if channels < 1:
            raise UserError(f"init_channels={channels}: choose at least 1")
        reduction_layers(layers)
        check_pictures(input_size, batch_size)

    def supernet(self, *, in_channels: int, num_classes: int, channels: int, layers: int) -> BlockSupernet:
        supernet = BlockSupernet(
            self.primitives,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            layers=layers,
        )
        fits = torch.ones(layers, len(self.primitives), dtype=torch.bool)
        fits[:, 0] = torch.tensor([place.may_be_skipped for place in block_places(channels, layers)])
        supernet.keep("block", fits)
        return supernet

    def derive(self, weights: Mapping[str, Tensor]) -> BlockGenotype:
        """The operation of the largest weight of every block, the first of equal ones."""
        best = weights["block"].clone()
        best[list(reduction_layers(len(best))), 0] = -torch.inf
        return BlockGenotype(tuple(self.primitives[k] for k in best.argmax(dim=1).tolist()))

    def network(
        self,
        genotype: BlockGenotype,
        *,
        in_channels: int,
        num_classes: int,
        channels: int,
        layers: int,
        auxiliary: bool = False,
    ) -> BlockNetwork:
        self._check_kind(genotype, BlockGenotype)
        if auxiliary:
            raise UserError(f"networks of {self.name} have no auxiliary head; switch it off: --no-auxiliary")
        return BlockNetwork(
            genotype, in_channels=in_channels, num_classes=num_classes, channels=channels, layers=layers
        )

    def describe(self, layers: int) -> dict[str, Any]:
        return {
            "name": self.name,
            "primitives": list(self.primitives),
            "edges": {"block": [list(edge) for edge in ChainTopology(layers).edges]},
            "nodes": [str(state) for state in range(layers + 1)],
        }


MOBILE = MobileSpace("mobile")
