"""The fused cell in CUDA C++ against fp64: each kernel, then whole cells; without a GPU, its compilation."""

import copy
import itertools
import re

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.backend.dispatch import dispatch_report, explain, reset_dispatch_report
from neuroexapt.backend.registry import use_backend
from neuroexapt.core.cells import SearchCell
from neuroexapt.core.operations import FactorizedReduce, ReLUConvBN
from neuroexapt.core.plan import plan_cell
from neuroexapt.cuda_ops import cell as fused
from neuroexapt.cuda_ops import cell_kernels, preprocess
from neuroexapt.cuda_ops.build import SOURCES
from neuroexapt.cuda_ops.cell_kernels import Conv, ConvGrad, PoolGrad, Pooling, ReduceGrad, StateGrad, Summand
from tests.cuda_compilation import assembler_report, needs_nvcc
from tests.cuda_ops import torch_kernels
from tests.cuda_ops.test_cell import (
    make_cell,
    make_cell_of_one_input,
    make_edge,
    make_edge_inputs,
    make_inputs,
    results,
    run_edge_reference,
    run_reference,
    sixteen_operations,
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
TOLERANCE = 1e-5


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def strided(*shape: int) -> Tensor:
    """A part of a wider tensor's channels, as a node is of its cell's output."""
    batch, channels, height, width = shape
    return randn(batch, 3 * channels, height, width)[:, channels : 2 * channels]


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


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert error(got, wanted) < tolerance


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
def test_moments_and_statistics(shape, training):
    zs = [5 * strided(*shape) + 100, randn(*shape)]
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
def test_pools(shape, stride, kinds):
    xs = [strided(*shape), randn(*shape), strided(*shape)]
    zs, moments = cell_kernels.pool(xs, stride, kinds)
    expected, _ = torch_kernels.pool(exact(xs), stride, kinds)
    for got_z, got_moments, wanted_z in zip(zs, moments, expected, strict=True):
        assert got_z.keys() == kinds
        for kind in kinds:
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


def summands(shape: tuple[int, ...], count: int) -> list[Summand]:
    """Terms with statistics, without, and of weight 1."""
    channels = shape[1]
    entries = [(k // 4, k % 4) for k in range(count)]
    terms = [
        Summand(strided(*shape) if k % 3 else randn(*shape), stats(channels), entries[k])
        for k in range(count)
    ]
    return [term._replace(stats=None) if k % 5 == 4 else term for k, term in enumerate(terms)]


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 7, 35])
def test_sum_of_a_node(shape, count):
    weights = randn(10, 4)
    terms = [*summands(shape, count), Summand(randn(*shape), None, None)]
    y, expected = strided(*shape), exact(strided(*shape))
    cell_kernels.add_up(terms, weights, y)
    torch_kernels.add_up(exact(terms), exact(weights), expected)
    assert_close(y, expected)


@gpu
def test_sum_of_nothing_is_zero():
    y = strided(2, 16, 4, 4)
    cell_kernels.add_up([], randn(1, 1), y)
    assert torch.equal(y, torch.zeros_like(y))


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 7, 35])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants_weights", [True, False])
def test_backward_of_a_sum(shape, count, training, wants_weights):
    weights, g, terms = randn(10, 4), strided(*shape), summands(shape, count)
    grad, expected_grad = torch.zeros_like(weights), exact(torch.zeros_like(weights))
    wanted = (grad, expected_grad) if wants_weights else (None, None)
    actual = cell_kernels.backward_add_up(terms, weights, g, wanted[0], training)
    expected = torch_kernels.backward_add_up(exact(terms), exact(weights), exact(g), wanted[1], training)
    scale = torch.stack(expected).norm(dim=(0, 1))  # A, B and D differ in size
    for got, right in zip(actual, expected, strict=True):
        assert ((got.double() - right).norm(dim=0) <= 1e-4 * scale).all()
    assert (grad.double() - expected_grad).norm() <= 1e-4 * expected_grad.norm()


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", [("max", "avg"), ("max",), ("avg",)])
def test_backward_of_a_sum_forms_pools_again(shape, kinds):
    batch, channels, height, width = shape
    weights, g, terms = randn(10, 4), strided(*shape), summands(shape, 6)
    grad, expected_grad = torch.zeros_like(weights), exact(torch.zeros_like(weights))
    for edge, stride in ((5, 1), (6, 2), (7, 1)):
        x = strided(batch, channels, stride * height, stride * width)
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
def test_affine_gradients(shape):
    gs, zs = [strided(*shape), randn(*shape)], [randn(*shape), strided(*shape)]
    coefs = [coef(shape[1]), coef(shape[1])]
    actual = cell_kernels.affine_gradients(gs, zs, coefs)
    assert_all_close(actual, torch_kernels.affine_gradients(*map(exact, (gs, zs, coefs))))


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kinds", [("max", "avg"), ("max",), ("avg",), ()])
@pytest.mark.parametrize("ties", [False, True])
def test_gradient_of_a_state(shape, stride, kinds, ties):
    batch, channels, height, width = shape
    out = (batch, channels, -(-height // stride), -(-width // stride))
    weights = randn(4, 2)

    def state(edges: int) -> StateGrad:
        x = strided(*shape)
        grads = [
            PoolGrad(
                strided(*out) if edge % 2 else randn(*out),
                coef(channels) if "max" in kinds and edge != 1 else None,
                coef(channels) if "avg" in kinds and edge != 2 else None,
                (edge, 1) if stride == 1 and edge != 0 else None,
            )
            for edge in range(edges)
        ]
        return StateGrad(x.round() if ties else x, grads, [randn(*shape) for _ in range(edges + 1)])

    states = [state(edges) for edges in (4, 0, 2)]
    actual = cell_kernels.state_gradients(states, stride, weights)
    expected = torch_kernels.state_gradients(exact(states), stride, exact(weights))
    assert_all_close(actual, expected)


@gpu
@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (64, 256, 8, 8), (3, 48, 7, 12), (1, 16, 1, 8)])
@pytest.mark.parametrize("kind", ["relu_conv_bn", "factorized_reduce"])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.usefixtures("ieee")
def test_preprocessing(shape, kind, wants):
    conv = ReLUConvBN(shape[1], 32, 1, affine=False).op
    op = (conv if kind == "relu_conv_bn" else FactorizedReduce(shape[1], 32, affine=False)).cuda()
    x, expected_op = randn(*shape).requires_grad_(wants[0]), copy.deepcopy(op).double()
    for parameter in (*op.parameters(), *expected_op.parameters()):
        parameter.requires_grad_(wants[1])
    assert getattr(preprocess, f"supports_{kind}")(x, op).ok
    expected_x = exact(x.detach()).requires_grad_(wants[0])
    y, expected = getattr(preprocess, kind)(x, op), expected_op(expected_x)
    assert_close(y, expected)
    g, weights = randn(*y.shape), zip(op.parameters(), expected_op.parameters(), strict=True)
    for leaf, expected_leaf in ((x, expected_x), *weights):
        if leaf.requires_grad:
            (got,) = torch.autograd.grad(y, leaf, g, retain_graph=True)
            (right,) = torch.autograd.grad(expected, expected_leaf, exact(g), retain_graph=True)
            assert_close(got, right, 2e-5)
    for got, wanted in zip(op.buffers(), expected_op.buffers(), strict=True):
        assert_close(got, wanted.double())


