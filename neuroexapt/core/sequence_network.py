"""Networks that recommend: an embedding of items, cells of sequence operations, and a head.

Legend: B histories, N positions, C = 1 or 2 channels of the input (items, times), V items, D width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.core.cells import CellTopology
from neuroexapt.core.derived import DerivedNetwork
from neuroexapt.core.genotypes import RecommenderGenotype
from neuroexapt.core.operations import MixedOp
from neuroexapt.core.sequence_operations import (
    HEADS,
    SEQUENCE_OPS,
    Places,
    SequenceMixedOp,
    SequenceSize,
    make_sequence_op,
)
from neuroexapt.core.supernet import Supernet
from neuroexapt.errors import UserError

EMBEDDING_STD = 0.02
TEMPERATURE = 0.05
"""By which cosines are divided."""


class Queries(NamedTuple):
    """What a recommender gives: item v scores ``⟨queries, items[v]⟩`` as the next one.

    ``queries``: [B, N, D], after each position; ``items``: [V + 1, D], row 0 the padding.
    """

    queries: Tensor
    items: Tensor

    def detach(self) -> "Queries":
        return Queries(self.queries.detach(), self.items.detach())

    def float(self) -> "Queries":
        return Queries(self.queries.float(), self.items.float())


class SequenceStem(nn.Module):
    """Embedding of items, which are also what queries are compared with, and of positions.

    ``cosine``: the comparison is by ``cos(q, e) / τ``, else by the product.
    """

    def __init__(self, num_items: int, size: SequenceSize, cosine: bool) -> None:
        super().__init__()
        self.scale, self.dropout, self.cosine = math.sqrt(size.width), size.dropout, cosine
        self.has_times = size.has_times
        self.items = nn.Embedding(num_items + 1, size.width, padding_idx=0)
        self.positions = nn.Embedding(size.max_length, size.width)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
        nn.init.zeros_(self.items.weight[0])

    def forward(self, inputs: Tensor) -> tuple[Tensor, Places]:
        """Of [B, C, N]: the first states [B, N, D], and where histories end. Times count if they did in
        training.
        """
        items = inputs[:, 0]
        times = inputs[:, 1] if self.has_times and inputs.shape[1] > 1 else None
        places = Places((items > 0).sum(dim=1), times)
        states = self.items(items) * self.scale + self.positions.weight[: items.shape[1]]
        return places.clear_rest(F.dropout(states, self.dropout, self.training)), places

    def compare(self, queries: Tensor) -> Queries:
        if self.cosine:
            queries = F.normalize(queries, dim=-1) / TEMPERATURE
        items = self.item_vectors()
        return Queries(queries.to(items.dtype), items)  # under autocast they may differ

    def item_vectors(self) -> Tensor:
        """What queries are multiplied with, [V + 1, D]."""
        return F.normalize(self.items.weight, dim=-1) if self.cosine else self.items.weight


def at_last_position(states: Tensor, last: Tensor, places: Places) -> Tensor:
    """``states`` [B, N, D] with ``last`` [B, D] at each history's last position."""
    positions = torch.arange(states.shape[1], device=states.device)
    is_last = positions == places.lengths[:, None] - 1
    return torch.where(is_last[..., None], last[:, None], states)


class SequenceSearchCell(nn.Module):
    """``node_j = Σ_{i<j} MixedOp_ij(state_i)`` from one state; the last node is the output."""

    def __init__(self, topology: CellTopology, primitives: Sequence[str], size: SequenceSize) -> None:
        super().__init__()
        self.topology = topology
        self.edges = nn.ModuleList(SequenceMixedOp(size, primitives, SEQUENCE_OPS) for _ in topology.edges)

    def forward(self, x: Tensor, weights: Tensor, places: Places) -> Tensor:
        states = [x]
        for target in self.topology.targets:
            terms = [
                edge(states[source], row, places)
                for edge, row, (source, node) in zip(self.edges, weights, self.topology.edges, strict=True)
                if node == target
            ]
            states.append(sum(terms[1:], start=terms[0]))
        return states[-1]


