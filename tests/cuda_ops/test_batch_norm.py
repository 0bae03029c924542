"""``batch_norm`` and ``relu_conv_bn`` of the CUDA tier against modules: fp64, kernels in plain PyTorch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.core.operations import ReLUConvBN
from neuroexapt.cuda_ops import batch_norm as ext
from tests.cuda_ops import torch_kernels


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double)


def results(function, bn: nn.BatchNorm2d, x: Tensor) -> list[Tensor]:
    """Output, gradient and buffers after one pass."""
    bn, leaf = copy.deepcopy(bn), x.clone().requires_grad_()
    y = function(leaf, bn)
    (grad,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), leaf)
    return [y.detach(), grad, *bn.buffers()]


def test_matches_the_module():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4, affine=False).double()
    x = 3 * randn(3, 4, 5, 2) + 7
    expected = results(lambda x, bn: bn(x), bn, x)
    actual = results(lambda x, bn: ext.run(x, bn, torch_kernels), bn, x)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_a_convolution_before_it_matches_the_modules(wants):
    torch.manual_seed(0)
    expected_op = ReLUConvBN(6, 4, 1, affine=False).double().op
    op, x, g = copy.deepcopy(expected_op), randn(3, 6, 5, 2), randn(3, 4, 5, 2)
    leaf = x.clone().requires_grad_(wants[0])
    for layer in (op, expected_op):
        layer[1].weight.requires_grad_(wants[1])
    y, expected = ext.run_relu_conv_bn(leaf, op, torch_kernels), expected_op(leaf)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    leaves = [(leaf, leaf), (op[1].weight, expected_op[1].weight)]
    leaves = [pair for pair, want in zip(leaves, wants, strict=True) if want]
    actual = torch.autograd.grad(y, [got for got, _ in leaves], g)
    wanted = torch.autograd.grad(expected, [right for _, right in leaves], g)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op.state_dict(), expected_op.state_dict(), rtol=1e-12, atol=1e-12)


def hooked() -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(16, affine=False)
    bn.register_forward_hook(lambda *_: None)
    return bn


@pytest.mark.parametrize(
    ("x", "bn", "reason"),
    [
        (torch.zeros(2, 16, 4, 4), nn.BatchNorm2d(16, affine=False), ""),
        (torch.zeros(2, 16, 4, 4).double(), nn.BatchNorm2d(16, affine=False), "only fp32"),
        (torch.zeros(2, 16, 4, 4).transpose(2, 3), nn.BatchNorm2d(16, affine=False), "not contiguous"),
        (torch.zeros(2, 16, 4, 4), nn.BatchNorm2d(16), "affine"),
        (torch.zeros(2, 16, 4, 4), nn.BatchNorm2d(16, affine=False).eval(), "evaluation mode"),
        (torch.zeros(1, 16, 1, 1), nn.BatchNorm2d(16, affine=False), "no two values"),
        (torch.zeros(2, 16, 4, 4), hooked(), "hooks"),
    ],
)
def test_says_what_it_takes(x, bn, reason):
    support = ext.supports(x, bn)
    assert support.ok == (not reason)
    assert reason in support.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"kernel_size": 3}, "only 1x1"),
        ({"stride": 2}, "only 1x1"),
        ({"bias": True}, "bias"),
        ({"out_channels": 20}, "16 to 20 channels"),
    ],
)
def test_says_which_convolutions_it_takes(change, reason):
    options = {"in_channels": 16, "out_channels": 16, "kernel_size": 1, "bias": False} | change
    bn = nn.BatchNorm2d(options["out_channels"], affine=False)
    op = nn.Sequential(nn.ReLU(), nn.Conv2d(**options), bn)
    support = ext.supports_relu_conv_bn(torch.zeros(2, 16, 4, 4), op)
    assert support.ok == (not reason)
    assert reason in support.reason
