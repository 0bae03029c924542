"""Operations of recommenders and their networks: causal, blind to padding, derived as searched."""

import dataclasses

import pytest
import torch
from torch import Tensor

from neuroexapt.core.derived import count_parameters, inherit_weights
from neuroexapt.core.genotypes import CellGenotype, RecommenderGenotype, genotype_from_dict, load_genotype
from neuroexapt.core.sequence_operations import (
    HEADS,
    SEQUENCE_OPS,
    Places,
    SequenceMixedOp,
    SequenceSize,
    make_sequence_op,
    newest,
)
from neuroexapt.errors import UserError
from neuroexapt.spaces.seqrec import SEQREC

SIZE = SequenceSize(width=8, max_length=20, has_times=True)
LENGTHS = torch.tensor([20, 7, 1, 0])
EDGE_OPS = [name for name in SEQUENCE_OPS if name != "none"]
FACTS = {"num_items": 30, "max_length": 20, "has_times": True}


def make_call() -> tuple[Tensor, Places]:
    torch.manual_seed(0)
    places = Places(LENGTHS, torch.arange(20).mul(5_000).expand(4, 20).contiguous())
    return places.clear_rest(torch.randn(4, 20, 8)), places


def make_op(name: str, size: SequenceSize = SIZE) -> torch.nn.Module:
    torch.manual_seed(1)
    op = make_sequence_op(name, size, {**SEQUENCE_OPS, **HEADS})
    for parameter in op.parameters():  # tables of biases start at zero, where nothing depends on them
        torch.nn.init.normal_(parameter, std=0.3)
    return op.eval()


@pytest.mark.parametrize("name", EDGE_OPS)
def test_an_operation_looks_at_no_later_position(name: str) -> None:
    x, places = make_call()
    op = make_op(name)
    changed = x.clone()
    changed[:, 6] += 1
    before, after = op(x, places), op(places.clear_rest(changed), places)
    assert torch.equal(before[:, :6], after[:, :6])
    assert name == "skip_connect" or not torch.equal(before[0, 6], after[0, 6])


@pytest.mark.parametrize("name", EDGE_OPS)
def test_an_operation_gives_zeros_after_the_end(name: str) -> None:
    x, places = make_call()
    y = make_op(name)(x, places)
    assert y.shape == x.shape
    assert y.isfinite().all()
    for row, length in enumerate(LENGTHS.tolist()):
        assert not y[row, length:].any()


@pytest.mark.parametrize("name", [*EDGE_OPS, *HEADS])
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    x, places = make_call()
    op = make_op(name)
    assert places.times is not None
    alone = op(x[1:2], Places(LENGTHS[1:2], places.times[1:2]))
    torch.testing.assert_close(alone[0], op(x, places)[1])


@pytest.mark.parametrize("name", [*EDGE_OPS, *HEADS])
def test_dropout_is_of_what_is_added_and_leaves_the_input(name: str) -> None:
    """Where next to everything is dropped, nothing is left but the input, or the last one, and its norm."""
    x, places = make_call()
    op = make_op(name, dataclasses.replace(SIZE, dropout=1 - 1e-7)).train()
    expected = newest(x, places, 1)[:, 0] if name in HEADS else x
    if name in ("attn_ln_2h", "hier_fusion_1_3_7_15"):
        expected = places.clear_rest(op.norm(x))
    torch.testing.assert_close(op(x, places), expected)
    if name not in ("skip_connect", "last"):
        assert not torch.equal(op.eval()(x, places), expected)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_makes_one_finite_query(name: str) -> None:
    x, places = make_call()
    query = make_op(name)(x, places)
    assert query.shape == (4, 8)
    assert query.isfinite().all()


def test_the_newest_states_come_last_first() -> None:
    x, places = make_call()
    states = newest(x, places, 3)
    assert torch.equal(states[0], x[0, [19, 18, 17]])
    assert torch.equal(states[2], torch.stack([x[2, 0], torch.zeros(8), torch.zeros(8)]))
    assert not states[3].any()


def test_without_places_histories_are_full() -> None:
    x, _ = make_call()
    full = Places(torch.full((4,), 20), None)
    for name in ("hstu_2h", "mlp_concat"):
        op = make_op(name)
        assert torch.equal(op(x), op(x, full))


