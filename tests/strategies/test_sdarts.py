import pytest
import torch

from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.sdarts import ATTACK_STEPS, AdversariallySmoothed, RandomlySmoothed, Smoothed
from tests.strategies.small import make_step, values_by_epoch

both = pytest.mark.parametrize("strategy", [RandomlySmoothed(), AdversariallySmoothed()])


# Four weights of 1/4 that are moved by up to ε and divided by their sum.
LARGEST, SMALLEST = (lambda eps: (1 / 4 + eps) / (1 - 2 * eps)), (lambda eps: (1 / 4 - eps) / (1 + 2 * eps))


@pytest.mark.parametrize(("strategy", "rows"), [(RandomlySmoothed(), 5000), (AdversariallySmoothed(), 5)])
def test_weights_move_by_the_radius_at_most(strategy: Smoothed, rows: int) -> None:
    step, train, _ = make_step(strategy)
    strategy.radius.fill_(0.1)
    torch.manual_seed(0)
    perturbed = torch.cat(list(strategy.perturb(step, train, [torch.full((rows, 4), 0.25)] * 2)))
    torch.testing.assert_close(perturbed.sum(dim=-1), torch.ones(len(perturbed)))
    assert 0.85 * LARGEST(0.1) < perturbed.max() < LARGEST(0.1) + 1e-6
    assert 1.15 * SMALLEST(0.1) > perturbed.min() > SMALLEST(0.1) - 1e-6


@both
def test_weights_learn_at_what_is_perturbed(strategy: Smoothed, monkeypatch: pytest.MonkeyPatch) -> None:
    step, train, _ = make_step(strategy)
    perturbed = {name: torch.rand_like(alpha) for name, alpha in step.supernet.alphas.items()}
    monkeypatch.setattr(strategy, "perturb", lambda *arguments: list(perturbed.values()))
    found = strategy.weight_gradient(step, train).gradients
    expected = step.gradients(train, step.weights, perturbed).gradients
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_the_attack_sees_the_network_in_evaluation_mode() -> None:
    step, train, _ = make_step(AdversariallySmoothed())
    modes = []
    step.supernet.register_forward_pre_hook(lambda network, inputs: modes.append(network.training))
    step(train, None)
    assert modes == [False] * (ATTACK_STEPS + 2) + [True], "its steps, both losses, then the weights"


@both
def test_alpha_learns_at_the_softmax(strategy: Smoothed) -> None:
    step, train, valid = make_step(strategy)
    strategy.start_epoch(step.supernet, 1, 2)
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
    radii = values_by_epoch(strategy, "radius", 3)
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
