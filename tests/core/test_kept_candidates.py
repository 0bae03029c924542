import pytest
import torch

from neuroexapt.core.operations import Zero
from neuroexapt.core.partial_channels import use_partial_channels
from neuroexapt.core.supernet import DartsSupernet, Supernet, mixed_ops
from neuroexapt.spaces import NAS_BENCH_201
from tests.strategies.small import make_supernet

KEPT = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)


def pruned(partial: bool = False) -> DartsSupernet:
    torch.manual_seed(0)
    supernet = make_supernet(8)
    if partial:
        use_partial_channels(supernet, 4)
    supernet.keep("reduce", KEPT)
    return supernet


def test_weights_of_what_was_ruled_out_are_zero_and_others_share_the_rest() -> None:
    supernet = pruned()
    weights = supernet.choices()["reduce"].softmax(dim=-1)
    assert torch.equal(weights > 0, KEPT)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5))
    assert torch.equal(supernet.choices()["normal"], supernet.alphas["normal"])


@pytest.mark.parametrize("partial", [False, True])
def test_neither_parameters_nor_operations_remain(partial: bool) -> None:
    supernet = pruned(partial)
    for cell in supernet.search_cells():
        for edge, kept in zip(mixed_ops(cell), KEPT, strict=True):
            gone = [type(op) is Zero for op in edge.ops]
            assert (
                gone == [True, *(not k for k in kept[1:])]
                if cell.reduction
                else gone == [True, False, False, False]
            )


def test_the_output_is_that_of_weights_that_are_zero() -> None:
    torch.manual_seed(0)
    whole, x = make_supernet(8), torch.randn(4, 2, 8, 8)
    supernet = pruned()
    weights = {name: choice.softmax(dim=-1) for name, choice in supernet.choices().items()}
    torch.testing.assert_close(supernet(x), whole(x, weights))


def test_alphas_of_what_was_ruled_out_get_no_gradient() -> None:
    supernet = pruned()
    supernet(torch.randn(4, 2, 8, 8)).square().sum().backward()
    gradient = supernet.alphas["reduce"].grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert not gradient[~KEPT].any()
    assert gradient[0, 2] != 0


@pytest.mark.parametrize("partial", [False, True])
def test_a_state_rules_out_the_same(partial: bool) -> None:
    supernet, other = pruned(partial), make_supernet(8)
    if partial:
        use_partial_channels(other, 4)
    other.load_state_dict(supernet.state_dict())
    assert torch.equal(other.kept("reduce"), KEPT)
    x = torch.randn(4, 2, 8, 8)
    assert torch.equal(other(x), supernet(x))
    assert len(list(other.parameters())) == len(list(supernet.parameters()))


def test_what_was_ruled_out_stays_so() -> None:
    supernet = pruned()
    supernet.keep("reduce", ~KEPT)
    assert not supernet.kept("reduce").any()


def test_a_network_of_one_type_of_cell() -> None:
    supernet: Supernet = NAS_BENCH_201.supernet(in_channels=2, num_classes=3, channels=4, layers=5)
    kept = torch.rand(6, 5) < 0.5
    supernet.keep("cell", kept)
    assert torch.equal(supernet.choices()["cell"].isfinite(), kept)
    assert supernet(torch.randn(2, 2, 8, 8)).isfinite().all()
