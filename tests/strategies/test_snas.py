import torch

from neuroexapt.strategies.snas import Snas
from tests.strategies.small import some_alphas, values_by_epoch


def test_weights_are_a_sample_that_nears_a_corner_as_the_temperature_falls() -> None:
    torch.manual_seed(0)
    alpha = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature, largest in ((10.0, 0.4), (0.01, 0.95)):
        strategy = Snas()
        strategy.temperature.fill_(temperature)
        samples = strategy.relax({"cell": alpha.expand(20_000, 4)})["cell"]
        torch.testing.assert_close(samples.sum(dim=-1), torch.ones(20_000))
        assert (samples.max(dim=-1).values.mean() > largest) == (temperature < 1)
        chosen = torch.bincount(samples.argmax(dim=-1), minlength=4) / 20_000
        torch.testing.assert_close(chosen, alpha.softmax(dim=-1), atol=0.012, rtol=0)


def test_every_operation_passes_a_gradient() -> None:
    alphas = some_alphas()
    weights = Snas().relax(alphas)["normal"]
    for k in range(4):
        (gradient,) = torch.autograd.grad(weights[:, k].sum(), alphas["normal"], retain_graph=True)
        assert (gradient != 0).all()


def test_temperature_falls_linearly() -> None:
    assert values_by_epoch(Snas(), "temperature", 3) == [10, 5.5, 1]
