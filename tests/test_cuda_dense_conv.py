"""Dense convolutions in CUDA C++ against fp64; without a GPU, their compilation."""

import copy
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.core.cells import SearchCell
from neuroexapt.core.plan import plan_cell
from neuroexapt.cuda_ops import cell as fused
from neuroexapt.cuda_ops import cell_kernels
from neuroexapt.cuda_ops.branch import NoBranch
from neuroexapt.cuda_ops.cell_operands import DenseGrad
from tests.cuda_compilation import assembler_report, needs_nvcc
from tests.cuda_ops import torch_kernels
from tests.cuda_ops.test_cell import make_cell_of_one_input

gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("nan_filled_empty")

# Batch, channels, height, width: a network's own; then pictures smaller than a tile, pictures of several
# tiles, and small pictures of a large batch.
SHAPES = [
    (64, 16, 32, 32),
    (64, 32, 16, 16),
    (64, 64, 8, 8),
    (3, 16, 7, 12),
    (1, 32, 3, 4),
    (2, 64, 17, 20),
    (5, 16, 10, 68),
    (130, 32, 4, 4),
]
KERNEL_SIZES = (3, 1, 3, 1, 1, 3)  # of the convolutions of one state
# Tensor cores cut off what their sums do not hold, of 576 products at most 216 times.
TOLERANCES = {"fp32": 5e-6, "tf32": 1e-3, "bf16": 4e-3}
"""Relative, by what pictures are stored in and the products' grade."""


class Case(NamedTuple):
    """An input, whose pictures do not follow each other, and weights that leave the variance as it is."""

    x: Tensor
    weights: list[Tensor]


def make_case(shape: tuple[int, ...], grade: str, kernel_sizes: tuple[int, ...] = KERNEL_SIZES) -> Case:
    torch.manual_seed(0)
    x, channels = strided(shape, torch.bfloat16 if grade == "bf16" else torch.float32), shape[1]
    x[0, 0, 0, :2] = 0  # where the gradient of the relu is 0
    weights = [torch.randn(channels, channels, size, size, device="cuda") for size in kernel_sizes]
    return Case(x, [weight / (channels * weight[0, 0].numel()) ** 0.5 for weight in weights])


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = shape
    return torch.randn(batch, 2 * channels, height, width, device="cuda").to(dtype)[:, channels:]


def make_grads(case: Case) -> list[DenseGrad]:
    zs, _ = cell_kernels.convolve_dense(*case, exact=True)
    channels = case.x.shape[1]
    return [
        DenseGrad(weight, z, strided(z.shape, z.dtype), torch.randn(channels, 4, device="cuda"))
        for weight, z in zip(case.weights, zs, strict=True)
    ]


def in_doubles(grads: list[DenseGrad]) -> list[DenseGrad]:
    return [DenseGrad(*(tensor.double() for tensor in grad if tensor is not None)) for grad in grads]


def assert_close(got: Tensor, wanted: Tensor, grade: str) -> None:
    assert (got.double() - wanted).norm() <= TOLERANCES[grade] * wanted.norm()


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grade", TOLERANCES)
def test_forward_matches_fp64(shape, grade):
    exact, (x, weights) = grade == "fp32", make_case(shape, grade)
    zs, moments = cell_kernels.convolve_dense(x, weights, exact)
    expected, _ = torch_kernels.convolve_dense(x.double(), [weight.double() for weight in weights], exact)
    for z, wanted in zip(zs, expected, strict=True):
        assert z.dtype == x.dtype
        assert_close(z, wanted, grade)
    ours, theirs = ([nn.BatchNorm2d(shape[1], affine=False, device="cuda") for _ in zs] for _ in range(2))
    stats = cell_kernels.statistics(ours, moments, True)
    right = cell_kernels.statistics(theirs, cell_kernels.plane_moments(zs), True)
    close = {"rtol": 2e-2, "atol": 2e-3} if grade == "bf16" else {"rtol": 1e-5, "atol": 1e-6}  # z is rounded
    torch.testing.assert_close(stats, right, **close)
    for bn, wanted_bn in zip(ours, theirs, strict=True):
        torch.testing.assert_close(bn.state_dict(), wanted_bn.state_dict(), **close)


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grade", TOLERANCES)
@pytest.mark.parametrize("wants_weights", [True, False])
def test_backward_matches_fp64(shape, grade, wants_weights):
    exact, case = grade == "fp32", make_case(shape, grade)
    grads = make_grads(case)
    dxs, partials = cell_kernels.backward_dense(case.x, grads, exact, wants_weights, NoBranch())
    expected = torch_kernels.backward_dense(
        case.x.double(), in_doubles(grads), exact, wants_weights, NoBranch()
    )
    assert_close(sum(dx.double() for dx in dxs), sum(expected[0]), grade)
    for partial, wanted in zip(partials, expected[1], strict=True):
        assert_close(partial.sum(0), wanted.sum(0), grade)


