"""Recommenders: the operations of every edge of a cell that is stacked, and the head that makes the query."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neuroexapt.core.cells import CellTopology
from neuroexapt.core.genotypes import CellGenotype, RecommenderGenotype
from neuroexapt.core.sequence_network import SequenceNetwork, SequenceSupernet
from neuroexapt.core.sequence_operations import HEADS, SEQUENCE_OPS, SequenceSize
from neuroexapt.core.task import Task
from neuroexapt.errors import UserError
from neuroexapt.recommend.next_item import NextItem
from neuroexapt.spaces.space import Space

TOPOLOGY = CellTopology(nodes=3, inputs=1, last_node_only=True)


@dataclass(frozen=True)
class SequenceSpace(Space):
    """Every node adds one operation, or none, from each state before it; the last node is the output.

    ``layers`` counts cells, ``init_channels`` is the width.

    Args:
        heads: of the attentions.
        dropout: of the embedding, and of what every operation and the head add.
        times: whether HSTU's attention has a bias by time, where the data tells times.
        negatives: items drawn to train against; 0: the whole catalogue.
        positions: of a history, in the mean of a batch, that are trained at most; None: all. A number well
            above the data's mean leaves nothing out and saves what padding costs.
        cosine: compare by cosines over a temperature of 0.05 instead of by products.
    """

    name: str
    heads: int = 2
    dropout: float = 0.3
    times: bool = True
    negatives: int = 0
    cosine: bool = False
    positions: int | None = None
    may_choose_none = True
    primitives = tuple(SEQUENCE_OPS)

    @property
    def task(self) -> Task:  # type: ignore[override]
        return NextItem(self.negatives, self.positions)

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {
            "layers": 2,
            "init_channels": 64,
            "batch_size": 128,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "learning_rate_min": 1e-4,
            "weight_decay": 0.0,
            "epochs": 30,
            "train_epochs": 60,
            "patience": 10,
            "arch_learning_rate": 1e-2,
            "auxiliary": False,
            "drop_path": 0.0,
            "control": False,
            "genotype": "HSTU",
        }

    def check(self, input_size: Sequence[int], channels: int, layers: int, batch_size: int) -> None:
        if channels % self.heads or channels < 2 * self.heads:
            raise UserError(
                f"init_channels={channels}: {self.heads} heads share the width; choose a multiple of "
                f"{self.heads}, from {2 * self.heads} on"
            )
        if layers < 1:
            raise UserError(f"layers={layers}: choose at least 1")

    def primitives_of(self, cell: str) -> tuple[str, ...]:
        return tuple(HEADS) if cell == "head" else self.primitives

    def supernet(
        self, *, num_items: int, max_length: int, has_times: bool, channels: int, layers: int
    ) -> SequenceSupernet:
        return SequenceSupernet(
            TOPOLOGY,
            self.primitives,
            tuple(HEADS),
            num_items=num_items,
            size=self._size(channels, max_length, has_times),
            layers=layers,
            cosine=self.cosine,
        )

    def network(
        self,
        genotype: RecommenderGenotype,
        *,
        num_items: int,
        max_length: int,
        has_times: bool,
        channels: int,
        layers: int,
        auxiliary: bool = False,
    ) -> SequenceNetwork:
        self._check_kind(genotype, RecommenderGenotype)
        if auxiliary:
            raise UserError(f"networks of {self.name} have no auxiliary head; switch it off: --no-auxiliary")
        return SequenceNetwork(
            genotype,
            num_items=num_items,
            size=self._size(channels, max_length, has_times),
            layers=layers,
            cosine=self.cosine,
        )

    def _size(self, width: int, max_length: int, has_times: bool) -> SequenceSize:
        return SequenceSize(width, max_length, has_times and self.times, self.heads, self.dropout)

    def derive(self, weights: Mapping[str, Tensor]) -> RecommenderGenotype:
        """The operation of the largest weight on every edge, ``none`` included, the first of equal ones.

        A node that would get nothing takes its strongest operation; one that leads nowhere takes none.
        """
        rows = weights["cell"].tolist()
        names = [self.primitives[row.index(max(row))] for row in rows]
        needed = {TOPOLOGY.targets[-1]}
        for node in reversed(TOPOLOGY.targets):
            incoming = [i for i, (_, target) in enumerate(TOPOLOGY.edges) if target == node]
            if node not in needed:
                for i in incoming:
                    names[i] = "none"
                continue
            if all(names[i] == "none" for i in incoming):
                strongest, k = max(
                    ((i, k) for i in incoming for k, name in enumerate(self.primitives) if name != "none"),
                    key=lambda place: rows[place[0]][place[1]],
                )
                names[strongest] = self.primitives[k]
            needed |= {TOPOLOGY.edges[i][0] for i in incoming if names[i] != "none"}
        head = tuple(HEADS)[int(weights["head"][0].argmax())]
        by_node = [
            tuple(name for name, (_, target) in zip(names, TOPOLOGY.edges, strict=True) if target == node)
            for node in TOPOLOGY.targets
        ]
        return RecommenderGenotype(CellGenotype(tuple(by_node)), head)

    def describe(self, layers: int) -> dict[str, Any]:
        return {
            "name": self.name,
            "primitives": list(self.primitives),
            "primitives_of": {"head": list(HEADS)},
            "edges": {"cell": [list(edge) for edge in TOPOLOGY.edges], "head": [[0, 1]]},
            "nodes": [str(state) for state in range(TOPOLOGY.inputs + TOPOLOGY.nodes)],
        }


SEQREC = SequenceSpace("seqrec")
SEQREC_SAMPLED = SequenceSpace("seqrec-sampled", negatives=128, cosine=True)
