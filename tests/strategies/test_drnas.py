import pytest
import torch

from neuroexapt.spaces import NAS_BENCH_201
from neuroexapt.strategies.drnas import DrNas, ProgressiveDrNas
from tests.strategies.small import make_step, some_alphas


def test_weights_are_samples_of_the_dirichlet_distribution() -> None:
    torch.manual_seed(0)
    alpha = torch.tensor([0.0, 1.0, -2.0, 0.5])
    samples = DrNas().relax({"cell": alpha.expand(50_000, 4)})["cell"]
    torch.testing.assert_close(samples.sum(dim=-1), torch.ones(50_000))
    c = torch.where(alpha > 0, alpha + 1, alpha.exp())
    mean = c / c.sum()
    torch.testing.assert_close(samples.mean(dim=0), mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(samples.var(dim=0), mean * (1 - mean) / (c.sum() + 1), atol=2e-3, rtol=0)


def test_the_gradient_passes_through_the_sample() -> None:
    """That of E[w] = mean: averaged over samples it is the mean's own."""
    torch.manual_seed(0)
    alpha = torch.tensor([0.3, -0.4, 1.0], requires_grad=True)
    samples = DrNas().relax({"cell": alpha.expand(100_000, 3)})["cell"]
    (gradient,) = torch.autograd.grad(samples[:, 0].mean(), alpha, retain_graph=True)
    (expected,) = torch.autograd.grad(DrNas().mixing({"cell": alpha})["cell"][0], alpha)
    torch.testing.assert_close(gradient, expected, atol=3e-3, rtol=0)


def test_validation_and_genotype_see_the_mean() -> None:
    alphas = some_alphas()
    mixed = DrNas().mixing(alphas)
    for cell, alpha in alphas.items():
        assert torch.equal(mixed[cell], DrNas().mixing(alphas)[cell])
        assert torch.equal(mixed[cell].argsort(dim=-1), alpha.argsort(dim=-1))


def test_a_step_changes_alphas() -> None:
    step, train, valid = make_step(DrNas())
    before = [alpha.detach().clone() for alpha in step.alphas]
    assert step(train, valid).arch_loss.isfinite()
    assert not any(torch.equal(alpha, old) for alpha, old in zip(step.alphas, before, strict=True))


def test_the_weaker_half_is_ruled_out_after_half_of_the_epochs() -> None:
    strategy = ProgressiveDrNas()
    step, train, valid = make_step(strategy)
    supernet = step.supernet
    with torch.no_grad():
        supernet.alphas["normal"].copy_(torch.tensor([0.0, 3.0, 1.0, 2.0]))
    changes = [strategy.start_epoch(supernet, epoch, 4) for epoch in (0, 1, 2, 2, 3)]
    assert changes == [False, False, True, False, False]
    assert torch.equal(supernet.kept("normal"), torch.tensor([False, True, False, True]).expand(5, 4))
    assert (supernet.kept("reduce").sum(dim=-1) == 2).all()
    step.weights = supernet.weights()
    for alpha, gradient in zip(
        supernet.choices().values(), strategy.arch_gradient(step, train, valid).gradients, strict=True
    ):
        assert gradient.isfinite().all()
        assert torch.equal(gradient != 0, alpha.isfinite())


def test_three_of_five_candidates_stay() -> None:
    supernet = NAS_BENCH_201.supernet(in_channels=2, num_classes=3, channels=2, layers=5)
    assert ProgressiveDrNas().start_epoch(supernet, 1, 2)
    assert (supernet.kept("cell").sum(dim=-1) == 3).all()


@pytest.mark.parametrize(("epochs", "held"), [(50, 10), (100, 10), (10, 2), (9, 2), (2, 0)])
def test_alpha_is_held_at_the_start_of_each_half(epochs: int, held: int) -> None:
    half = (epochs + 1) // 2
    holds = [ProgressiveDrNas().holds_alpha(epoch, epochs) for epoch in range(epochs)]
    assert [epoch for epoch in range(epochs) if holds[epoch]] == [*range(held), *range(half, half + held)]
    assert not any(DrNas().holds_alpha(epoch, epochs) for epoch in range(epochs))


def test_what_was_ruled_out_has_no_weight() -> None:
    alphas = {"cell": torch.tensor([[0.5, -torch.inf, 1.0, -torch.inf]]).expand(1000, 4)}
    for weights in (DrNas().relax(alphas)["cell"], DrNas().mixing(alphas)["cell"]):
        assert weights[:, [1, 3]].max() < 1e-5
        torch.testing.assert_close(weights[:, [0, 2]].sum(dim=-1), torch.ones(1000), rtol=0, atol=1e-5)
