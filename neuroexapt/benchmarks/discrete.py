"""Searches without gradients on a table of nas-bench-201: what one gets for how many trained networks.

Every query is a network that somebody had to train. Both searches maximise ``objective``, by default the
validation accuracy on CIFAR-10 after 12 epochs, and return what they would choose after each query.
"""

import random
from collections import deque

from neuroexapt.benchmarks.table import Table
from neuroexapt.core.genotypes import CellGenotype
from neuroexapt.errors import UserError
from neuroexapt.spaces.nas_bench_201 import PRIMITIVES, random_cell

OBJECTIVE = "cifar10_valid_12"


def random_search(
    table: Table, queries: int, *, seed: int = 0, objective: str = OBJECTIVE
) -> list[CellGenotype]:
    """The best of the first 1, 2, … ``queries`` cells drawn at random."""
    rng = random.Random(seed)
    asked = _Asked(table, objective)
    for _ in range(queries):
        asked(random_cell(rng))
    return asked.best


def regularized_evolution(
    table: Table,
    queries: int,
    *,
    population: int = 10,
    sample: int = 3,
    seed: int = 0,
    objective: str = OBJECTIVE,
) -> list[CellGenotype]:
    """The best cell after 1, 2, … ``queries`` queries of aging evolution.

    From ``population`` random cells on: the best of ``sample`` of them gets a child with another operation on
    one edge, which takes the place of the oldest.

    Source: Real et al., "Regularized Evolution for Image Classifier Architecture Search", AAAI 2019; sizes as
    in NATS-Bench.
    """
    rng = random.Random(seed)
    asked = _Asked(table, objective)
    alive: deque[tuple[float, CellGenotype]] = deque(maxlen=population)
    for query in range(queries):
        if query < population:
            child = random_cell(rng)
        else:
            _, parent = max(rng.sample(alive, sample), key=lambda member: member[0])
            child = mutate(parent, rng)
        alive.append((asked(child), child))
    return asked.best


def mutate(genotype: CellGenotype, rng: random.Random) -> CellGenotype:
    """``genotype`` with another operation on one edge."""
    source, target, old = rng.choice(genotype.edges)
    operations = [list(row) for row in genotype.operations]
    operations[target - 1][source] = rng.choice([op for op in PRIMITIVES if op != old])
    return CellGenotype(tuple(map(tuple, operations)))


class _Asked:
    """Asks the table for ``objective`` and remembers the best cell after each query."""

    def __init__(self, table: Table, objective: str) -> None:
        self.best: list[CellGenotype] = []
        self._table, self._objective = table, objective
        self._highest = -1.0

    def __call__(self, genotype: CellGenotype) -> float:
        figures = self._table.query(genotype)
        if self._objective not in figures:
            raise UserError(
                f"{self._table.path} does not tell {self._objective!r}; choose an objective of "
                f"{', '.join(figures)}"
            )
        accuracy = figures[self._objective]
        is_best = accuracy > self._highest
        self._highest = max(self._highest, accuracy)
        self.best.append(genotype if is_best else self.best[-1])
        return accuracy
