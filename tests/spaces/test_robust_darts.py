import pytest
import torch

from neuroexapt.core.operations import Zero
from neuroexapt.errors import UserError
from neuroexapt.spaces import CellSpace, get_space
from neuroexapt.spaces.robust_darts import S1

SIZES = {"in_channels": 3, "num_classes": 5, "channels": 4, "layers": 3}


def test_s1_has_two_candidates_an_edge() -> None:
    assert S1.candidates is not None
    for edges in S1.candidates.values():
        assert [len(edge) for edge in edges] == [2] * 14
        assert {op for edge in edges for op in edge} <= set(S1.primitives)
    assert S1.candidates["normal"][0] == ("skip_connect", "dil_conv_3x3")
    assert S1.candidates["reduce"][6] == ("max_pool_3x3", "sep_conv_3x3")


def test_search_network_holds_the_candidates_of_each_edge_alone() -> None:
    supernet = S1.supernet(**SIZES)
    for cell in supernet.cells:
        candidates = S1.candidates["reduce" if cell.reduction else "normal"]
        for edge, names in zip(cell.edges, candidates, strict=True):
            kept = [
                name for name, op in zip(S1.primitives, edge.ops, strict=True) if not isinstance(op, Zero)
            ]
            assert set(kept) == set(names)


def test_derive_chooses_among_the_candidates_of_each_edge() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        genotype = S1.random_genotype(generator, 8)
        for cell, edges in S1.candidates.items():
            for source, target, op in genotype.edges(cell):
                assert op in edges[S1.topology.edges.index((source, target))]


@pytest.mark.parametrize("name", ["s1", "s2", "s3", "s4"])
def test_every_space_searches_and_derives(name: str) -> None:
    space = get_space(name)
    space.check((8, 8), 4, 3, batch_size=2)
    supernet = space.supernet(**SIZES)
    weights = {cell: torch.softmax(alpha, dim=-1) for cell, alpha in supernet.choices().items()}
    supernet(torch.randn(2, 3, 8, 8), weights).sum().backward()
    network = space.network(space.derive(weights), **SIZES)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({"normal": [("skip_connect",)] * 14}, "for normal and reduce cells"),
        ({cell: [("skip_connect",)] * 13 for cell in ("normal", "reduce")}, "of 14 edges, not of 13"),
        ({cell: [("max_pool_3x3",)] * 14 for cell in ("normal", "reduce")}, "max_pool_3x3.*primitives"),
        ({cell: [("none",)] * 14 for cell in ("normal", "reduce")}, "besides 'none'"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(candidates: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CellSpace("mine", ("none", "skip_connect"), candidates=candidates)
