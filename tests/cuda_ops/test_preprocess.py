"""A cell's preprocessing on the CUDA tier against the modules, in fp64 with kernels in plain PyTorch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.core.operations import FactorizedReduce, ReLUConvBN
from neuroexapt.cuda_ops import preprocess as ext
from tests.cuda_ops import torch_kernels


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double)


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("run", "expected_op"),
    [
        (ext.run_relu_conv_bn, ReLUConvBN(6, 4, 1, affine=False).double().op),
        (ext.run_factorized_reduce, FactorizedReduce(6, 4, affine=False).double()),
    ],
)
def test_convolutions_before_it_match_the_modules(run, expected_op, wants):
    torch.manual_seed(0)
    op, x = copy.deepcopy(expected_op), randn(3, 6, 5, 2).requires_grad_(wants[0])
    for parameter in (*op.parameters(), *expected_op.parameters()):
        parameter.requires_grad_(wants[1])
    y, expected = run(x, op, torch_kernels), expected_op(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = randn(*y.shape)
    for got, right in ((x, x), *zip(op.parameters(), expected_op.parameters(), strict=True)):
        if got.requires_grad:
            (actual,) = torch.autograd.grad(y, got, g, retain_graph=True)
            (wanted,) = torch.autograd.grad(expected, right, g, retain_graph=True)
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op.state_dict(), expected_op.state_dict(), rtol=1e-12, atol=1e-12)


def hooked() -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(16, affine=False)
    bn.register_forward_hook(lambda *_: None)
    return bn


@pytest.mark.parametrize(
    ("x", "bn", "reason"),
    [
        (torch.zeros(2, 16, 4, 4).double(), nn.BatchNorm2d(16, affine=False), "only fp32"),
        (torch.zeros(2, 16, 4, 4).transpose(2, 3), nn.BatchNorm2d(16, affine=False), "not contiguous"),
        (torch.zeros(2, 16, 4, 4), nn.BatchNorm2d(16), "affine"),
        (torch.zeros(2, 16, 4, 4), nn.BatchNorm2d(16, affine=False).eval(), "evaluation mode"),
        (torch.zeros(1, 16, 1, 1), nn.BatchNorm2d(16, affine=False), "no two values"),
        (torch.zeros(2, 16, 4, 4), hooked(), "hooks"),
    ],
)
def test_says_which_inputs_and_batch_norms_it_takes(x, bn, reason):
    op = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False), bn)
    support = ext.supports_relu_conv_bn(x, op)
    assert not support.ok
    assert reason in support.reason


@pytest.mark.parametrize("moved", [1, 2])
def test_takes_no_modules_on_another_device(moved):
    op = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16, affine=False))
    op[moved].to("meta")
    assert "several devices" in ext.supports_relu_conv_bn(torch.zeros(2, 16, 4, 4), op).reason


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


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(2, 16, 4, 4), ""),
        (torch.zeros(2, 16, 4, 4).double(), "only fp32"),
        (torch.zeros(1, 16, 2, 2), "too few pixels"),
    ],
)
def test_says_which_reductions_it_takes(x, reason):
    support = ext.supports_factorized_reduce(x, FactorizedReduce(16, 16, affine=False))
    assert support.ok == (not reason)
    assert reason in support.reason