def random_convs(shape: tuple[int, ...], second: bool, count: int) -> list[Conv]:
    """Second halves of separable convolutions, each with its input, or convolutions of two states."""
    channels = shape[1]
    kinds = [(3, 1), (5, 1)] if second else [(3, 1), (5, 1), (3, 2), (5, 2)]
    states = [strided(*shape), randn(*shape)]
    convs = []
    for i in range(count):
        size, dilation = kinds[i % len(kinds)]
        weights = randn(channels, 1, size, size) / size, randn(channels, channels, 1, 1) / channels**0.5
        source = (randn(*shape), stats(channels)) if second else (states[2 * i // count], None)
        convs.append(Conv(*source, *weights, dilation))
    return convs


def by_state(grads: list[ConvGrad]) -> list[list[ConvGrad]]:
    return [list(same) for _, same in itertools.groupby(grads, key=lambda grad: id(grad.conv.x))]


@gpu
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("ieee", [True, False])
def test_convolutions(shape, second, ieee):
    convs = random_convs(shape, second, 7)
    tolerance = TOLERANCE if ieee else 2e-3
    zs, moments = cell_kernels.convolve(convs, ieee)
    expected, _ = torch_kernels.convolve(exact(convs), ieee)
    assert_all_close(zs, expected, tolerance)
    bns = batch_norms(shape[1], len(zs))
    got = cell_kernels.statistics(bns, moments, True)
    wanted = torch_kernels.statistics(
        [bn.double() for bn in bns], torch_kernels.plane_moments(exact(zs)), True
    )
    assert_all_close(got, wanted, TOLERANCE)


@gpu
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("ieee", [True, False])
@pytest.mark.parametrize("wants_weights", [True, False])
@pytest.mark.parametrize("count", [1, 6])
def test_backward_of_convolutions(shape, second, ieee, wants_weights, count):
    convs = random_convs(shape, second, count)
    channels, tolerance = shape[1], TOLERANCE if ieee else 2e-3
    grads = [
        ConvGrad(conv, randn(*shape), strided(*shape) if i % 2 else randn(*shape), coef(channels))
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
        assert_all_close(dzs, right)
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


@gpu
@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("wants_weights", [True, False])
def test_strided_convolutions(shape, wants_weights):
    batch, channels, height, width = shape
    out = (batch, channels, -(-height // 2), -(-width // 2))
    convs = [conv._replace(stride=2) for conv in random_convs(shape, False, 9)]
    zs, moments = cell_kernels.convolve(convs, True)
    expected, _ = torch_kernels.convolve(exact(convs), True)
    assert_all_close(zs, expected, 2e-5)
    assert_all_close(
        cell_kernels.statistics(batch_norms(channels, len(zs)), moments, True),
        torch_kernels.statistics(
            [bn.double() for bn in batch_norms(channels, len(zs))],
            torch_kernels.plane_moments(exact(zs)),
            True,
        ),
    )
    grads = [
        ConvGrad(conv, randn(*out), strided(*out) if i % 2 else randn(*out), coef(channels))
        for i, conv in enumerate(convs)
    ]
    dxs, partials = cell_kernels.backward_first(states := by_state(grads), True, wants_weights)
    right_dxs, right_partials = torch_kernels.backward_first(exact(states), True, wants_weights)
    assert_all_close([sum(exact(dx)) for dx in dxs], list(map(sum, right_dxs)), 2e-5)
    assert bool(partials.depthwise) == bool(partials.pointwise) == wants_weights
    for name in ("depthwise", "pointwise") if wants_weights else ():
        weights = [getattr(conv, name) for conv in convs]
        got = cell_kernels.reduce_partials(getattr(partials, name), weights)
        wanted = torch_kernels.reduce_partials(getattr(right_partials, name), exact(weights))
        assert_all_close(got, wanted, 2e-5)


@gpu
@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("wants_weights", [True, False])
def test_factorized_reductions(shape, wants_weights):
    batch, channels, height, width = shape
    out = (batch, channels, -(-height // 2), -(-width // 2))
    x = randn(*shape)
    weights = [tuple(randn(channels // 2, channels, 1, 1) for _ in range(2)) for _ in range(3)]
    zs, moments = cell_kernels.reduce(x, weights, True)
    expected, _ = torch_kernels.reduce(exact(x), exact(weights), True)
    assert_all_close(zs, expected, 2e-5)
    assert_all_close(
        cell_kernels.statistics(batch_norms(channels, 3), moments, True),
        torch_kernels.statistics(
            [bn.double() for bn in batch_norms(channels, 3)], torch_kernels.plane_moments(exact(zs)), True
        ),
    )
    grads = [ReduceGrad(pair, randn(*out), strided(*out), coef(channels)) for pair in weights]
    dxs, partials = cell_kernels.backward_reduce(x, grads, True, wants_weights)
    right, right_partials = torch_kernels.backward_reduce(exact(x), exact(grads), True, wants_weights)
    assert_close(torch.stack(dxs).sum(0), torch.stack(right).sum(0), 2e-5)
    for half, got, wanted in zip((0, 1), partials, right_partials, strict=True) if wants_weights else ():
        of_half = [pair[half] for pair in weights]
        assert_all_close(
            cell_kernels.reduce_partials(got, of_half),
            torch_kernels.reduce_partials(wanted, exact(of_half)),
            2e-5,
        )


@pytest.fixture
def ieee():
    """Convolutions without TF32."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


def run_fused(cell, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
    plan = plan_cell(cell)
    assert fused.supports(plan, [s0, s1], weights).ok
    return fused.cell(plan, [s0, s1], weights)


def run_edge(edge, x: Tensor, weights: Tensor) -> Tensor:
    """An edge in use by itself."""
    with use_backend("cuda:ext"):
        reset_dispatch_report()
        y = edge(x, weights)
    assert ("cell", "ext") in {(decision.op, decision.impl) for decision in dispatch_report()}
    return y


def cell_on_gpu(channels: int, size: tuple[int, ...], reduction: bool = False):
    cell = make_cell(reduction, channels)
    return cell.cuda(), tuple(x.cuda() for x in make_inputs(cell, size, channels))


def assert_as_good_as_eager(module, inputs, *wants: bool, reference=run_reference, run=run_fused) -> None:
    """Against fp64, allowing for what PyTorch's own fp32 shows: signs of activations that flip."""
    expected = results(reference, module, inputs, *wants)
    module, inputs = module.float(), exact_to_fp32(inputs)
    eager = results(reference, module, inputs, *wants)
    actual = results(run, module, inputs, *wants)
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (actual[name] is None) == (wanted is None), name
        if wanted is None:
            continue
        tolerance = 2e-5 if name == "y" or name.startswith("buffer") else 2e-3
        wanted = wanted.double()
        assert error(actual[name], wanted) <= max(tolerance, 5 * error(eager[name], wanted)), name


def exact_to_fp32(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


@gpu
@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_matches_the_modules(channels, reduction, training, wants):
    cell, inputs = cell_on_gpu(channels, (4, 16, 16), reduction)
    assert_as_good_as_eager(cell.train(training), inputs, *wants)


@gpu
@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("size", [(1, 2, 3), (2, 9, 7), (3, 33, 18), (1, 40, 40), (64, 8, 8)])
@pytest.mark.parametrize("reduction", [False, True])
def test_of_odd_sizes(size, reduction):
    cell, inputs = cell_on_gpu(16, size, reduction)
    assert_as_good_as_eager(cell, inputs)


@gpu
@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize(("channels", "size"), [(16, (4, 32, 32)), (32, (3, 9, 7)), (64, (2, 8, 8))])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_of_one_input_and_the_last_node_alone(channels, size, training, wants):
    cell, inputs = make_cell_of_one_input(channels, size)
    inputs = tuple(x.cuda() for x in inputs)

    def run(cell: SearchCell, x: Tensor, weights: Tensor) -> Tensor:
        plan = plan_cell(cell)
        assert fused.supports(plan, [x], weights).ok
        return fused.cell(plan, [x], weights)

    cell = cell.cuda().train(training)
    assert_as_good_as_eager(cell, inputs, *wants, reference=SearchCell.forward, run=run)


@gpu
@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("count", [4, 8, 12, 16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(16, (4, 16, 16)), (32, (3, 9, 7)), (64, (2, 8, 8))])
def test_an_edge_by_itself(monkeypatch, count, stride, training, channels, size):
    edge = make_edge(sixteen_operations(monkeypatch)[:count], stride, channels).cuda().train(training)
    inputs = tuple(x.cuda() for x in make_edge_inputs(edge, size, channels))
    assert_as_good_as_eager(edge, inputs, reference=run_edge_reference, run=run_edge)


@gpu
def test_with_tf32_products():
    cell, inputs = cell_on_gpu(32, (8, 16, 16))
    expected = run_reference(cell, *inputs)
    y = run_fused(cell.float(), *exact_to_fp32(inputs))
    assert 1e-6 < error(y, expected) < 2e-3


@gpu
@pytest.mark.parametrize("reduction", [False, True])
def test_twenty_runs_give_the_same_bits(reduction):
    cell, inputs = cell_on_gpu(16, (64, 32, 32), reduction)
    cell, inputs = cell.float(), exact_to_fp32(inputs)
    first = results(run_fused, cell, inputs)
    for _ in range(19):
        again = results(run_fused, cell, inputs)
        assert all(torch.equal(again[name], wanted) for name, wanted in first.items())


@gpu
@pytest.mark.parametrize("reduction", [False, True])
def test_runs_inside_a_cuda_graph(reduction):
    cell, inputs = cell_on_gpu(16, (8, 16, 16), reduction)
    cell, leaves = cell.float(), [x.float().requires_grad_() for x in inputs]
    leaves += list(cell.edges.parameters())
    torch.use_deterministic_algorithms(False)  # filling memory with NaN would be captured, too

    def run() -> list[Tensor]:
        y = run_fused(cell, *leaves[:3])
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        expected = run()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = run()
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got, wanted) for got, wanted in zip(captured, expected, strict=True))


@gpu
def test_is_chosen_for_fp32():
    cell, inputs = cell_on_gpu(16, (8, 16, 16))
    *states, weights = exact_to_fp32(inputs)
    with use_backend("cuda"):
        assert explain("cell", plan_cell(cell.float()), states, weights).impl == "ext"
        with torch.autocast("cuda", torch.bfloat16):
            decision = explain("cell", plan_cell(cell.float()), states, weights)
    assert decision.impl == "torch"
    assert "autocast" in decision.reason


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    # All for wide and narrow accesses but for two that have no such; those of windows also for stride 2.
    ("source", "kernels"),
    [("node_pools.cu", 8), ("node_statistics.cu", 3), ("node_sums.cu", 7), ("partial_sums.cu", 2)],
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
