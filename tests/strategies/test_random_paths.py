import torch

from neuroexapt.strategies.random_paths import RandomPaths, random_path
from tests.strategies.small import make_step


def test_operations_are_drawn_uniformly_among_those_that_are_left() -> None:
    torch.manual_seed(0)
    alpha = torch.tensor([3.0, -torch.inf, 0.0, -2.0]).expand(30_000, 4)
    drawn = random_path(alpha)
    assert torch.equal(drawn.sum(dim=-1), torch.ones(30_000))
    torch.testing.assert_close(drawn.mean(dim=0), torch.tensor([1, 0, 1, 1]) / 3, atol=0.01, rtol=0)


def test_alpha_stays_as_it_is_and_single_paths_learn() -> None:
    step, train, valid = make_step(RandomPaths())
    alphas = [alpha.detach().clone() for alpha in step.alphas]
    weights = [weight.detach().clone() for weight in step.weights]
    step(train, valid)
    assert all(torch.equal(alpha, old) for alpha, old in zip(step.alphas, alphas, strict=True))
    assert any(torch.equal(weight, old) for weight, old in zip(step.weights, weights, strict=True))
    assert not all(torch.equal(weight, old) for weight, old in zip(step.weights, weights, strict=True))
