"""``batch_norm`` of the CUDA tier against PyTorch's, in fp64 with kernels in plain PyTorch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.cuda_ops import batch_norm as ext
from tests.cuda_ops import torch_kernels


def results(function, bn: nn.BatchNorm2d, x: Tensor) -> list[Tensor]:
    """Output, gradient and buffers after one pass."""
    bn, leaf = copy.deepcopy(bn), x.clone().requires_grad_()
    y = function(leaf, bn)
    (grad,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), leaf)
    return [y.detach(), grad, *bn.buffers()]


def test_matches_the_module():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4, affine=False).double()
    x = 3 * torch.randn(3, 4, 5, 2, dtype=torch.double) + 7
    expected = results(lambda x, bn: bn(x), bn, x)
    actual = results(lambda x, bn: ext.run(x, bn, torch_kernels), bn, x)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


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
