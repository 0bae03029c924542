"""The space of recommenders: what is derived, and what is refused."""

import pytest
import torch
from torch import Tensor

from neuroexapt.core.genotypes import DARTS_V2
from neuroexapt.errors import UserError
from neuroexapt.spaces.seqrec import SEQREC, TOPOLOGY

HEAD = torch.tensor([[0.1, 0.2, 0.4, 0.3]])


def weights(**chosen: tuple[str, float]) -> dict[str, Tensor]:
    """Mixing weights in which ``none`` wins but on edges like ``e02``, from state 0 to 2."""
    cell = torch.full((len(TOPOLOGY.edges), len(SEQREC.primitives)), 0.1)
    cell[:, SEQREC.primitives.index("none")] = 0.5
    for edge, (name, weight) in chosen.items():
        row = TOPOLOGY.edges.index((int(edge[1]), int(edge[2])))
        cell[row, SEQREC.primitives.index(name)] = weight
    return {"cell": cell, "head": HEAD}


def test_every_edge_takes_its_largest_weight() -> None:
    genotype = SEQREC.derive(
        weights(
            e01=("hstu_2h", 0.6),
            e12=("gated_conv_7", 0.7),
            e03=("ffn_swiglu", 0.8),
            e23=("skip_connect", 0.9),
        )
    )
    assert str(genotype.cell) == "|hstu_2h~0|+|none~0|gated_conv_7~1|+|ffn_swiglu~0|none~1|skip_connect~2|"
    assert genotype.head == "dot_interaction"


def test_a_node_that_leads_nowhere_gets_nothing() -> None:
    genotype = SEQREC.derive(weights(e01=("hstu_2h", 0.6), e03=("ffn_swiglu", 0.8)))
    assert str(genotype.cell) == "|none~0|+|none~0|none~1|+|ffn_swiglu~0|none~1|none~2|"


def test_a_node_that_would_get_nothing_takes_its_strongest_operation() -> None:
    genotype = SEQREC.derive(
        weights(e23=("attn_ln_2h", 0.3), e12=("hstu_2h", 0.2), e01=("hstu_local_32", 0.15))
    )
    assert str(genotype.cell) == "|hstu_local_32~0|+|none~0|hstu_2h~1|+|none~0|none~1|attn_ln_2h~2|"


def test_random_genotypes_are_of_the_space_and_differ() -> None:
    drawn = {str(SEQREC.random_genotype(torch.Generator().manual_seed(seed), 2)) for seed in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize(
    ("channels", "layers", "message"),
    [(7, 2, "2 heads share the width; choose a multiple of 2, from 4 on"), (8, 0, "at least 1")],
)
def test_sizes_that_no_network_has_are_refused(channels: int, layers: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SEQREC.check((50,), channels, layers, 8)


def test_genotypes_of_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="is none of seqrec"):
        SEQREC.network(DARTS_V2, num_items=3, max_length=4, has_times=False, channels=4, layers=1)
