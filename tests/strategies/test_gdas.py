import pytest
import torch
from torch import nn

from neuroexapt.core.drawn import strongest
from neuroexapt.core.operations import MixedOp
from neuroexapt.strategies.gdas import Gdas
from neuroexapt.strategies.gumbel import gumbel_softmax
from tests.strategies.small import make_phase, make_step, some_alphas, values_by_epoch


def test_one_operation_an_edge_has_weight_one_and_all_have_the_gradient_of_the_sample() -> None:
    alpha = torch.randn(5, 4, requires_grad=True)
    strategy, upstream = Gdas(), torch.randn(5, 4)
    torch.manual_seed(1)
    weights = strategy.relax({"cell": alpha})["cell"]
    torch.manual_seed(1)
    sample = gumbel_softmax(alpha, strategy.temperature)
    assert torch.equal(weights, strongest(sample))
    (actual,) = torch.autograd.grad(weights, alpha, upstream)
    (expected,) = torch.autograd.grad(sample, alpha, upstream)
    assert torch.equal(actual, expected)


def test_what_was_not_drawn_counts_as_the_constant_one() -> None:
    """As in the published search, which adds the weights of the others to what the drawn one puts out."""
    edge = MixedOp(4, 1, ("none", "skip_connect", "nor_conv_3x3"), norm_pools=False)
    edge.drawn_only = True
    x, g = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for k, op in enumerate(edge.ops):
        weights = torch.eye(3)[k].requires_grad_()
        (gradient,) = torch.autograd.grad(edge(x, weights), weights, g)
        expected = g.sum().repeat(3)
        expected[k] = (g * op(x)).sum()
        torch.testing.assert_close(gradient, expected)


def test_operations_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    torch.manual_seed(0)
    alpha = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
    for temperature in (10.0, 0.1):
        strategy = Gdas()
        strategy.temperature.fill_(temperature)
        shares = strategy.relax({"cell": alpha})["cell"].mean(dim=0)
        torch.testing.assert_close(shares, alpha[0].softmax(dim=-1), atol=0.012, rtol=0)


def test_temperature_falls_linearly_from_ten_to_a_tenth() -> None:
    temperatures = values_by_epoch(Gdas(), "temperature", 3)
    torch.testing.assert_close(torch.tensor(temperatures), torch.tensor([10, 5.05, 0.1]))


def test_only_drawn_operations_learn() -> None:
    step, train, _ = make_step(Gdas())
    edge = step.supernet.cells[0].edges[0]
    learned = []
    for _ in range(20):
        torch.manual_seed(len(learned))
        gradients = step.gradients(train, list(edge.parameters())).gradients
        learned.append(any(g.abs().sum() > 0 for g in gradients))
    assert any(learned)
    assert not all(learned)


@pytest.mark.usefixtures("small_space")
@pytest.mark.parametrize(("strategy", "passes"), [("gdas", 2), ("random", 1)])
@pytest.mark.parametrize("execution", ["fused", "reference"])
def test_one_operation_an_edge_runs(strategy, passes, execution) -> None:
    phase = make_phase(strategy=strategy)
    phase.supernet.set_execution(execution)
    steps = len(list(phase.steps(0, 0)))
    seen = []
    for cell in phase.supernet.search_cells():
        for edge in cell.edges:
            bns = [next(m for m in op.modules() if type(m) is nn.BatchNorm2d) for op in edge.ops[2:]]
            seen.append(sum(bn.num_batches_tracked.item() for bn in bns))
    assert 0 < max(seen) <= steps * passes


def test_validation_and_genotype_see_no_noise() -> None:
    alphas = some_alphas()
    mixed = Gdas().mixing(alphas)
    assert all(torch.equal(mixed[cell], alphas[cell].softmax(dim=-1)) for cell in alphas)


@pytest.mark.usefixtures("small_space")
@pytest.mark.parametrize("strategy", ["gdas", "random"])
def test_validation_takes_the_statistics_of_its_batches(strategy) -> None:
    """Running ones are those of ever changing paths: by them accuracy stayed that of chance."""
    phase = make_phase(strategy=strategy)
    torch.manual_seed(0)
    expected = phase.end_epoch(0)
    for bn in phase.supernet.modules():
        if type(bn) is nn.BatchNorm2d:
            torch.nn.init.normal_(bn.running_mean, 5.0)
    before = [buffer.clone() for buffer in phase.supernet.buffers()]
    torch.manual_seed(0)
    actual = phase.end_epoch(0)
    for name in ("valid_loss", "valid_accuracy"):
        assert actual[name] == expected[name]
    for buffer, kept in zip(phase.supernet.buffers(), before, strict=True):
        assert torch.equal(buffer, kept)