@gpu
@pytest.mark.parametrize("kernel_sizes", [(1,), (3,), (1, 3)])
def test_one_and_two_convolutions(kernel_sizes):
    case = make_case((2, 32, 8, 8), "fp32", kernel_sizes)
    grads = make_grads(case)
    dxs, _ = cell_kernels.backward_dense(case.x, grads, True, False, NoBranch())
    (wanted, *others), _ = torch_kernels.backward_dense(
        case.x.double(), in_doubles(grads), True, False, NoBranch()
    )
    assert_close(sum(dxs), sum(others, wanted), "fp32")


@gpu
def test_lets_nan_through_the_relu():
    x, weights = make_case((2, 16, 8, 8), "fp32", (1, 3))
    x[1, 3, 2, 2] = float("nan")
    zs, _ = cell_kernels.convolve_dense(x, weights, True)
    expected, _ = torch_kernels.convolve_dense(x, weights, True)
    for z, wanted in zip(zs, expected, strict=True):
        assert torch.equal(z.isnan(), wanted.isnan())


@gpu
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("grade", ["tf32", "bf16"])
def test_twenty_runs_give_the_same_bits(shape, grade):
    case = make_case(shape, grade)
    grads = make_grads(case)

    def run() -> list[Tensor]:
        zs, moments = cell_kernels.convolve_dense(*case, exact=False)
        dxs, partials = cell_kernels.backward_dense(case.x, grads, False, True, NoBranch())
        return [*zs, *moments, *dxs, *partials]

    first = run()
    for _ in range(19):
        assert all(torch.equal(got, wanted) for got, wanted in zip(run(), first, strict=True))


@gpu
@pytest.mark.parametrize("shape", [(4, 16, 8, 8), (3, 32, 7, 6)])
def test_a_cell_of_nas_bench_201(shape, exact_products):
    batch, channels, height, width = shape
    cell, (x, weights) = make_cell_of_one_input(channels, (batch, height, width))

    def results(cell: SearchCell, x: Tensor, weights: Tensor, kernels: Any) -> list[Tensor]:
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = fused.run(plan_cell(cell), [x], weights, kernels)
        gradients = torch.autograd.grad(y.square().sum(), [x, weights, *cell.edges.parameters()])
        return [y.detach(), *gradients, *(buffer.double() for buffer in cell.edges.buffers())]

    expected = results(copy.deepcopy(cell), x, weights, torch_kernels)
    on_gpu = [operand.float().cuda() for operand in (x, weights)]
    got = results(cell.float().cuda(), *on_gpu, cell_kernels)
    for actual, wanted in zip(got, expected, strict=True):
        assert (actual.cpu().double() - wanted).norm() <= 1e-4 * wanted.norm().clamp(min=1e-3)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_keeps_nearly_everything_in_registers(tmp_path, arch):
    report = assembler_report("dense_conv.cu", arch, tmp_path)
    frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    assert len(frames) == 27  # 16, 32 and 64 channels, three grades, three kernels
    assert max(frames) <= 96
