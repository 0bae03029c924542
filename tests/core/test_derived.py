import pytest
import torch
from torch import nn

from neuroexapt.core.derived import (
    AuxiliaryHead,
    DartsNetwork,
    check_auxiliary_size,
    count_parameters,
    drop_path,
    inherit_weights,
)
from neuroexapt.core.genotypes import DARTS_V2, GENOTYPES, Genotype
from neuroexapt.errors import UserError
from neuroexapt.spaces import DARTS

SIZES = {"in_channels": 3, "num_classes": 5, "channels": 4, "layers": 4}


@pytest.mark.parametrize("name", GENOTYPES)
def test_published_genotypes_train(name: str) -> None:
    network = DartsNetwork(GENOTYPES[name], **SIZES)
    network(torch.randn(2, 3, 9, 9)).sum().backward()
    # A node that no later state and no output uses is all that may go without a gradient.
    used = [p for p in network.parameters() if p.grad is not None]
    assert len(used) > 0.8 * len(list(network.parameters()))


def test_published_size_of_darts_v2() -> None:
    """3.3 M parameters at 20 cells of 36 channels (table 1 of the paper, without the auxiliary head)."""
    network = DartsNetwork(DARTS_V2, in_channels=3, num_classes=10, channels=36, layers=20)
    assert count_parameters(network) == 3_349_342
    sizes = {"in_channels": 3, "num_classes": 10, "channels": 36, "layers": 20}
    assert count_parameters(DartsNetwork(DARTS_V2, **sizes, auxiliary=True)) == 3_349_342


def test_auxiliary_head_sees_two_thirds_of_the_depth() -> None:
    network = DartsNetwork(DARTS_V2, **SIZES, auxiliary=True)
    logits, auxiliary = network.forward_with_auxiliary(torch.randn(2, 3, 32, 32))
    assert auxiliary is not None
    assert logits.shape == auxiliary.shape == (2, 5)
    auxiliary.sum().backward()
    after = [p.grad is None for p in network.cells[-1].parameters()]
    before = [p.grad is not None for p in network.cells[0].parameters()]
    assert all(after)
    assert any(before)


@pytest.mark.parametrize("size", [6, 7, 8, 16])
def test_auxiliary_head_takes_these_sizes(size: int) -> None:
    assert AuxiliaryHead(4, 3)(torch.randn(2, 4, size, size)).shape == (2, 3)


def test_auxiliary_head_refuses_small_pictures() -> None:
    check_auxiliary_size((21, 32))
    with pytest.raises(UserError, match="at least 21 pixels, these have 20"):
        check_auxiliary_size((20, 32))


def test_drop_path_zeroes_whole_pictures_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    y = drop_path(torch.ones(10_000, 2, 2, 2), 0.25)
    per_picture = y.flatten(1)
    assert ((per_picture == 0).all(1) | (per_picture == 1 / 0.75).all(1)).all()
    assert abs(y.mean() - 1) < 0.02


def test_drop_path_only_while_training() -> None:
    network = DartsNetwork(DARTS_V2, **SIZES)
    network.drop_path_probability = 0.5
    x = torch.randn(4, 3, 8, 8)
    assert not torch.equal(network.train()(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


def test_inherits_every_tensor_that_both_have() -> None:
    torch.manual_seed(0)
    supernet = DARTS.supernet(**SIZES)
    supernet.train()(torch.randn(8, 3, 8, 8))
    genotype = DARTS.derive({k: torch.rand_like(a) for k, a in supernet.alphas.items()})
    network = DARTS.network(genotype, **SIZES)
    inherit_weights(network, supernet)

    searched = {v.data_ptr(): v for v in supernet.state_dict().values()}.values()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not name.startswith("stem"):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            tensors = [module.running_mean, module.running_var]
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            tensors = [module.weight]
        else:
            continue
        for tensor in tensors:
            assert any(t.shape == tensor.shape and torch.equal(t, tensor) for t in searched), name


def test_inherited_cell_inputs_and_ops_come_from_the_same_place() -> None:
    """Each kept op has the weights of its own edge, not of another edge with the same op."""
    torch.manual_seed(0)
    supernet = DARTS.supernet(**SIZES)
    network = DartsNetwork(DARTS_V2, **SIZES)
    inherit_weights(network, supernet)
    edges = list(DARTS.topology.edges)
    for cell, search_cell in zip(network.cells, supernet.cells, strict=True):
        name = "reduce" if search_cell.reduction else "normal"
        for i, (source, target, op) in enumerate(DARTS_V2.edges(name)):
            kept = list(cell.edges[i].parameters())
            if kept:
                searched = search_cell.edges[edges.index((source, target))].candidate(op)
                first_conv = next(searched.parameters())
                assert torch.equal(kept[0], first_conv)


def test_unknown_op_in_a_genotype_is_refused() -> None:
    genotype = Genotype(**{**DARTS_V2.to_dict(), "normal": [["sep_conv_9x9", 0]] * 8})
    with pytest.raises(UserError, match="unknown operation 'sep_conv_9x9'"):
        DartsNetwork(genotype, **SIZES)
