import torch

from neuroexapt.strategies.beta_darts import BetaDarts
from neuroexapt.strategies.darts import Darts
from tests.strategies.small import make_step, some_alphas, values_by_epoch


def test_penalty_lowers_each_alpha_by_its_share() -> None:
    strategy, alphas = BetaDarts(), some_alphas()
    strategy.strength.fill_(50)
    gradients = torch.autograd.grad(strategy.penalty(alphas, strategy.relax(alphas)), list(alphas.values()))
    for alpha, gradient in zip(alphas.values(), gradients, strict=True):
        torch.testing.assert_close(gradient, 50 * alpha.softmax(dim=-1) / len(alpha))


def test_alphas_get_the_gradient_of_loss_and_penalty_and_weights_that_of_the_loss_alone() -> None:
    strategy = BetaDarts()
    step, train, valid = make_step(strategy)
    strategy.strength.fill_(3)
    regularised = strategy.arch_gradient(step, train, valid)
    of_weights = step.gradients(train, step.weights).gradients
    step.strategy = Darts()
    plain = step.strategy.arch_gradient(step, train, valid)
    assert torch.equal(regularised.loss, plain.loss), "the loss that is shown is the batch's"
    for alpha, with_penalty, without in zip(step.alphas, regularised.gradients, plain.gradients, strict=True):
        share = 3 * alpha.softmax(dim=-1) / len(alpha)
        torch.testing.assert_close(with_penalty, without + share)
    for with_penalty, without in zip(of_weights, step.gradients(train, step.weights).gradients, strict=True):
        assert torch.equal(with_penalty, without)


def test_strength_grows_linearly_from_none_to_fifty() -> None:
    assert values_by_epoch(BetaDarts(), "strength", 3) == [0, 25, 50]
