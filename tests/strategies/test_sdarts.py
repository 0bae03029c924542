import pytest
import torch

from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.sdarts import AdversariallySmoothed, RandomlySmoothed, Smoothed
from tests.strategies.small import make_step

both = pytest.mark.parametrize("strategy", [RandomlySmoothed(), AdversariallySmoothed()])


@both
def test_weights_learn_near_the_softmax_and_alpha_at_it(strategy: Smoothed) -> None:
    step, train, valid = make_step(strategy)
    strategy.start_epoch(step.supernet, 1, 2)
    plain = [softmax.detach() for softmax in Darts().relax(dict(step.supernet.alphas)).values()]
    perturbed = list(strategy.perturb(step, train, plain))
    for weights, softmax in zip(perturbed, plain, strict=True):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(weights)))
        assert (weights >= 0).all()
        # Clamping to 0..1 and normalising may add to the radius; by no more than a row's sum is off.
        assert 0.05 < (weights - softmax).abs().max() < 0.6
    alpha_gradients = strategy.arch_gradient(step, train, valid).gradients
    step.strategy = Darts()
    expected = step.strategy.arch_gradient(step, train, valid).gradients
    assert all(torch.equal(a, e) for a, e in zip(alpha_gradients, expected, strict=True))


def test_the_attack_raises_the_loss_more_than_noise() -> None:
    losses = []
    for strategy in (Darts(), RandomlySmoothed(), AdversariallySmoothed()):
        step, train, _ = make_step(strategy)
        for _ in range(5):
            step(train, None)
        strategy.start_epoch(step.supernet, 1, 2)
        weights = Darts().relax({name: alpha.detach() for name, alpha in step.supernet.alphas.items()})
        if isinstance(strategy, Smoothed):
            perturbed = strategy.perturb(step, train, list(weights.values()))
            weights = dict(zip(weights, perturbed, strict=True))
        step.supernet.eval()
        losses.append(step.gradients(train, step.weights, weights).loss)
    plain, noisy, attacked = losses
    assert attacked > max(plain, noisy)


@both
def test_radius_grows_linearly(strategy: Smoothed) -> None:
    step, *_ = make_step(strategy)
    radii = []
    for epoch in range(3):
        strategy.start_epoch(step.supernet, epoch, 3)
        radii.append(strategy.radius.item())
    torch.testing.assert_close(torch.tensor(radii), torch.tensor([0.03, 0.165, 0.3]))


@both
def test_alpha_is_left_as_it_was(strategy: Smoothed) -> None:
    step, train, _ = make_step(strategy)
    before = [alpha.detach().clone() for alpha in step.alphas]
    step(train, None)
    assert all(torch.equal(alpha, old) for alpha, old in zip(step.alphas, before, strict=True))
    assert step.supernet.training


@both
def test_what_was_ruled_out_gets_no_weight(strategy: Smoothed) -> None:
    step, train, _ = make_step(strategy)
    kept = torch.tensor([[True, False, True, True]]).expand(5, 4)
    step.supernet.keep("normal", kept)
    step.weights = step.supernet.weights()
    weights = [w.detach() for w in strategy.relax(step.supernet.choices()).values()]
    normal, reduce = strategy.perturb(step, train, weights)
    assert not normal[:, 1].any()
    assert reduce[:, 1].any()
