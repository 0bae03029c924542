import pytest
import torch
import torch.nn.functional as F

from neuroexapt.core.operations import MixedOp
from neuroexapt.core.partial_channels import PartialMixedOp
from neuroexapt.errors import UserError
from neuroexapt.strategies.pc_darts import PcDarts
from tests.strategies.small import PRIMITIVES, make_step


@pytest.mark.parametrize(("stride", "size"), [(1, 6), (2, 6), (2, 5)])
def test_candidates_touch_a_quarter_of_the_channels(stride: int, size: int) -> None:
    """Every fourth channel of the output is mixed of the first quarter of the input, the others pass by."""
    torch.manual_seed(0)
    edge, weights = PartialMixedOp(MixedOp(8, stride, PRIMITIVES), 4), torch.rand(4)
    assert edge.mixed.candidate("sep_conv_3x3").op[0].depthwise.weight.shape[0] == 2
    x = torch.randn(3, 8, size, size)
    y = edge(x, weights)
    assert torch.equal(y[:, 0::4], edge.mixed(x[:, :2], weights))
    passed = x[:, 2:] if stride == 1 else F.max_pool2d(x[:, 2:], 2, ceil_mode=True)
    rest = y.unflatten(1, (2, 4))[:, :, 1:].transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(rest, weights.sum() * passed)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="1/4 of the channels, and 6 cannot be divided so; choose --init-ch"):
        make_step(PcDarts(), channels=6)


def test_edges_that_enter_a_node_share_its_weight() -> None:
    strategy = PcDarts()
    step, *_ = make_step(strategy, channels=8)
    alphas = dict(step.supernet.alphas)
    beta = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])  # edges 0 and 1 enter the first node, the rest the second
    weights = strategy.relax({**alphas, "normal_edges": beta})["normal"]
    shares = torch.cat([beta[:2].softmax(dim=0), beta[2:].softmax(dim=0)])
    torch.testing.assert_close(weights.sum(dim=-1), shares)
    torch.testing.assert_close(weights, alphas["normal"].softmax(dim=-1) * shares[:, None])


def test_shares_of_edges_are_learned_with_alpha() -> None:
    step, train, valid = make_step(PcDarts(), channels=8)
    betas = {name: a.detach().clone() for name, a in step.supernet.alphas.items() if name.endswith("_edges")}
    assert list(betas) == ["normal_edges", "reduce_edges"]
    step(train, valid)
    assert not any(torch.equal(step.supernet.alphas[name], beta) for name, beta in betas.items())


def test_fused_and_reference_execution_agree() -> None:
    step, train, _ = make_step(PcDarts(), channels=8)
    with torch.no_grad():
        fused = step.supernet(train.inputs, step.strategy.relax(dict(step.supernet.alphas)))
        step.supernet.set_execution("reference")
        assert not step.supernet.cells[0].edges[0].mixed.fused
        reference = step.supernet(train.inputs, step.strategy.relax(dict(step.supernet.alphas)))
    torch.testing.assert_close(fused, reference, rtol=1e-4, atol=1e-5)
