import torch

from neuroexapt.strategies.fair_darts import FairDarts
from tests.strategies.small import PRIMITIVES, make_supernet, some_alphas


def test_operations_do_not_compete() -> None:
    """The weight of each depends on its own α alone."""
    alpha = some_alphas()["normal"]
    weights = FairDarts().relax({"cell": alpha})["cell"]
    (gradient,) = torch.autograd.grad(weights[2, 1], alpha)
    assert gradient[2, 1] > 0
    assert gradient.count_nonzero() == 1


def test_penalty_drives_weights_to_zero_or_one() -> None:
    """All but those of ``none``, which nothing else moves."""
    alphas = some_alphas()
    strategy = FairDarts()
    strategy.shape(make_supernet(channels=2))
    weights = strategy.relax(alphas)
    assert PRIMITIVES[0] == "none"
    both = torch.cat([w[:, 1:].flatten() for w in weights.values()])
    torch.testing.assert_close(strategy.penalty(alphas, weights), -10 * ((both - 0.5) ** 2).mean())
    for alpha, gradient in zip(
        alphas.values(), torch.autograd.grad(strategy.penalty(alphas, weights), alphas.values()), strict=True
    ):
        assert torch.equal((-gradient).sign()[:, 1:], alpha.sign()[:, 1:]), "away from one half"
        assert not gradient[:, 0].any()
