import torch

from neuroexapt.strategies.fair_darts import FairDarts
from tests.strategies.small import some_alphas


def test_operations_do_not_compete() -> None:
    """The weight of each depends on its own α alone."""
    alpha = some_alphas()["normal"]
    weights = FairDarts().relax({"cell": alpha})["cell"]
    (gradient,) = torch.autograd.grad(weights[2, 1], alpha)
    assert gradient[2, 1] > 0
    assert gradient.count_nonzero() == 1


def test_penalty_drives_weights_to_zero_or_one() -> None:
    alphas = some_alphas()
    strategy = FairDarts()
    weights = strategy.relax(alphas)
    both = torch.cat([w.flatten() for w in weights.values()])
    torch.testing.assert_close(strategy.penalty(alphas, weights), -10 * ((both - 0.5) ** 2).mean())
    for alpha, gradient in zip(
        alphas.values(), torch.autograd.grad(strategy.penalty(alphas, weights), alphas.values()), strict=True
    ):
        assert torch.equal((-gradient).sign(), alpha.sign()), "away from one half"
