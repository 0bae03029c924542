import random
from pathlib import Path

import pytest

from neuroexapt.benchmarks import Table, random_search, regularized_evolution
from neuroexapt.benchmarks.discrete import mutate
from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.errors import UserError
from neuroexapt.spaces.nas_bench_201 import genotype_of_id


class CountingTable(Table):
    """The more 3x3 convolutions the better, and the number of queries."""

    def __init__(self) -> None:
        super().__init__(Path("counted"))
        self.asked: list[AnyGenotype] = []

    def query(self, genotype: AnyGenotype) -> dict[str, float]:
        self.asked.append(genotype)
        return {"cifar10_valid_12": convolutions(genotype) / 6}

    def _find(self, arch: str) -> None:
        raise AssertionError


def convolutions(genotype: AnyGenotype) -> int:
    return str(genotype).count("nor_conv_3x3")


@pytest.mark.parametrize("search", [random_search, regularized_evolution])
def test_searches_keep_the_best_of_what_they_asked_for(search) -> None:
    table = CountingTable()
    best = search(table, 60, seed=1)
    assert len(best) == len(table.asked) == 60
    for count, genotype in enumerate(best, 1):
        assert convolutions(genotype) == max(map(convolutions, table.asked[:count]))
    assert search(CountingTable(), 60, seed=1) == best
    assert search(CountingTable(), 60, seed=2) != best


def test_evolution_changes_one_edge_of_a_living_parent() -> None:
    table = CountingTable()
    regularized_evolution(table, 40, population=5, sample=2)
    for number, child in enumerate(table.asked[5:], 5):
        alive = table.asked[number - 5 : number]
        assert any(sum(a != b for a, b in zip(child.edges, p.edges, strict=True)) == 1 for p in alive)


def test_evolution_needs_fewer_queries_than_chance() -> None:
    def found(search) -> int:
        return sum(convolutions(search(CountingTable(), 80, seed=seed)[-1]) for seed in range(10))

    assert found(regularized_evolution) > found(random_search) + 5


def test_a_mutation_reaches_every_neighbour_and_nothing_else() -> None:
    rng, parent = random.Random(0), genotype_of_id(3)
    children = {mutate(parent, rng) for _ in range(500)}
    assert len(children) == 6 * 4
    assert parent not in children


def test_an_objective_that_the_table_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="does not tell 'speed'; choose an objective of cifar10_valid_12"):
        random_search(CountingTable(), 1, objective="speed")
