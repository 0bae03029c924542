"""NAS-Bench-201 (Dong & Yang, ICLR 2020): 15,625 cells, all of which a benchmark has trained."""

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neuroexapt.core.cells import CellTopology
from neuroexapt.core.genotypes import CellGenotype
from neuroexapt.core.residual import ResidualNetwork, ResidualSupernet
from neuroexapt.core.supernet import reduction_layers
from neuroexapt.errors import UserError
from neuroexapt.spaces.space import Space, check_pictures

PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
TOPOLOGY = CellTopology(nodes=3, inputs=1, last_node_only=True)


@dataclass(frozen=True)
class NasBench201(Space):
    """Every node adds one operation from each state before it; the cell's output is its last node.

    ``layers`` counts three stages of cells and the two residual blocks between them: 17 as published.
    """

    name = "nas-bench-201"
    may_choose_none = True
    primitives = PRIMITIVES

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {"layers": 17, "init_channels": 16, "auxiliary": False, "drop_path": 0.0}

    def check(self, input_size: Sequence[int], channels: int, layers: int, batch_size: int) -> None:
        if channels < 1:
            raise UserError(f"init_channels={channels}: choose at least 1")
        reduction_layers(layers)
        check_pictures(input_size, batch_size)

    def supernet(self, *, in_channels: int, num_classes: int, channels: int, layers: int) -> ResidualSupernet:
        return ResidualSupernet(
            TOPOLOGY,
            PRIMITIVES,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            layers=layers,
        )

    def derive(self, weights: Mapping[str, Tensor]) -> CellGenotype:
        """The operation of the largest weight on every edge, ``none`` included, the first of equal ones."""
        rows = weights["cell"].tolist()
        return _genotype([PRIMITIVES[row.index(max(row))] for row in rows])

    def network(
        self,
        genotype: CellGenotype,
        *,
        in_channels: int,
        num_classes: int,
        channels: int,
        layers: int,
        auxiliary: bool = False,
    ) -> ResidualNetwork:
        self._check_kind(genotype, CellGenotype)
        if auxiliary:
            raise UserError(f"networks of {self.name} have no auxiliary head; switch it off: --no-auxiliary")
        return ResidualNetwork(
            genotype, in_channels=in_channels, num_classes=num_classes, channels=channels, layers=layers
        )

    def describe(self, layers: int) -> dict[str, Any]:
        return {
            "name": self.name,
            "primitives": list(PRIMITIVES),
            "edges": {"cell": [list(edge) for edge in TOPOLOGY.edges]},
            "nodes": [str(state) for state in range(TOPOLOGY.inputs + TOPOLOGY.nodes)],
        }


NAS_BENCH_201 = NasBench201()


def genotype_of_id(number: int) -> CellGenotype:
    """The genotype of an id of the benchmark, 0 to 15,624."""
    genotypes = _genotypes()
    if not 0 <= number < len(genotypes):
        raise UserError(f"nas-bench-201 numbers its cells from 0 to {len(genotypes) - 1}, not {number}")
    return genotypes[number]


def id_of_genotype(genotype: CellGenotype) -> int:
    """The benchmark's id of a genotype."""
    if genotype not in _ids():
        raise UserError(f"{genotype} is no cell of nas-bench-201")
    return _ids()[genotype]


def random_cell(rng: random.Random) -> CellGenotype:
    """Any cell of the space, all alike likely."""
    return _genotype(rng.choices(PRIMITIVES, k=len(TOPOLOGY.edges)))


@functools.cache
def _genotypes() -> tuple[CellGenotype, ...]:
    """All cells, shuffled by the generator and seed that the benchmark's ids come from."""
    genotypes = [
        _genotype(operations) for operations in itertools.product(PRIMITIVES, repeat=len(TOPOLOGY.edges))
    ]
    random.Random(88).shuffle(genotypes)
    return tuple(genotypes)


@functools.cache
def _ids() -> dict[CellGenotype, int]:
    return {genotype: number for number, genotype in enumerate(_genotypes())}


def _genotype(operations: Sequence[str]) -> CellGenotype:
    """From the operations of all edges in the order of the rows of α."""
    by_target = zip(TOPOLOGY.edges, operations, strict=True)
    nodes = itertools.groupby(by_target, key=lambda entry: entry[0][1])
    return CellGenotype(tuple(tuple(op for _, op in entries) for _, entries in nodes))