class SequenceSupernet(Supernet):
    """The search network: α of ``"cell"`` for all cells, and of ``"head"``.

    ``forward`` maps [B, C, N] to ``Queries``.
    """

    def __init__(
        self,
        topology: CellTopology,
        primitives: Sequence[str],
        heads: Sequence[str],
        *,
        num_items: int,
        size: SequenceSize,
        layers: int,
        cosine: bool = False,
    ) -> None:
        super().__init__(topology, primitives)
        self.heads = tuple(heads)
        self.stem = SequenceStem(num_items, size, cosine)
        self.cells = nn.ModuleList(SequenceSearchCell(topology, primitives, size) for _ in range(layers))
        self.cells.append(SequenceMixedOp(size, heads, HEADS))
        self.norm = nn.LayerNorm(size.width)
        self.alphas = self._make_alphas_of(
            {"cell": (len(topology.edges), len(primitives)), "head": (1, len(heads))}
        )

    def _run(self, x: Tensor, weights: Mapping[str, Iterator[Tensor]]) -> Queries:  # type: ignore[override]
        states, places = self.stem(x)
        *cells, head = self.cells
        for cell in cells:
            states = cell(states, next(weights["cell"]), places)
        states = places.clear_rest(self.norm(states))
        query = head(states, next(weights["head"])[0], places)
        return self.stem.compare(at_last_position(states, query, places))

    def primitives_of(self, cell: str) -> tuple[str, ...]:
        return self.heads if cell == "head" else self.primitives

    def mixed_ops(self, cell: str) -> Iterator[list[MixedOp]]:
        *cells, head = self.cells
        if cell == "head":
            yield [head]  # type: ignore[list-item]
        else:
            yield from (list(searched.edges) for searched in cells)  # type: ignore[arg-type]


class SequenceCell(nn.Module):
    """A cell of the genotype: every node adds what its edges bring."""

    def __init__(self, genotype: RecommenderGenotype, size: SequenceSize) -> None:
        super().__init__()
        self.chosen = genotype.edges
        self.edges = nn.ModuleList(make_sequence_op(name, size, SEQUENCE_OPS) for _, _, name in self.chosen)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        states = {0: x}
        for op, (source, target, _) in zip(self.edges, self.chosen, strict=True):
            term = op(states[source], places)
            states[target] = states[target] + term if target in states else term
        return states[max(states)]


class SequenceNetwork(DerivedNetwork):
    """The network of a genotype; ``forward`` maps [B, C, N] to ``Queries``."""

    def __init__(
        self,
        genotype: RecommenderGenotype,
        *,
        num_items: int,
        size: SequenceSize,
        layers: int,
        cosine: bool = False,
    ) -> None:
        super().__init__(genotype)
        if layers < 1:
            raise UserError(f"layers={layers}: choose at least 1")
        self.genotype: RecommenderGenotype = genotype
        self.num_items, self.size, self.layers = num_items, size, layers
        self.stem = SequenceStem(num_items, size, cosine)
        self.cells = nn.ModuleList(SequenceCell(genotype, size) for _ in range(layers))
        self.cells.append(make_sequence_op(genotype.head, size, HEADS))
        self.norm = nn.LayerNorm(size.width)

    def last_query(self, x: Tensor) -> Queries:
        """``forward`` for the last position of each history alone: queries [B, D]."""
        states, places = self._states(x)
        return self.stem.compare(self.cells[-1](states, places))

    def _states(self, x: Tensor) -> tuple[Tensor, Places]:
        states, places = self.stem(x)
        for cell in self.cells[:-1]:
            states = cell(states, places)
        return places.clear_rest(self.norm(states)), places

    def _run(self, x: Tensor) -> tuple[Queries, Tensor]:  # type: ignore[override]
        states, places = self._states(x)
        query = self.cells[-1](states, places)
        return self.stem.compare(at_last_position(states, query, places)), states

    def inherited(self, number: int, searched: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        own = self.cells[number]
        if isinstance(searched, MixedOp):
            return [(own, searched.candidate(self.genotype.head))]
        assert isinstance(own, SequenceCell)
        assert isinstance(searched, SequenceSearchCell)
        rows = {edge: row for row, edge in enumerate(searched.topology.edges)}
        return [
            (op, searched.edges[rows[source, target]].candidate(name))  # type: ignore[operator]
            for op, (source, target, name) in zip(own.edges, own.chosen, strict=True)
        ]
