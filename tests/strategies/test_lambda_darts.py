import copy

import pytest
import torch

from neuroexapt.strategies import lambda_darts
from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.lambda_darts import LambdaDarts, harmonizing_direction
from tests.strategies.small import make_step, values_by_epoch


def mean_cosine(gradients: torch.Tensor) -> torch.Tensor:
    g = gradients.flatten(1)
    cosines = torch.nn.functional.cosine_similarity(g[:, None], g[None], dim=-1)
    return cosines[torch.triu(torch.ones(len(g), len(g)), 1) > 0].mean()


def test_direction_is_the_gradient_of_the_mean_cosine_between_cells() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(mean_cosine(gradients), gradients)
    torch.testing.assert_close(harmonizing_direction(gradients.detach()), expected)
    assert not harmonizing_direction(gradients[:1].detach()).any()


def test_weights_learn_to_harmonise_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 and evaluation mode the gradient is that of L − λ Λ, differentiated through."""
    monkeypatch.setattr(lambda_darts, "FINITE_DIFFERENCE_RADIUS", 1e-7)
    strategy = LambdaDarts().double()
    strategy.strength.fill_(0.5)
    step, train, _ = make_step(strategy)
    step.supernet.double().eval()
    train = train._replace(inputs=train.inputs.double())
    found = strategy.weight_gradient(step, train)

    names = list(step.supernet.alphas)
    at = [
        alpha.detach().softmax(dim=-1).expand(count, -1, -1).clone().requires_grad_()
        for alpha, count in zip(step.alphas, (1, 2), strict=True)
    ]
    step.supernet.set_execution("reference")
    loss = step.task.loss(step.supernet(train.inputs, dict(zip(names, at, strict=True))), train.labels)
    of_cells = torch.autograd.grad(loss, at, create_graph=True)
    objective = loss - 0.5 * mean_cosine(of_cells[1])
    expected = torch.autograd.grad(objective, step.weights)
    plain = Darts().weight_gradient(step, train).gradients
    difference = torch.nn.utils.get_total_norm(torch._foreach_sub(found.gradients, expected))
    added = torch.nn.utils.get_total_norm(torch._foreach_sub(plain, expected))
    assert difference < 1e-3 * added


def test_without_strength_it_is_darts() -> None:
    step, train, _ = make_step(LambdaDarts())
    twin = copy.deepcopy(step)
    gradients = step.strategy.weight_gradient(step, train)
    twin.strategy = Darts()
    expected = twin.strategy.weight_gradient(twin, train)
    assert gradients.loss == expected.loss
    for g, e in zip(gradients.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(g, e)


def test_strength_grows_linearly() -> None:
    assert values_by_epoch(LambdaDarts(), "strength", 3) == [0, 0.0625, 0.125]