def test_a_mixed_op_adds_its_candidates_up() -> None:
    x, places = make_call()
    mixed = SequenceMixedOp(SIZE, tuple(SEQUENCE_OPS), SEQUENCE_OPS).eval()
    weights = torch.rand(len(SEQUENCE_OPS))
    expected = sum(
        w * mixed.candidate(name)(x, places)
        for name, w in zip(SEQUENCE_OPS, weights, strict=True)
        if name != "none"
    )
    torch.testing.assert_close(mixed(x, weights, places), expected)


def make_inputs() -> Tensor:
    torch.manual_seed(2)
    items = torch.randint(1, 31, (4, 20)) * (torch.arange(20) < LENGTHS[:, None])
    return torch.stack([items, torch.arange(20).mul(5_000).expand(4, 20)], dim=1)


def one_hot(genotype: RecommenderGenotype) -> dict[str, Tensor]:
    """Mixing weights that are the genotype."""
    rows = [SEQREC.primitives.index(op) for _, _, op in genotype.cell.edges]
    cell = torch.eye(len(SEQREC.primitives))[rows]
    return {"cell": cell, "head": torch.eye(len(HEADS))[[list(HEADS).index(genotype.head)]]}


@pytest.mark.parametrize("seed", range(3))
def test_the_derived_network_is_the_search_network_at_its_genotype(seed: int) -> None:
    torch.manual_seed(seed)
    supernet = SEQREC.supernet(**FACTS, channels=8, layers=2).eval()
    genotype = SEQREC.random_genotype(torch.Generator().manual_seed(seed), layers=2)
    network = SEQREC.network(genotype, **FACTS, channels=8, layers=2).eval()
    inherit_weights(network, supernet)
    inputs = make_inputs()
    derived = network(inputs)
    torch.testing.assert_close(derived, supernet(inputs, one_hot(genotype)))
    last = network.last_query(inputs).queries
    for row, length in enumerate(LENGTHS.tolist()):
        if length:
            torch.testing.assert_close(last[row], derived.queries[row, length - 1])


def test_times_matter_where_the_space_wants_them() -> None:
    torch.manual_seed(0)
    inputs = make_inputs()
    later = inputs.clone()
    later[:, 1] *= 50
    network = SEQREC.network(load_genotype("HSTU"), **FACTS, channels=8, layers=1).eval()
    unit = network.cells[0].edges[0]
    torch.nn.init.normal_(unit.time_bias)
    assert not torch.equal(network(inputs).queries, network(later).queries)
    blind = dataclasses.replace(SEQREC, times=False).network(
        RecommenderGenotype(load_genotype("HSTU").cell, "short_long"), **FACTS, channels=8, layers=1
    )
    assert torch.equal(blind.eval()(inputs).queries, blind(later).queries)


def test_published_recommenders_are_genotypes_of_the_space() -> None:
    sasrec, hstu = (
        SEQREC.network(load_genotype(name), **FACTS, channels=8, layers=2) for name in ("sasrec", "HSTU")
    )
    assert [type(op).__name__ for op in sasrec.cells[0].edges] == ["AttentionLayerNorm", "SwiGlu", "Skip"]
    assert [type(op).__name__ for op in hstu.cells[1].edges] == ["HstuUnit", "Skip", "Skip"]
    assert count_parameters(hstu) < count_parameters(sasrec)


def test_a_genotype_survives_json_and_tells_what_is_passed() -> None:
    cell = CellGenotype.from_text("|none~0|+|none~0|hstu_2h~1|+|ffn_swiglu~0|none~1|skip_connect~2|")
    genotype = RecommenderGenotype(cell, "short_long")
    assert genotype_from_dict(genotype.to_dict()) == genotype
    assert load_genotype(str(genotype)) == genotype
    assert genotype.edges == ((0, 3, "ffn_swiglu"),)  # nothing reaches states 1 and 2


def test_a_genotype_whose_last_node_gets_nothing_is_refused() -> None:
    cell = CellGenotype.from_text("|none~0|+|none~0|hstu_2h~1|+|none~0|ffn_swiglu~1|skip_connect~2|")
    with pytest.raises(UserError, match="nothing leads to the last node"):
        RecommenderGenotype(cell, "last")


def test_an_unknown_operation_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown operation 'gru'.*hstu_2h"):
        make_sequence_op("gru", SIZE, SEQUENCE_OPS)
