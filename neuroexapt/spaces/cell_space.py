"""What a space of stacked normal and reduction cells lets one choose, and how the choice becomes a
network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuroexapt.core.cells import CellTopology
from neuroexapt.core.derived import DartsNetwork
from neuroexapt.core.genotypes import EDGES_PER_NODE, Edge, Genotype, state_names
from neuroexapt.core.supernet import DartsSupernet, reduction_layers
from neuroexapt.errors import UserError
from neuroexapt.spaces.space import Space, check_operation, check_pictures


@dataclass(frozen=True)
class CellSpace(Space):
    """A search space: the candidate operations of every edge and the graph of the cell.

    ``candidates`` lists those of each edge, for ``"normal"`` and ``"reduce"`` cells, where not every edge has
    all ``primitives``.
    """

    name: str
    primitives: tuple[str, ...]
    topology: CellTopology = field(default_factory=CellTopology)
    candidates: Mapping[str, Sequence[Sequence[str]]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "primitives", tuple(self.primitives))
        if self.candidates is not None:
            self._check_candidates(self.candidates)
        of_edges = [edge for cell in (self.candidates or {}).values() for edge in cell] or [self.primitives]
        if any(set(edge) <= {"none"} for edge in of_edges):
            raise UserError(
                f"search space {self.name!r} needs at least one operation besides 'none' on every edge"
            )

    def _check_candidates(self, candidates: Mapping[str, Sequence[Sequence[str]]]) -> None:
        if set(candidates) != {"normal", "reduce"}:
            raise UserError(f"search space {self.name!r}: list candidates for normal and reduce cells")
        for edges in candidates.values():
            if len(edges) != len(self.topology.edges):
                raise UserError(
                    f"search space {self.name!r}: list candidates of {len(self.topology.edges)} edges, not "
                    f"of {len(edges)}"
                )
            unknown = {op for edge in edges for op in edge} - set(self.primitives)
            if unknown:
                raise UserError(
                    f"search space {self.name!r}: candidates {', '.join(sorted(unknown))} are none of its "
                    "primitives"
                )

    def check(self, input_size: Sequence[int], channels: int, layers: int, batch_size: int) -> None:
        if channels < 2 or channels % 2:
            raise UserError(f"init_channels={channels}: factorized reduction needs an even number from 2 up")
        reduction_layers(layers)
        check_pictures(input_size, batch_size)
        for primitive in self.primitives:
            check_operation(primitive, strides=(1, 2))

    def supernet(self, *, in_channels: int, num_classes: int, channels: int, layers: int) -> DartsSupernet:
        supernet = DartsSupernet(
            self.topology,
            self.primitives,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            layers=layers,
        )
        for cell in self.candidates or ():
            supernet.keep(cell, torch.tensor(self._allowed(cell)))
        return supernet

    def _allowed(self, cell: str) -> list[list[bool]]:
        """[E, K]: which of the primitives are candidates of each edge."""
        of_edges = self.candidates[cell] if self.candidates else [self.primitives] * len(self.topology.edges)
        return [[primitive in candidates for primitive in self.primitives] for candidates in of_edges]

    def derive(self, weights: Mapping[str, Tensor]) -> Genotype:
        """Discretise mixing weights ``{"normal": [E, K], "reduce": [E, K]}`` as published.

        The strength of an edge is its largest weight apart from ``none``; every node keeps its two strongest
        edges, strongest first, each with that operation. The earlier one wins a tie.
        """
        normal, reduce = (
            self._derive_cell(weights[cell].tolist(), self._allowed(cell)) for cell in ("normal", "reduce")
        )
        return Genotype(normal, self.topology.concat, reduce, self.topology.concat)

    def _derive_cell(
        self, rows: Sequence[Sequence[float]], allowed: Sequence[Sequence[bool]]
    ) -> tuple[Edge, ...]:
        choices = [k for k, primitive in enumerate(self.primitives) if primitive != "none"]
        best = [
            max((k for k in choices if of_edge[k]), key=row.__getitem__)
            for row, of_edge in zip(rows, allowed, strict=True)
        ]
        kept: list[Edge] = []
        for node in self.topology.targets:
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
    ) -> DartsNetwork:
        self._check_kind(genotype, Genotype)
        return DartsNetwork(
            genotype,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            layers=layers,
            auxiliary=auxiliary,
        )

    def describe(self, layers: int) -> dict[str, Any]:
        edges = [list(edge) for edge in self.topology.edges]
        return {
            "name": self.name,
            "primitives": list(self.primitives),
            "edges": {"normal": edges, "reduce": edges},
            "nodes": list(state_names(self.topology.nodes)),
        }
