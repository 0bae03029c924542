import pytest
import torch

from neuroexapt.core.cells import CellTopology
from neuroexapt.core.operations import OPS
from neuroexapt.errors import UserError
from neuroexapt.spaces import DARTS, CellSpace, get_space

EDGES = list(DARTS.topology.edges)


def uniform() -> dict[str, torch.Tensor]:
    return {cell: torch.full((14, 8), 0.125) for cell in ("normal", "reduce")}


def test_edges_lead_from_every_earlier_state() -> None:
    assert EDGES[:5] == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert len(EDGES) == 14
    assert len(CellTopology(nodes=5).edges) == 20


def test_derive_keeps_the_two_strongest_edges_of_each_node_strongest_first() -> None:
    weights = uniform()
    weights["normal"][EDGES.index((2, 5)), 4] = 0.5
    weights["normal"][EDGES.index((0, 5)), 6] = 0.4
    weights["normal"][EDGES.index((4, 5)), 3] = 0.3
    genotype = DARTS.derive(weights)
    assert genotype.normal[-2:] == (("sep_conv_3x3", 2), ("dil_conv_3x3", 0))


def test_derive_never_chooses_none_and_ignores_its_weight() -> None:
    weights = uniform()
    weights["reduce"][:, 0] = 0.9
    weights["reduce"][EDGES.index((1, 3)), 7] = 0.2
    genotype = DARTS.derive(weights)
    assert genotype.reduce[2] == ("dil_conv_5x5", 1)
    assert all(op != "none" for op, _ in genotype.reduce)


def test_derive_breaks_ties_by_order() -> None:
    genotype = DARTS.derive(uniform())
    assert genotype.normal == (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * 4


@pytest.mark.parametrize(
    ("image_size", "channels", "layers", "message"),
    [
        ((32, 32), 5, 8, "init_channels=5.*even"),
        ((32, 32), 0, 8, "init_channels=0"),
        ((3, 32), 16, 8, "3x32 pixels are too small for 2 reductions"),
        ((32, 32), 16, 2, "layers=2"),
    ],
)
def test_check_refuses(image_size: tuple[int, int], channels: int, layers: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DARTS.check(image_size, channels, layers, batch_size=8)


def test_unknown_op_of_a_space_is_refused_when_checked() -> None:
    with pytest.raises(UserError, match="unknown operation 'typo'"):
        CellSpace("mine", ("none", "typo")).check((8, 8), 4, 3, batch_size=8)


def test_batches_of_one_need_more_than_one_pixel() -> None:
    DARTS.check((8, 8), 4, 3, batch_size=1)
    with pytest.raises(UserError, match="raise --batch-size"):
        DARTS.check((4, 4), 4, 3, batch_size=1)


def test_an_op_of_the_wrong_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "shrinks", lambda channels, stride, affine: torch.nn.AvgPool2d(2))
    with pytest.raises(UserError, match=r"'shrinks' turns \[2, 2, 5, 5\] at stride 1 into \[2, 2, 2, 2\]"):
        CellSpace("mine", ("none", "shrinks")).check((8, 8), 4, 3, batch_size=8)


def test_unknown_space() -> None:
    with pytest.raises(UserError, match="unknown search space 'dart'; known are darts"):
        get_space("dart")


def test_space_of_none_alone_is_refused() -> None:
    with pytest.raises(UserError, match="besides 'none'"):
        CellSpace("empty", ("none",))
