"""1x1 convolutions in CUDA C++ against fp64; without a GPU, their compilation and what they take."""

import re

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.cuda_ops import cell_kernels, pointwise
from tests.cuda_compilation import assembler_report, needs_nvcc
from tests.cuda_ops import torch_kernels

gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("nan_filled_empty")

# Batch, channels in and out, height, width: a network's own; then few pixels, one quad, all counts of output
# tiles, pictures that tiles straddle, more channels than all warps of a block hold.
SHAPES = [
    (64, 64, 16, 32, 32),
    (64, 128, 32, 16, 16),
    (64, 256, 64, 8, 8),
    (3, 48, 16, 7, 12),
    (1, 16, 24, 1, 4),
    (5, 32, 8, 4, 5),
    (40, 16, 40, 6, 6),
    (2, 1024, 64, 10, 10),
]


TOLERANCES = {"fp32": 1e-6, "tf32": 1e-3, "bf16": 3e-3}
"""Relative, by what pictures are stored in and the products' grade."""


def operands(shape: tuple[int, ...], grade: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    batch, channels, out_channels, height, width = shape
    x = torch.randn(batch, channels, height, width, device="cuda")
    x[0, 0, 0, :2] = 0  # where the gradient of the relu is 0
    x = x.to(torch.bfloat16 if grade == "bf16" else torch.float32)
    return x, torch.randn(out_channels, channels, 1, 1, device="cuda") / channels**0.5


def assert_close(got: Tensor, wanted: Tensor, grade: str) -> None:
    assert (got.double() - wanted).norm() <= TOLERANCES[grade] * wanted.norm()


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grade", TOLERANCES)
def test_forward_matches_fp64(shape, grade):
    exact, (x, weight) = grade == "fp32", operands(shape, grade)
    z, moments = cell_kernels.multiply(x, weight, exact)
    expected, _ = torch_kernels.multiply(x.double(), weight.double(), exact)
    assert z.dtype == x.dtype
    assert_close(z, expected, grade)
    bns = [nn.BatchNorm2d(shape[2], affine=False, device="cuda") for _ in range(2)]
    (stats,) = cell_kernels.statistics(bns[:1], [moments], True)
    (wanted,) = cell_kernels.statistics(bns[1:], cell_kernels.plane_moments([z]), True)
    close = {"rtol": 2e-2, "atol": 2e-3} if grade == "bf16" else {"rtol": 1e-5, "atol": 1e-6}  # z is rounded
    torch.testing.assert_close(stats, wanted, **close)
    torch.testing.assert_close(bns[0].state_dict(), bns[1].state_dict(), **close)


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grade", TOLERANCES)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_backward_matches_fp64(shape, grade, wanted):
    exact, (x, weight) = grade == "fp32", operands(shape, grade)
    z, _ = cell_kernels.multiply(x, weight, exact)
    g = torch.cat([torch.randn_like(z)] * 2, dim=1)[:, : z.shape[1]]
    coef = torch.randn(shape[2], 4, device="cuda")
    in_doubles = (x.double(), weight.double(), z.double(), g.double(), coef.double())
    expected = torch_kernels.backward_multiply(*in_doubles, exact, (True, True))
    actual = cell_kernels.backward_multiply(x, weight, z, g, coef, exact, wanted)
    for got, right, want in zip(actual, expected, wanted, strict=True):
        assert (got is not None) == want
        if got is not None and right is not None:
            assert_close(got, right, grade)


@gpu
@pytest.mark.parametrize("grade", TOLERANCES)
def test_lets_nan_through_the_relu(grade):
    x, weight = operands((2, 16, 8, 4, 4), grade)
    x[1, 3, 2, 2] = float("nan")
    z, _ = cell_kernels.multiply(x, weight, grade == "fp32")
    assert torch.equal(z.isnan().any(dim=1), x.isnan().any(dim=1))


@gpu
@pytest.mark.parametrize("grade", ["tf32", "bf16"])
def test_twenty_runs_give_the_same_bits(grade):
    x, weight = operands(SHAPES[0], grade)

    def run() -> list[Tensor]:
        z, moments = cell_kernels.multiply(x, weight, False)
        coef = weight.new_ones(z.shape[1], 4)
        gradients = cell_kernels.backward_multiply(x, weight, z, z, coef, False, (True, True))
        return [z, moments, *(gradient for gradient in gradients if gradient is not None)]

    first = run()
    for _ in range(19):
        assert all(torch.equal(got, wanted) for got, wanted in zip(run(), first, strict=True))


@pytest.mark.parametrize(
    ("shape", "out_channels", "stride", "reason"),
    [
        ((2, 48, 7, 12), 8, 1, ""),
        ((2, 40, 4, 4), 16, 1, "40 to 16 channels"),
        ((2, 16, 4, 4), 12, 1, "16 to 12 channels"),
        ((2, 16, 4, 4), 72, 1, "16 to 72 channels"),
        ((2, 16, 3, 3), 16, 1, "3 x 3 pixels"),
        ((2, 16, 7, 8), 16, 2, ""),
        ((2, 16, 8, 12), 16, 2, "8 x 12 pixels"),
    ],
)
def test_says_what_it_takes(shape, out_channels, stride, reason):
    support = pointwise.takes(torch.zeros(shape), torch.zeros(out_channels, shape[1], 1, 1), stride)
    assert support.ok == (not reason)
    assert reason in support.reason


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_keeps_nearly_everything_in_registers(tmp_path, arch):
    report = assembler_report("pointwise.cu", arch, tmp_path)
    frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    assert len(frames) == 36  # both ways: 16, 32 and 64 output channels, both strides, three grades
    assert max(frames) <= 32
