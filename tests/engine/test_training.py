import copy
from pathlib import Path

import pytest
import torch

from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint
from neuroexapt.engine.config import SearchConfig
from neuroexapt.engine.training import (
    WeightAverage,
    cosine,
    load_optimizer,
    make_optimizer,
    set_learning_rate,
)


def test_cosine_is_the_published_schedule() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.025)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.001)
    for epoch in range(50):
        assert cosine(epoch, 50, 0.025, 0.001) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_a_state_that_was_saved_on_a_gpu_goes_on_elsewhere() -> None:
    """There the learning rate is a tensor and the variant another; what belongs to parameters is kept."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([parameter], SearchConfig(momentum=0.5))
    parameter.grad = torch.ones(2)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(lr=torch.tensor(7.0), fused=True)

    resumed = make_optimizer([parameter], SearchConfig(momentum=0.5))
    load_optimizer(resumed, saved)
    set_learning_rate(resumed, 0.25)
    (group,) = resumed.param_groups
    assert (group["lr"], group["fused"]) == (0.25, None)
    assert torch.equal(resumed.state[parameter]["momentum_buffer"], torch.ones(2))


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_a_state_is_laid_out_as_its_parameter(tmp_path: Path, optimizer_name: str) -> None:
    """A checkpoint does not keep the layout, and a fused optimizer takes no two."""
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(weight, requires_grad=True)
    optimizer = make_optimizer([parameter], SearchConfig(optimizer=optimizer_name))
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path / "c", optimizer.state_dict())

    resumed = make_optimizer([parameter], SearchConfig(optimizer=optimizer_name))
    load_optimizer(resumed, load_checkpoint(tmp_path / "c"))
    for name, value in optimizer.state[parameter].items():
        found = resumed.state[parameter][name]
        assert torch.equal(found, value)
        assert found.stride() == value.stride(), name


def test_a_learning_rate_on_the_device_stays_where_it_is() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], rate, fused=True)
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_the_average_follows_the_network_by_its_formula() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    average = WeightAverage(network, decay=0.5)
    expected = {name: x.clone().double() for name, x in network.state_dict().items()}
    for t, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5)):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape))
        network(torch.randn(4, 1, 3, 3))
        average.set_step(t)
        average.update()
        for name, x in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * x
    averaged = average.network.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(averaged[name], expected[name].float())
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
