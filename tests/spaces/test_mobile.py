import json

import pytest
import torch
import torch.nn.functional as F

from neuroexapt.core.blocks import InvertedResidual
from neuroexapt.core.derived import inherit_weights
from neuroexapt.core.genotypes import BlockGenotype, genotype_from_text
from neuroexapt.core.operations import Zero
from neuroexapt.errors import UserError
from neuroexapt.spaces.mobile import MOBILE
from neuroexapt.strategies import get_strategy

SIZES = {"in_channels": 3, "num_classes": 5, "channels": 4, "layers": 6}
BLOCKS = ("mb_k3_e3", "skip_connect", "mb_k5_e6", "mb_k7_e3", "mb_k3_e6", "skip_connect")
GENOTYPE = BlockGenotype(BLOCKS)


def one_hot(blocks: tuple[str, ...]) -> dict[str, torch.Tensor]:
    columns = [MOBILE.primitives.index(block) for block in blocks]
    return {"block": torch.eye(len(MOBILE.primitives))[columns]}


def test_a_block_equals_its_definition() -> None:
    torch.manual_seed(0)
    block, x = InvertedResidual(4, 4, 3, 6, stride=1, affine=False).double(), torch.randn(5, 4, 6, 6).double()
    widen, depthwise, narrow = block.parameters()

    def norm(z: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(z, None, None, training=True)

    y = norm(F.conv2d(x, widen)).clamp(0, 6)
    y = norm(F.conv2d(y, depthwise, padding=1, groups=24)).clamp(0, 6)
    torch.testing.assert_close(block(x), x + norm(F.conv2d(y, narrow)))


def test_blocks_that_change_the_shape_cannot_be_skipped() -> None:
    supernet = MOBILE.supernet(**SIZES)
    unskippable = [isinstance(block.ops[0], Zero) for block in supernet.cells]
    assert unskippable == [False, False, True, False, True, False]
    everywhere = one_hot(("skip_connect",) * 6)
    assert [block != "skip_connect" for block in MOBILE.derive(everywhere).blocks] == unskippable
    with pytest.raises(UserError, match="cannot be skip_connect"):
        MOBILE.network(BlockGenotype(("skip_connect",) * 6), **SIZES)


def test_derive_takes_the_largest_weight_of_each_block() -> None:
    assert MOBILE.derive(one_hot(BLOCKS)) == GENOTYPE


def test_search_network_with_one_operation_left_is_the_derived_network() -> None:
    torch.manual_seed(0)
    supernet, network = MOBILE.supernet(**SIZES).double(), MOBILE.network(GENOTYPE, **SIZES).double()
    inherit_weights(network, supernet)
    x = torch.randn(4, 3, 9, 8).double()
    weights = {"block": one_hot(BLOCKS)["block"].double()}
    torch.testing.assert_close(network(x), supernet(x, weights))


def test_genotype_reads_back() -> None:
    assert genotype_from_text(str(GENOTYPE)) == GENOTYPE
    assert GENOTYPE.cells["block"].edges[2] == (2, 3, "mb_k5_e6")


@pytest.mark.parametrize("blocks", [[], "mb_k3_e3", [3]])
def test_refuses_what_is_no_genotype(blocks: object) -> None:
    with pytest.raises(UserError, match="a genotype of blocks"):
        genotype_from_text(json.dumps({"blocks": blocks}))


def test_refuses_networks_that_cannot_be() -> None:
    with pytest.raises(UserError, match="has 6 blocks"):
        MOBILE.network(GENOTYPE, **{**SIZES, "layers": 5})
    with pytest.raises(UserError, match="unknown block 'sep_conv_3x3'"):
        MOBILE.network(BlockGenotype(("sep_conv_3x3",) * 6), **SIZES)
    with pytest.raises(UserError, match="no auxiliary head"):
        MOBILE.network(GENOTYPE, **SIZES, auxiliary=True)
    with pytest.raises(UserError, match="init_channels=0"):
        MOBILE.check((8, 8), 0, 6, batch_size=4)


@pytest.mark.parametrize("strategy", ["pc-darts", "lambda-darts"])
def test_strategies_of_cells_are_refused(strategy: str) -> None:
    with pytest.raises(UserError, match=f"{strategy} works on cells"):
        get_strategy(strategy).shape(MOBILE.supernet(**SIZES))


def test_random_genotypes_are_networks() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        network = MOBILE.network(MOBILE.random_genotype(generator, 6), **SIZES)
        network.drop_path_probability = 0.5
        assert network(torch.randn(2, 3, 8, 8)).shape == (2, 5)
