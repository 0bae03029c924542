"""What a space of stacked normal and reduction cells lets one choose, and how the choice becomes a
network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuroexapt.core.cells import CellTopology
from neuroexapt.core.derived import DerivedNetwork
from neuroexapt.core.genotypes import EDGES_PER_NODE, Edge, Genotype
from neuroexapt.core.operations import make_op
from neuroexapt.core.supernet import Supernet, reduction_layers
from neuroexapt.errors import UserError

REDUCTIONS = 2


@dataclass(frozen=True)
class CellSpace:
    """A search space: the candidate operations of every edge and the graph of the cell.

    The engine asks a space for its search network, for the genotype that mixing weights stand for, and for
    the network of a genotype; it knows nothing else of it.
    """

    name: str
    primitives: tuple[str, ...]
    topology: CellTopology = field(default_factory=CellTopology)

    def __post_init__(self) -> None:
        object.__setattr__(self, "primitives", tuple(self.primitives))
        if not any(primitive != "none" for primitive in self.primitives):
            raise UserError(f"search space {self.name!r} needs at least one operation besides 'none'")

    def check(self, image_size: Sequence[int], channels: int, layers: int, batch_size: int) -> None:
        """Refuse, with one clear line, what no network of this space can take."""
        if channels < 2 or channels % 2:
            raise UserError(f"init_channels={channels}: factorized reduction needs an even number from 2 up")
        reduction_layers(layers)
        smallest = 2**REDUCTIONS
        if min(image_size) < smallest:
            raise UserError(
                f"pictures of {image_size[0]}x{image_size[1]} pixels are too small for {REDUCTIONS} "
                f"reductions; give at least {smallest}x{smallest}, for instance with --image-size 8"
            )
        if batch_size == 1 and max(image_size) <= smallest:
            raise UserError("batches of 1 leave BatchNorm one value a channel here; raise --batch-size")
        for primitive in self.primitives:
            _check_shape(primitive)

    def supernet(self, *, in_channels: int, num_classes: int, channels: int, layers: int) -> Supernet:
        return Supernet(
            self.topology,
            self.primitives,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            layers=layers,
        )

    def derive(self, weights: Mapping[str, Tensor]) -> Genotype:
        """Discretise mixing weights ``{"normal": [E, K], "reduce": [E, K]}`` as published.

        The strength of an edge is its largest weight apart from ``none``; every node keeps its two strongest
        edges, strongest first, each with that operation. The earlier one wins a tie.
        """
        normal, reduce = (self._derive_cell(weights[cell].tolist()) for cell in ("normal", "reduce"))
        return Genotype(normal, self.topology.concat, reduce, self.topology.concat)

    def _derive_cell(self, rows: Sequence[Sequence[float]]) -> tuple[Edge, ...]:
        choices = [k for k, primitive in enumerate(self.primitives) if primitive != "none"]
        best = [max(choices, key=row.__getitem__) for row in rows]
        kept: list[Edge] = []
        for node in self.topology.concat:
            incoming = [i for i, (_, target) in enumerate(self.topology.edges) if target == node]
            strongest = sorted(incoming, key=lambda i: -rows[i][best[i]])[:EDGES_PER_NODE]
            kept += [(self.primitives[best[i]], self.topology.edges[i][0]) for i in strongest]
        return tuple(kept)

    def network(
        self,
        genotype: Genotype,
        *,
        in_channels: int,
        num_classes: int,
        channels: int,
        layers: int,
        auxiliary: bool = False,
    ) -> DerivedNetwork:
        return DerivedNetwork(
            genotype,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            layers=layers,
            auxiliary=auxiliary,
        )

    def describe(self) -> dict[str, Any]:
        """What a report needs to draw α: primitives, and edges and state names of each cell."""
        edges = [list(edge) for edge in self.topology.edges]
        return {
            "name": self.name,
            "primitives": list(self.primitives),
            "edges": {"normal": edges, "reduce": edges},
            "nodes": list(self.topology.state_names),
        }


def _check_shape(primitive: str) -> None:
    """An operation keeps the width and divides the resolution by its stride, rounding up."""
    for stride in (1, 2):
        shape = make_op(primitive, 2, stride, affine=False)(torch.zeros(2, 2, 5, 5)).shape
        expected = (2, 2, *(-(-5 // stride),) * 2)
        if shape != expected:
            raise UserError(
                f"operation {primitive!r} turns [2, 2, 5, 5] at stride {stride} into {[*shape]}; it must be "
                f"{[*expected]}"
            )
