import pytest
import torch
from torch import nn

from neuroexapt.engine.device import place

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "expected"), [("fp32", True), ("bf16", False)])
def test_a_network_on_the_cpu_is_channels_last_but_in_bf16(precision: str, expected: bool) -> None:
    weight = place(nn.Conv2d(4, 4, 3), CPU, precision=precision).weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_on_the_cpu_are_right(precision: str) -> None:
    """Of a dilated depthwise convolution: PyTorch gets them wrong in bf16 and channels-last."""
    torch.manual_seed(0)
    dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), dilated), torch.randn(2, 3, 32, 32)
    (expected,) = torch.autograd.grad(network(x).square().sum(), dilated.weight)
    place(network, CPU, precision=precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y = network(x)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), dilated.weight)
    assert (gradient - expected).norm() <= 1e-2 * expected.norm()
