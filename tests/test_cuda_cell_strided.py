"""The convolution stages of a reduction cell in CUDA C++ against fp64; without a GPU, their compilation."""

import re

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.cuda_ops import cell_kernels
from neuroexapt.cuda_ops.cell_kernels import Conv
from tests.cuda_compilation import assembler_report, needs_nvcc
from tests.cuda_ops import torch_kernels

gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("nan_filled_empty")

# Batch, channels, height, width of a state: a network's own; then pictures that do not fill their tiles.
SHAPES = [
    (64, 32, 32, 32),
    (64, 64, 16, 16),
    (8, 16, 32, 32),
    (2, 16, 7, 8),
    (3, 32, 19, 40),
    (2, 64, 5, 24),
    (1, 32, 1, 8),
]
KINDS = [(3, 1), (5, 1), (3, 2), (5, 2)]


def make_convs(shape: tuple[int, ...], count: int) -> list[Conv]:
    """``count`` convolutions of each of two states, whose pictures lie apart."""
    torch.manual_seed(0)
    channels, convs = shape[1], []
    for _ in range(2):
        x = torch.randn(shape[0], 2 * channels, *shape[2:], device="cuda")[:, channels:]
        x[0, 0, 0, :2] = 0  # where the gradient of the relu is 0
        for i in range(count):
            size, dilation = KINDS[i % 4]
            depthwise = torch.randn(channels, 1, size, size, device="cuda") / size
            pointwise = torch.randn(channels, channels, 1, 1, device="cuda") / channels**0.5
            convs.append(Conv(x, None, depthwise, pointwise, dilation, 2))
    return convs


def in_double(thing):
    if isinstance(thing, Tensor):
        return thing.double()
    return type(thing)(*map(in_double, thing)) if isinstance(thing, tuple) else thing


def assert_close(got: Tensor, wanted: Tensor, exact: bool) -> None:
    assert (got.double() - wanted).norm() <= (2e-6 if exact else 2e-3) * wanted.norm()


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 6, 16])
@pytest.mark.parametrize("exact", [True, False])
def test_forward_matches_fp64(shape, count, exact):
    convs = make_convs(shape, count)
    zs, moments = cell_kernels.convolve(convs, exact)
    expected, _ = torch_kernels.convolve([in_double(conv) for conv in convs], exact)
    for z, wanted in zip(zs, expected, strict=True):
        assert_close(z, wanted, exact)
    bns = [nn.BatchNorm2d(shape[1], affine=False, device="cuda") for _ in zs]
    stats = cell_kernels.statistics(bns, moments, True)
    expected_stats = cell_kernels.statistics(bns, cell_kernels.plane_moments(zs), True)
    for got, wanted in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_keeps_everything_in_registers(tmp_path, arch):
    report = assembler_report("cell_strided_forward.cu", arch, tmp_path)
    frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    assert len(frames) == 6  # 16, 32 and 64 channels, both precisions
    assert not any(frames)
