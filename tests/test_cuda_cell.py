"""The fused cell in CUDA C++ against fp64: each kernel, then whole cells; without a GPU, its compilation."""

import copy
import itertools
import math
import re

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.backend.dispatch import explain
from neuroexapt.backend.registry import use_backend
from neuroexapt.core.cells import SearchCell
from neuroexapt.core.operations import FactorizedReduce, ReLUConvBN
from neuroexapt.core.plan import plan_cell
from neuroexapt.cuda_ops import cell as fused
from neuroexapt.cuda_ops import cell_kernels, preprocess
from neuroexapt.cuda_ops.build import SOURCES
from neuroexapt.cuda_ops.cell_operands import (
    Conv,
    ConvGrad,
    PoolGrad,
    Pooling,
    ReduceGrad,
    StateGrad,
    Summand,
)
from tests.cuda_compilation import assembler_report, needs_nvcc
from tests.cuda_ops import torch_kernels
from tests.cuda_ops.test_cell import (
    draw,
    drawn_by_values,  # noqa: F401
    make_cell,
    make_cell_of_one_input,
    make_edge,
    make_edge_inputs,
    make_inputs,
    run_edge_reference,
    sixteen_operations,
)
from tests.fused_cells import (
    assert_as_good_as_eager,
    assert_bf16_is_as_good_as_autocast,
    assert_products_are_tf32,
    assert_runs_inside_a_cuda_graph,
    assert_takes_one_input,
    assert_twenty_runs_give_the_same_bits,
    cell_on_gpu,
    error,
    exact_to_fp32,
    run_edge,
)

gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("nan_filled_empty")

# Wide and narrow accesses, several planes a block and several blocks a plane.
SHAPES = [(64, 16, 32, 32), (64, 64, 8, 8), (3, 32, 7, 9), (1, 16, 1, 3), (2, 5, 40, 64), (130, 3, 2, 2)]
CONV_SHAPES = [
    (64, 16, 32, 32),
    (16, 32, 16, 16),
    (5, 64, 8, 8),
    (2, 16, 7, 9),
    (1, 32, 19, 33),
    (1, 64, 1, 2),
]
TOLERANCE, ROUNDED = 1e-5, 3e-3
"""Relative, in the Euclidean norm: of what is kept in fp32, and of what is rounded to bf16."""
GRADES = {"fp32": TOLERANCE, "tf32": 2e-3, "bf16": 4e-3}
"""Tolerances of convolutions by what pictures are stored in and the products' grade."""


