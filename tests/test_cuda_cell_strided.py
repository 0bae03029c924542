"""The convolution stages of a reduction cell in CUDA C++ against fp64; without a GPU, their compilation."""

import re
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.cuda_ops import cell_kernels
from neuroexapt.cuda_ops.cell_operands import Conv, ConvGrad
from tests.cuda_compilation import assembler_report, needs_nvcc
from tests.cuda_ops import torch_kernels

gpu = pytest.mark.gpu
# Calls that the kernels leave to PyTorch are exact in both cases.
pytestmark = pytest.mark.usefixtures("nan_filled_empty", "exact_products")

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
TOLERANCES = {"fp32": 2e-6, "tf32": 2e-3, "bf16": 4e-3}
"""Relative, by what pictures are stored in and the products' grade."""


def stored_in(grade: str) -> torch.dtype:
    return torch.bfloat16 if grade == "bf16" else torch.float32


def make_convs(shape: tuple[int, ...], count: int, grade: str) -> list[Conv]:
    """``count`` convolutions of each of two states, whose pictures lie apart."""
    torch.manual_seed(0)
    channels, convs = shape[1], []
    for _ in range(2):
        x = torch.randn(shape[0], 2 * channels, *shape[2:], device="cuda").to(stored_in(grade))[:, channels:]
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


def assert_close(got: Tensor, wanted: Tensor, grade: str) -> None:
    assert (got.double() - wanted).norm() <= TOLERANCES[grade] * wanted.norm()


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 6, 16])
@pytest.mark.parametrize("grade", TOLERANCES)
def test_forward_matches_fp64(shape, count, grade):
    exact, convs = grade == "fp32", make_convs(shape, count, grade)
    zs, moments = cell_kernels.convolve(convs, exact)
    expected, _ = torch_kernels.convolve([in_double(conv) for conv in convs], exact)
    for z, wanted in zip(zs, expected, strict=True):
        assert z.dtype == stored_in(grade)
        assert_close(z, wanted, grade)
    bns = [nn.BatchNorm2d(shape[1], affine=False, device="cuda") for _ in zs]
    stats = cell_kernels.statistics(bns, moments, True)
    # Of z before it is rounded to bf16, which by itself may move 1 / σ of four values by 2 %.
    of_z = [z.float() for z in expected] if grade == "bf16" else zs
    close = {"rtol": 1e-2, "atol": 1e-3} if grade == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    expected_stats = cell_kernels.statistics(bns, cell_kernels.plane_moments(of_z), True)
    for got, wanted in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(got, wanted, **close)


def make_grads(shape: tuple[int, ...], count: int, grade: str) -> list[list[ConvGrad]]:
    convs, dtype = make_convs(shape, count, grade), stored_in(grade)
    batch, channels, height, width = shape
    out = (-(-height // 2), width // 2)
    grads = [
        ConvGrad(
            conv,
            torch.randn(batch, channels, *out, device="cuda").to(dtype),
            torch.randn(batch, 2 * channels, *out, device="cuda").to(dtype)[:, :channels],
            torch.randn(channels, 4, device="cuda"),
        )
        for conv in convs
    ]
    return [grads[:count], grads[count:]]


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 6, 16])
@pytest.mark.parametrize("grade", TOLERANCES)
@pytest.mark.parametrize("wants_weights", [True, False])
def test_backward_matches_fp64(shape, count, grade, wants_weights):
    exact, grads = grade == "fp32", make_grads(shape, count, grade)
    dxs, partials = cell_kernels.backward_first(grads, exact, wants_weights)
    doubles = [[in_double(grad) for grad in of_state] for of_state in grads]
    expected_dxs, expected = torch_kernels.backward_first(doubles, exact, wants_weights)
    for addends, expected_addends in zip(dxs, expected_dxs, strict=True):
        assert_close(torch.stack(addends).double().sum(0), torch.stack(expected_addends).sum(0), grade)
    assert bool(partials.depthwise) == bool(partials.pointwise) == wants_weights
    for got, wanted in zip(chain(*partials), chain(*expected), strict=True):
        assert_close(got.sum(0), wanted.sum(0), grade)


@gpu
@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("grade", ["tf32", "bf16"])
def test_twenty_runs_give_the_same_bits(shape, grade):
    grads = make_grads(shape, 16, grade)

    def run() -> list[Tensor]:
        zs, moments = cell_kernels.convolve([grad.conv for of_state in grads for grad in of_state], False)
        dxs, partials = cell_kernels.backward_first(grads, False, True)
        return [*zs, *moments, *chain(*dxs), *chain(*partials)]

    first = run()
    for _ in range(19):
        assert all(torch.equal(got, wanted) for got, wanted in zip(run(), first, strict=True))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("direction", "most"), [("forward", 0), ("backward", 64)])
def test_keeps_nearly_everything_in_registers(tmp_path, arch, direction, most):
    report = assembler_report(f"cell_strided_{direction}.cu", arch, tmp_path)
    frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    assert len(frames) == 9  # 16, 32 and 64 channels, three grades
    assert max(frames) <= most
