import pytest
import torch

from neuroexapt.core.derived import count_parameters, inherit_weights
from neuroexapt.core.genotypes import DARTS_V2, CellGenotype
from neuroexapt.errors import UserError
from neuroexapt.spaces import DARTS, NAS_BENCH_201
from neuroexapt.spaces.nas_bench_201 import PRIMITIVES, TOPOLOGY, genotype_of_id, id_of_genotype

BEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
SIZES = {"in_channels": 3, "num_classes": 5, "channels": 4, "layers": 5}


def one_hot(*columns: int) -> dict[str, torch.Tensor]:
    return {"cell": torch.eye(len(PRIMITIVES))[list(columns)]}


def test_the_cell_is_the_published_one() -> None:
    assert TOPOLOGY.edges == ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert TOPOLOGY.concat == (3,)
    assert PRIMITIVES == ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def test_derive_takes_the_largest_weight_of_each_edge_none_included() -> None:
    genotype = NAS_BENCH_201.derive(one_hot(3, 0, 1, 4, 2, 0))
    assert str(genotype) == "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|"
    assert NAS_BENCH_201.derive({"cell": torch.zeros(6, 5)}) == NAS_BENCH_201.derive(one_hot(*[0] * 6))


@pytest.mark.parametrize(
    ("number", "arch"),
    [
        (
            0,
            "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|",
        ),
        (6111, BEST),
    ],
)
def test_ids_are_those_of_the_benchmark(number: int, arch: str) -> None:
    assert str(genotype_of_id(number)) == arch
    assert id_of_genotype(CellGenotype.from_text(arch)) == number


def test_ids_name_every_cell_once() -> None:
    assert len({genotype_of_id(number) for number in range(15_625)}) == 15_625


def test_what_is_no_cell_of_the_space_has_no_id() -> None:
    with pytest.raises(UserError, match="from 0 to 15624, not 15625"):
        genotype_of_id(15_625)
    with pytest.raises(UserError, match="no cell of nas-bench-201"):
        id_of_genotype(CellGenotype.from_text("|max_pool_3x3~0|"))


@pytest.mark.parametrize(("number", "parameters"), [(0, 129_306), (1, 802_426), (6111, 1_073_466)])
def test_networks_have_as_many_parameters_as_the_benchmark_counts(number: int, parameters: int) -> None:
    sizes = {"in_channels": 3, "num_classes": 10, "channels": 16, "layers": 17}
    assert count_parameters(NAS_BENCH_201.network(genotype_of_id(number), **sizes)) == parameters


def test_search_network_is_the_same_fused_and_module_by_module() -> None:
    torch.manual_seed(0)
    supernet = NAS_BENCH_201.supernet(**SIZES).double()
    x, wanted = torch.randn(4, 3, 9, 8).double(), list(supernet.parameters())

    def results(execution: str) -> list[torch.Tensor]:
        supernet.set_execution(execution)
        logits = supernet(x)
        return [logits, *torch.autograd.grad(logits.square().sum(), wanted)]

    for fused, reference in zip(results("fused"), results("reference"), strict=True):
        torch.testing.assert_close(fused, reference, rtol=1e-10, atol=1e-10)


def test_search_network_with_one_operation_left_is_the_derived_network() -> None:
    """With all weight on the genotype and the statistics of the batch, the two compute the same."""
    torch.manual_seed(0)
    columns = (3, 1, 2, 0, 4, 3)
    supernet = NAS_BENCH_201.supernet(**SIZES).double()
    network = NAS_BENCH_201.network(NAS_BENCH_201.derive(one_hot(*columns)), **SIZES).double()
    inherit_weights(network, supernet)
    x = torch.randn(4, 3, 8, 8).double()
    weights = {"cell": one_hot(*columns)["cell"].double()}
    torch.testing.assert_close(network(x), supernet(x, weights), rtol=1e-10, atol=1e-10)


def test_derived_network_inherits_running_statistics() -> None:
    torch.manual_seed(0)
    supernet = NAS_BENCH_201.supernet(**SIZES)
    supernet(torch.randn(4, 3, 8, 8))
    network = NAS_BENCH_201.network(CellGenotype.from_text(BEST), **SIZES)
    inherit_weights(network, supernet)
    searched = [buffer for name, buffer in supernet.named_buffers() if name.endswith("running_mean")]
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            assert any(other.shape == buffer.shape and torch.equal(other, buffer) for other in searched), name


@pytest.mark.parametrize("size", [4, 5, 7, 8])
def test_pictures_of_any_size_from_four_on(size: int) -> None:
    NAS_BENCH_201.check((size, size), 2, 3, batch_size=2)
    sizes = {"in_channels": 1, "num_classes": 2, "channels": 2, "layers": 3}
    x = torch.randn(2, 1, size, size)
    assert NAS_BENCH_201.supernet(**sizes)(x).shape == (2, 2)
    assert NAS_BENCH_201.network(CellGenotype.from_text(BEST), **sizes)(x).shape == (2, 2)


def test_refuses_what_its_networks_cannot_be() -> None:
    genotype = CellGenotype.from_text(BEST)
    with pytest.raises(UserError, match="none of nas-bench-201"):
        NAS_BENCH_201.network(DARTS_V2, **SIZES)
    with pytest.raises(UserError, match="none of darts"):
        DARTS.network(genotype, **SIZES)
    with pytest.raises(UserError, match="no auxiliary head"):
        NAS_BENCH_201.network(genotype, **SIZES, auxiliary=True)
    with pytest.raises(UserError, match="init_channels=0"):
        NAS_BENCH_201.check((8, 8), 0, 5, batch_size=8)
    with pytest.raises(UserError, match="too small"):
        NAS_BENCH_201.check((3, 8), 4, 5, batch_size=8)


def test_random_genotypes_follow_the_generator() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [NAS_BENCH_201.random_genotype(generator, 17) for _ in range(20)]
    assert len(set(drawn)) > 15
    assert NAS_BENCH_201.random_genotype(torch.Generator().manual_seed(0), 17) == drawn[0]