def stored_in(grade: str) -> torch.dtype:
    return torch.bfloat16 if grade == "bf16" else torch.float32


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A part of a wider tensor's channels, as a node is of its cell's output."""
    batch, channels, height, width = shape
    return randn(batch, 3 * channels, height, width, dtype=dtype)[:, channels : 2 * channels]


def stats(channels: int) -> Tensor:
    return torch.stack([randn(channels), torch.rand(channels, device="cuda") + 0.5], 1)


def coef(channels: int) -> Tensor:
    values = randn(channels, 4)
    values[:, 3] = 0
    return values


def exact(thing):
    """The same in fp64, inside any tuples and lists."""
    if isinstance(thing, Tensor):
        return thing.double() if thing.is_floating_point() else thing
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*map(exact, thing))
    if isinstance(thing, (list, tuple)):
        return type(thing)(map(exact, thing))
    return thing


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert error(got, wanted) < max(tolerance, ROUNDED if got.dtype == torch.bfloat16 else 0.0)


def assert_all_close(got: list[Tensor], wanted: list[Tensor], tolerance: float = TOLERANCE) -> None:
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        assert_close(g, w, tolerance)


def batch_norms(channels: int, count: int) -> list[nn.BatchNorm2d]:
    bns = [nn.BatchNorm2d(channels, affine=False, device="cuda") for _ in range(count)]
    for bn in bns:
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bns


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_moments_and_statistics(shape, training, stored):
    zs = [5 * strided(*shape, dtype=stored) + 100, randn(*shape, dtype=stored)]
    bns = batch_norms(shape[1], 2)
    expected_bns = [nn.BatchNorm2d(shape[1], affine=False, device="cuda").double() for _ in bns]
    for expected_bn, bn in zip(expected_bns, bns, strict=True):
        expected_bn.load_state_dict(bn.state_dict())
    actual = cell_kernels.statistics(bns, cell_kernels.plane_moments(zs), training)
    expected = torch_kernels.statistics(expected_bns, torch_kernels.plane_moments(exact(zs)), training)
    assert_all_close(actual, expected)
    for bn, expected_bn in zip(bns, expected_bns, strict=True):
        for got, wanted in zip(bn.buffers(), expected_bn.buffers(), strict=True):
            assert_close(got, wanted.double())


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kinds", [{"max", "avg"}, {"max"}, {"avg"}])
def test_pools(shape, stride, kinds, stored):
    xs = [strided(*shape, dtype=stored), randn(*shape, dtype=stored), strided(*shape, dtype=stored)]
    zs, moments = cell_kernels.pool(xs, stride, kinds)
    expected, _ = torch_kernels.pool(exact(xs), stride, kinds)
    for got_z, got_moments, wanted_z in zip(zs, moments, expected, strict=True):
        assert got_z.keys() == kinds
        for kind in kinds:
            assert got_z[kind].dtype == stored
            assert_close(got_z[kind], wanted_z[kind])
            bns = batch_norms(shape[1], 1)
            (got,) = cell_kernels.statistics(bns, [got_moments[kind]], True)
            bns[0].double()
            (wanted,) = torch_kernels.statistics(bns, torch_kernels.plane_moments([wanted_z[kind]]), True)
            assert_close(got, wanted)


@gpu
def test_pools_let_nan_and_infinity_through():
    x = randn(2, 16, 8, 8)
    x[0, 1, 3, 3], x[1, 2, 0, 0], x[1, 3] = float("nan"), float("inf"), -float("inf")
    (zs,), _ = cell_kernels.pool([x], 1, {"max", "avg"})
    (expected,), _ = torch_kernels.pool([exact(x)], 1, {"max", "avg"})
    for kind, z in zs.items():
        torch.testing.assert_close(z.double(), expected[kind], equal_nan=True, rtol=1e-5, atol=1e-6)


def summands(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Summand]:
    """Terms with statistics, without, and of weight 1."""
    channels = shape[1]
    entries = [(k // 4, k % 4) for k in range(count)]
    terms = [
        Summand((strided if k % 3 else randn)(*shape, dtype=dtype), stats(channels), entries[k])
        for k in range(count)
    ]
    return [term._replace(stats=None) if k % 5 == 4 else term for k, term in enumerate(terms)]


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 7, 35])
def test_sum_of_a_node(shape, count, stored):
    weights = randn(10, 4)
    terms = [*summands(shape, count, stored), Summand(randn(*shape, dtype=stored), None, None)]
    y, expected = strided(*shape, dtype=stored), exact(strided(*shape))
    cell_kernels.add_up(terms, weights, y)
    torch_kernels.add_up(exact(terms), exact(weights), expected)
    assert_close(y, expected)


@gpu
def test_sum_of_nothing_is_zero(stored):
    y = strided(2, 16, 4, 4, dtype=stored)
    cell_kernels.add_up([], randn(1, 1), y)
    assert torch.equal(y, torch.zeros_like(y))


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 7, 35])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants_weights", [True, False])
def test_backward_of_a_sum(shape, count, training, wants_weights, stored):
    weights, g, terms = randn(10, 4), strided(*shape, dtype=stored), summands(shape, count, stored)
    grad, expected_grad = torch.zeros_like(weights), exact(torch.zeros_like(weights))
    wanted = (grad, expected_grad) if wants_weights else (None, None)
    actual = cell_kernels.backward_add_up(terms, weights, g, wanted[0], training)
    expected = torch_kernels.backward_add_up(exact(terms), exact(weights), exact(g), wanted[1], training)
    scale = torch.stack(expected).norm(dim=(0, 1))  # A, B and D differ in size
    for got, right in zip(actual, expected, strict=True):
        assert ((got.double() - right).norm(dim=0) <= 1e-4 * scale).all()
    assert (grad.double() - expected_grad).norm() <= 1e-4 * expected_grad.norm()


@gpu
@pytest.mark.usefixtures("drawn_by_values")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 7, 35])
def test_backward_of_a_sum_of_what_was_drawn(shape, count, stored):
    """Weights of what was not drawn, and of what is nothing, have the gradient of a constant."""
    weights, g, terms = draw(randn(10, 4), 0), strided(*shape, dtype=stored), summands(shape, count, stored)
    nothing = [(9, k) for k in range(4)]
    grad, expected_grad = torch.zeros_like(weights), exact(torch.zeros_like(weights))
    actual = cell_kernels.backward_add_up(terms, weights, g, grad, True, True, nothing)
    expected = torch_kernels.backward_add_up(
        exact(terms), exact(weights), exact(g), expected_grad, True, True, nothing
    )
    for got, right in zip(actual, expected, strict=True):
        assert (got.double() - right).norm() <= 1e-4 * right.norm()
    assert (grad.double() - expected_grad).norm() <= 1e-4 * expected_grad.norm()


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", [("max", "avg"), ("max",), ("avg",)])
def test_backward_of_a_sum_forms_pools_again(shape, kinds, stored):
    batch, channels, height, width = shape
    weights, g, terms = randn(10, 4), strided(*shape, dtype=stored), summands(shape, 6, stored)
    grad, expected_grad = torch.zeros_like(weights), exact(torch.zeros_like(weights))
    for edge, stride in ((5, 1), (6, 2), (7, 1)):
        x = strided(batch, channels, stride * height, stride * width, dtype=stored)
        terms += [
            Summand(x, None if edge == 7 else stats(channels), (edge, column), Pooling(kind, stride))
            for column, kind in enumerate(kinds)
        ]
    actual = cell_kernels.backward_add_up(terms, weights, g, grad, True)
    expected = torch_kernels.backward_add_up(exact(terms), exact(weights), exact(g), expected_grad, True)
    scale = torch.stack(expected).norm(dim=(0, 1))
    for got, right in zip(actual, expected, strict=True):
        assert ((got.double() - right).norm(dim=0) <= 1e-4 * scale).all()
    assert (grad.double() - expected_grad).norm() <= 1e-4 * expected_grad.norm()


@gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_gradients(shape, stored):
    gs, zs = [[strided(*shape, dtype=stored), randn(*shape, dtype=stored)] for _ in range(2)]
    zs.reverse()
    coefs = [coef(shape[1]), coef(shape[1])]
    actual = cell_kernels.affine_gradients(gs, zs, coefs)
    assert_all_close(actual, torch_kernels.affine_gradients(*map(exact, (gs, zs, coefs))))


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kinds", [("max", "avg"), ("max",), ("avg",), ()])
@pytest.mark.parametrize("ties", [False, True])
def test_gradient_of_a_state(shape, stride, kinds, ties, stored):
    batch, channels, height, width = shape
    out = (batch, channels, -(-height // stride), -(-width // stride))
    weights = randn(4, 2)

    def state(edges: int) -> StateGrad:
        x = strided(*shape, dtype=stored)
        grads = [
            PoolGrad(
                (strided if edge % 2 else randn)(*out, dtype=stored),
                coef(channels) if "max" in kinds and edge != 1 else None,
                coef(channels) if "avg" in kinds and edge != 2 else None,
                (edge, 1) if stride == 1 and edge != 0 else None,
            )
            for edge in range(edges)
        ]
        addends = [randn(*shape, dtype=stored) for _ in range(edges + 1)]
        return StateGrad(x.round() if ties else x, grads, addends)

    states = [state(edges) for edges in (4, 0, 2)]
    actual = cell_kernels.state_gradients(states, stride, weights)
    expected = torch_kernels.state_gradients(exact(states), stride, exact(weights))
    assert_all_close(actual, expected)


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("drawn_only", [False, True])
def test_gradient_of_a_state_whose_pools_are_means(shape, stride, drawn_only, stored):
    """They do not read the state itself, which is NaN here."""
    batch, channels, height, width = shape
    out = (batch, channels, -(-height // stride), -(-width // stride))
    weights = randn(4, 2)

    def state(edges: int) -> StateGrad:
        scales = [torch.zeros(channels, 4, device="cuda") for _ in range(edges)]
        for edge, scale in enumerate(scales):
            scale[:, 0] = 0.0 if edge == 1 else 0.5 + edge
        grads = [
            PoolGrad(
                (strided if edge % 2 else randn)(*out, dtype=stored),
                None,
                scales[edge] if edge != 2 else None,
                (edge, 1) if stride == 1 and edge != 0 else None,
            )
            for edge in range(edges)
        ]
        addends = [randn(*shape, dtype=stored) for _ in range(edges + 1)]
        return StateGrad(randn(*shape, dtype=stored), grads, addends, means_only=True)

    states = [state(edges) for edges in (4, 0, 2)]
    expected = torch_kernels.state_gradients(exact(states), stride, exact(weights))
    for of_state in states:
        of_state.x.fill_(torch.nan)
    actual = cell_kernels.state_gradients(states, stride, weights, drawn_only)
    assert_all_close(actual, expected)


@gpu
@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (64, 256, 8, 8), (3, 48, 7, 12), (1, 16, 1, 8)])
@pytest.mark.parametrize("kind", ["relu_conv_bn", "factorized_reduce"])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.usefixtures("exact_products")
def test_preprocessing(shape, kind, wants, stored):
    conv = ReLUConvBN(shape[1], 32, 1, affine=False).op
    op = (conv if kind == "relu_conv_bn" else FactorizedReduce(shape[1], 32, affine=False)).cuda()
    x, expected_op = randn(*shape, dtype=stored).requires_grad_(wants[0]), copy.deepcopy(op).double()
    # Four values a channel, as of the smallest shape, are normalised by what one rounding to bf16 moves.
    tolerance = 2e-5 if stored == torch.float32 else 3e-2 if shape[0] == 1 else 1e-2
    for parameter in (*op.parameters(), *expected_op.parameters()):
        parameter.requires_grad_(wants[1])
    assert getattr(preprocess, f"supports_{kind}")(x, op).ok
    expected_x = exact(x.detach()).requires_grad_(wants[0])
    y, expected = getattr(preprocess, kind)(x, op), expected_op(expected_x)
    assert_close(y, expected, tolerance)
    g, weights = randn(*y.shape, dtype=stored), zip(op.parameters(), expected_op.parameters(), strict=True)
    for leaf, expected_leaf in ((x, expected_x), *weights):
        if leaf.requires_grad:
            (got,) = torch.autograd.grad(y, leaf, g, retain_graph=True)
            (right,) = torch.autograd.grad(expected, expected_leaf, exact(g), retain_graph=True)
            assert_close(got, right, tolerance)
    for got, wanted in zip(op.buffers(), expected_op.buffers(), strict=True):
        assert_close(got, wanted.double(), TOLERANCE if stored == torch.float32 else 1e-3)  # of TF32 products


def random_convs(shape: tuple[int, ...], second: bool, count: int, dtype: torch.dtype) -> list[Conv]:
    """Second halves of separable convolutions, each with its input, or convolutions of two states."""
    channels = shape[1]
    kinds = [(3, 1), (5, 1)] if second else [(3, 1), (5, 1), (3, 2), (5, 2)]
    states = [strided(*shape, dtype=dtype), randn(*shape, dtype=dtype)]
    convs = []
    for i in range(count):
        size, dilation = kinds[i % len(kinds)]
        weights = randn(channels, 1, size, size) / size, randn(channels, channels, 1, 1) / channels**0.5
        source = (randn(*shape, dtype=dtype), stats(channels)) if second else (states[2 * i // count], None)
        convs.append(Conv(*source, *weights, dilation))
    return convs


def by_state(grads: list[ConvGrad]) -> list[list[ConvGrad]]:
    return [list(same) for _, same in itertools.groupby(grads, key=lambda grad: id(grad.conv.x))]


@gpu
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("grade", GRADES)
def test_convolutions(shape, second, grade):
    convs = random_convs(shape, second, 7, stored_in(grade))
    ieee, tolerance = grade == "fp32", GRADES[grade]
    zs, moments = cell_kernels.convolve(convs, ieee)
    expected, _ = torch_kernels.convolve(exact(convs), ieee)
    assert_all_close(zs, expected, tolerance)
    bns = batch_norms(shape[1], len(zs))
    got = cell_kernels.statistics(bns, moments, True)
    # Of z before it is rounded; TF32's error is z's own.
    zs, tolerance = (expected, 2e-2) if grade == "bf16" else (exact(zs), TOLERANCE)
    wanted = torch_kernels.statistics([bn.double() for bn in bns], torch_kernels.plane_moments(zs), True)
    assert_all_close(got, wanted, tolerance)


@gpu
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("wants_weights", [True, False])
@pytest.mark.parametrize("count", [1, 6])
def test_backward_of_convolutions(shape, second, grade, wants_weights, count):
    ieee, tolerance, dtype = grade == "fp32", GRADES[grade], stored_in(grade)
    convs, channels = random_convs(shape, second, count, dtype), shape[1]
    grads = [
        ConvGrad(
            conv,
            randn(*shape, dtype=dtype),
            (strided if i % 2 else randn)(*shape, dtype=dtype),
            coef(channels),
        )
        for i, conv in enumerate(convs)
    ]
    if second:
        us, coefs, partials = cell_kernels.backward_second(grads, ieee, True, wants_weights)
        right_us, _, right_partials = torch_kernels.backward_second(exact(grads), ieee, True, wants_weights)
        assert_all_close(us, right_us, tolerance)
        dzs = torch_kernels.affine_gradients(exact(us), exact([c.x for c in convs]), exact(coefs))
        right_coefs = [
            torch_kernels._coef(u, conv.x, *conv.stats.unbind(1), 1.0, True)
            for u, conv in zip(exact(us), exact(convs), strict=True)
        ]
        right = torch_kernels.affine_gradients(exact(us), exact([c.x for c in convs]), right_coefs)
        assert_all_close(dzs, right, TOLERANCE if grade != "bf16" else 1e-2)
    else:
        dxs, partials = cell_kernels.backward_first(states := by_state(grads), ieee, wants_weights)
        right_dxs, right_partials = torch_kernels.backward_first(exact(states), ieee, wants_weights)
        assert_all_close([sum(exact(dx)) for dx in dxs], list(map(sum, right_dxs)), tolerance)
    assert bool(partials.depthwise) == wants_weights
    if wants_weights:
        for weights, partial, right_partial in (
            ([conv.depthwise for conv in convs], partials.depthwise, right_partials.depthwise),
            ([conv.pointwise for conv in convs], partials.pointwise, right_partials.pointwise),
        ):
            got = cell_kernels.reduce_partials(partial, weights)
            assert_all_close(got, torch_kernels.reduce_partials(right_partial, exact(weights)), tolerance)


@gpu
@pytest.mark.parametrize("parts", [1, 5, 64, 256, 1000])
@pytest.mark.parametrize("sizes", [(144, 256, 4096), (9, 400, 3)])
def test_sums_of_parts(parts, sizes):
    weights = [randn(size, 1, 1, 1) for size in (*sizes, 16)]
    partials = [randn(parts + i, weight.numel()) for i, weight in enumerate(weights)]
    expected = torch_kernels.reduce_partials(exact(partials), exact(weights))
    assert_all_close(cell_kernels.reduce_partials(partials, weights), expected)


def strided_tolerance(stored: torch.dtype) -> float:
    return 2e-5 if stored == torch.float32 else GRADES["bf16"]


@gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("wants_weights", [True, False])
def test_strided_convolutions(shape, wants_weights, stored):
    batch, channels, height, width = shape
    out, tolerance = (batch, channels, -(-height // 2), -(-width // 2)), strided_tolerance(stored)
    convs = [conv._replace(stride=2) for conv in random_convs(shape, False, 9, stored)]
    zs, moments = cell_kernels.convolve(convs, True)
    expected, _ = torch_kernels.convolve(exact(convs), True)
    assert_all_close(zs, expected, tolerance)
    assert_all_close(
        cell_kernels.statistics(batch_norms(channels, len(zs)), moments, True),
        torch_kernels.statistics(
            [bn.double() for bn in batch_norms(channels, len(zs))],
            torch_kernels.plane_moments(exact(zs)),
            True,
        ),
        TOLERANCE if stored == torch.float32 else 2e-2,  # z is rounded, its moments are not
    )
    grads = [
        ConvGrad(
            conv, randn(*out, dtype=stored), (strided if i % 2 else randn)(*out, dtype=stored), coef(channels)
        )
        for i, conv in enumerate(convs)
    ]
    dxs, partials = cell_kernels.backward_first(states := by_state(grads), True, wants_weights)
    right_dxs, right_partials = torch_kernels.backward_first(exact(states), True, wants_weights)
    assert_all_close([sum(exact(dx)) for dx in dxs], list(map(sum, right_dxs)), tolerance)
    assert bool(partials.depthwise) == bool(partials.pointwise) == wants_weights
    for name in ("depthwise", "pointwise") if wants_weights else ():
        weights = [getattr(conv, name) for conv in convs]
        got = cell_kernels.reduce_partials(getattr(partials, name), weights)
        wanted = torch_kernels.reduce_partials(getattr(right_partials, name), exact(weights))
        assert_all_close(got, wanted, tolerance)


@gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("wants_weights", [True, False])
def test_factorized_reductions(shape, wants_weights, stored):
    batch, channels, height, width = shape
    out, tolerance = (batch, channels, -(-height // 2), -(-width // 2)), strided_tolerance(stored)
    x = randn(*shape, dtype=stored)
    weights = [tuple(randn(channels // 2, channels, 1, 1) for _ in range(2)) for _ in range(3)]
    zs, moments = cell_kernels.reduce(x, weights, True)
    expected, _ = torch_kernels.reduce(exact(x), exact(weights), True)
    assert_all_close(zs, expected, tolerance)
    assert_all_close(
        cell_kernels.statistics(batch_norms(channels, 3), moments, True),
        torch_kernels.statistics(
            [bn.double() for bn in batch_norms(channels, 3)], torch_kernels.plane_moments(exact(zs)), True
        ),
        TOLERANCE if stored == torch.float32 else 2e-2,  # z is rounded, its moments are not
    )
    grads = [
        ReduceGrad(pair, randn(*out, dtype=stored), strided(*out, dtype=stored), coef(channels))
        for pair in weights
    ]
    dxs, partials = cell_kernels.backward_reduce(x, grads, True, wants_weights)
    right, right_partials = torch_kernels.backward_reduce(exact(x), exact(grads), True, wants_weights)
    assert_close(torch.stack(exact(dxs)).sum(0), torch.stack(right).sum(0), tolerance)
    for half, got, wanted in zip((0, 1), partials, right_partials, strict=True) if wants_weights else ():
        of_half = [pair[half] for pair in weights]
        assert_all_close(
            cell_kernels.reduce_partials(got, of_half),
            torch_kernels.reduce_partials(wanted, exact(of_half)),
            tolerance,
        )


def run_fused(cell: SearchCell, *inputs: Tensor) -> Tensor:
    *states, weights = inputs
    plan = plan_cell(cell)
    assert fused.supports(plan, states, weights).ok
    return fused.cell(plan, states, weights)


@gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_matches_the_modules(channels, reduction, training, wants):
    cell, inputs = cell_on_gpu(channels, (4, 16, 16), reduction)
    assert_as_good_as_eager(run_fused, cell.train(training), inputs, *wants)


@gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("size", [(1, 2, 3), (2, 9, 7), (3, 33, 18), (1, 40, 40), (64, 8, 8)])
@pytest.mark.parametrize("reduction", [False, True])
def test_of_odd_sizes(size, reduction):
    cell, inputs = cell_on_gpu(16, size, reduction)
    assert_as_good_as_eager(run_fused, cell, inputs)


@gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(("channels", "size"), [(16, (4, 32, 32)), (32, (3, 9, 7)), (64, (2, 8, 8))])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_of_one_input_and_the_last_node_alone(channels, size, training, wants):
    assert_takes_one_input(run_fused, channels, size, training, wants)


@gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("count", [4, 8, 12, 16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(16, (4, 16, 16)), (32, (3, 9, 7)), (64, (2, 8, 8))])
def test_an_edge_by_itself(monkeypatch, count, stride, training, channels, size):
    edge = make_edge(sixteen_operations(monkeypatch)[:count], stride, channels).cuda().train(training)
    inputs = tuple(x.cuda() for x in make_edge_inputs(edge, size, channels))
    assert_as_good_as_eager(run_edge("ext"), edge, inputs, reference=run_edge_reference)


@gpu
@pytest.mark.usefixtures("exact_products", "drawn_by_values")
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_runs_only_what_was_drawn(reduction, training, wants):
    """What was not drawn leaves the NaN that ``torch.empty`` holds here."""
    cell, (*states, weights) = cell_on_gpu(32, (4, 16, 16), reduction)
    cell.train(training).drawn_only = True
    assert_as_good_as_eager(run_drawn, cell, (*states, draw(weights, 0)), *wants)


@gpu
@pytest.mark.usefixtures("exact_products", "drawn_by_values")
@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("size", [(4, 32, 32), (8, 8, 8), (3, 9, 7), (2, 33, 40)])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_runs_only_what_was_drawn_at_any_size(channels, size, reduction, seed):
    cell, (*states, weights) = cell_on_gpu(channels, size, reduction)
    cell.drawn_only = True
    assert_as_good_as_eager(run_drawn, cell, (*states, draw(weights, seed)))


@gpu
@pytest.mark.usefixtures("exact_products", "drawn_by_values")
@pytest.mark.parametrize(("channels", "size"), [(16, (4, 32, 32)), (32, (3, 9, 7)), (64, (2, 8, 8))])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("seed", range(3))
def test_runs_only_what_was_drawn_of_one_input(channels, size, training, wants, seed):
    cell, (x, weights) = make_cell_of_one_input(channels, size)
    cell.cuda().train(training).drawn_only = True
    inputs = x.cuda(), draw(weights, seed).cuda()
    assert_as_good_as_eager(run_drawn, cell, inputs, *wants, reference=SearchCell.forward)


@gpu
@pytest.mark.usefixtures("exact_products", "drawn_by_values")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("column", range(16))
def test_an_edge_of_one_drawn_operation(monkeypatch, stride, column):
    edge = make_edge(sixteen_operations(monkeypatch), stride, 16).cuda()
    edge.drawn_only = True
    x, weights = make_edge_inputs(edge, (4, 16, 16), 16)
    inputs = x.cuda(), torch.eye(len(weights), dtype=weights.dtype, device="cuda")[column]
    assert_as_good_as_eager(run_edge("ext"), edge, inputs, reference=run_edge_reference)


def run_drawn(cell: SearchCell, *arguments: Tensor) -> Tensor:
    *states, weights = arguments
    plan = plan_cell(cell)
    assert fused.supports(plan, states, weights, drawn_only=True).ok
    return fused.cell(plan, states, weights, drawn_only=True)


@gpu
@pytest.mark.parametrize("kind", ["normal", "reduction", "nas-bench-201"])
def test_replays_follow_what_is_drawn(kind):
    """One graph for all draws: the kernels find out on the device."""
    if kind == "nas-bench-201":
        cell, (*states, weights) = make_cell_of_one_input(16, (8, 16, 16))
    else:
        cell = make_cell(kind == "reduction", 16)
        *states, weights = make_inputs(cell, (8, 16, 16), 16)
    cell = cell.float().cuda()
    leaves = [x.float().cuda().requires_grad_() for x in (*states, draw(weights, 0))]
    leaves += list(cell.edges.parameters())
    torch.use_deterministic_algorithms(False)  # filling memory with NaN would be captured, too

    def run() -> list[Tensor]:
        y = run_drawn(cell, *leaves[: len(states) + 1])
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = run()
        for seed in range(5):
            leaves[len(states)].data.copy_(draw(weights, seed))
            before = [buffer.clone() for buffer in cell.edges.buffers()]
            graph.replay()
            after = [buffer.clone() for buffer in cell.edges.buffers()]
            for buffer, old in zip(cell.edges.buffers(), before, strict=True):
                buffer.copy_(old)
            expected = run()
            assert all(torch.equal(got, wanted) for got, wanted in zip(captured, expected, strict=True))
            assert all(map(torch.equal, after, cell.edges.buffers()))
    torch.cuda.synchronize()


@gpu
@pytest.mark.parametrize(("channels", "size"), [(16, (8, 32, 32)), (32, (8, 16, 16)), (64, (3, 9, 7))])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_in_bf16_is_as_good_as_autocast(channels, size, reduction, training, wants):
    cell, inputs = cell_on_gpu(channels, size, reduction)
    assert_bf16_is_as_good_as_autocast(run_fused, cell.train(training), inputs, wants)


@gpu
def test_with_tf32_products():
    assert_products_are_tf32(run_fused, tolerance=2e-3)


@gpu
@pytest.mark.parametrize("reduction", [False, True])
def test_weights_may_be_views_at_any_offset(reduction):
    cell, inputs = cell_on_gpu(16, (4, 16, 16), reduction)
    cell, inputs = cell.float(), exact_to_fp32(inputs)
    parameters = list(cell.edges.parameters())

    def run() -> list[Tensor]:
        y = run_fused(cell, *inputs)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]

    expected = run()
    for parameter in parameters:
        parameter.data = torch.cat([parameter.new_zeros(1), parameter.data.flatten()])[1:].view_as(parameter)
    assert all(torch.equal(got, wanted) for got, wanted in zip(run(), expected, strict=True))


@gpu
@pytest.mark.parametrize("reduction", [False, True])
def test_twenty_runs_give_the_same_bits(reduction, stored):
    assert_twenty_runs_give_the_same_bits(run_fused, reduction, stored)


@gpu
@pytest.mark.parametrize("reduction", [False, True])
def test_runs_inside_a_cuda_graph(reduction):
    assert_runs_inside_a_cuda_graph(run_fused, reduction)


@gpu
def test_is_chosen_for_fp32_and_for_bf16_under_autocast():
    cell, inputs = cell_on_gpu(16, (8, 16, 16))
    *states, weights = exact_to_fp32(inputs)
    with use_backend("cuda"):
        assert explain("cell", plan_cell(cell.float()), states, weights).impl == "ext"
        with torch.autocast("cuda", torch.bfloat16):
            decision = explain("cell", plan_cell(cell.float()), states, weights)
            in_bf16 = explain("cell", plan_cell(cell.float()), [x.bfloat16() for x in states], weights)
    assert decision.impl == "torch"
    assert "autocast" in decision.reason
    assert in_bf16.impl == "ext"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    # All for wide and narrow accesses of fp32 and of bf16 but for two that read no pictures; those of windows
    # also for stride 2; windows, sums and dots also for drawn candidates only;
    # gradients of states also for means.
    ("source", "kernels"),
    [("node_pools.cu", 48), ("node_statistics.cu", 5), ("node_sums.cu", 21), ("partial_sums.cu", 2)],
)
def test_keeps_everything_in_registers(tmp_path, source, kernels, arch):
    report = assembler_report(source, arch, tmp_path)
    # Spills show there, and so do arrays that a loop left rolled indexes at run time.
    frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    assert len(frames) == kernels
    assert not any(frames)


@pytest.mark.parametrize("source", sorted(path.name for path in SOURCES.glob("*.cu")))
def test_a_kernel_that_is_launched_early_begins_by_waiting(source):
    text = (SOURCES / source).read_text()
    for kernel in re.findall(r"\blaunch_early\((\w+)", text):
        (first_line,) = re.findall(rf"__global__[^{{]*\b{kernel}\([^{{]*\{{\n *(.*)", text)
        assert first_line == "launching::await_kernel_before();"


@pytest.mark.parametrize(
    ("source", "name", "limit"),
    [
        ("node.h", "kMaxTerms", cell_kernels.MAX_TERMS),
        ("node.h", "kMaxEdges", cell_kernels.MAX_EDGES),
        ("node.h", "kMaxAddends", cell_kernels.MAX_ADDENDS),
        ("node_sums.cu", "kMaxPooled", cell_kernels.MAX_POOLED_EDGES),
        ("cell_strided_backward.cu", "kMaxJobs", cell_kernels.MAX_CONVS),
        ("cell_conv_backward.cu", "kMaxGradJobs", 2 * cell_kernels.MAX_CONVS),  # of two states
        ("pointwise.h", "kMaxJobs", cell_kernels.MAX_CONVS),
        ("dense_conv.h", "kMaxJobs", cell_kernels.MAX_CONVS),
        ("cell_conv_backward.cu", "kMaxSharedBytes", fused.SHARED_BYTES),
    ],
)
def test_refuses_what_launches_do_not_hold(source, name, limit):
    (value,) = re.findall(rf"\b{name} = ([\d* ]+)", (SOURCES / source).read_text())
    assert math.prod(map(int, value.split("*"))) == limit
