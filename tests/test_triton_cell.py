"""The fused cell in Triton against fp64: on a GPU natively, elsewhere tiny cells through the interpreter."""

import copy

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.backend.dispatch import explain
from neuroexapt.backend.registry import use_backend
from neuroexapt.core.cells import SearchCell
from neuroexapt.core.operations import FactorizedReduce, ReLUConvBN
from neuroexapt.core.plan import plan_cell
from neuroexapt.cuda_ops import preprocess
from neuroexapt.kernels import cell_triton, preprocess_triton
from tests.cuda_ops.test_cell import (
    draw,
    drawn_by_values,  # noqa: F401
    make_cell,
    make_edge,
    make_edge_inputs,
    make_inputs,
    results,
    run_edge_reference,
    run_reference,
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
from tests.kernels.held_to_reference import DEVICE, runs_kernels

gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("exact_products")


def run_fused(cell: SearchCell, *inputs: Tensor) -> Tensor:
    *states, weights = inputs
    plan = plan_cell(cell).for_kernels
    support = cell_triton.supports(plan, states, weights)
    assert support.ok, support.reason
    return cell_triton.cell(plan, states, weights)


def assert_preprocessing_matches(
    shape: tuple[int, ...], kind: str, wants: tuple[bool, bool], dtype: torch.dtype
) -> None:
    """The gradients of x and of the weights, where ``wants`` asks for them, y and buffers."""
    torch.manual_seed(0)
    expected_op: nn.Module = FactorizedReduce(shape[1], 4, affine=False)
    if kind == "relu_conv_bn":
        expected_op = ReLUConvBN(shape[1], 4, 1, affine=False).op
    expected_op = expected_op.to(DEVICE)
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(wants[0])
    op, expected_x = copy.deepcopy(expected_op), x.detach().double().requires_grad_(wants[0])
    for parameter in (*op.parameters(), *expected_op.double().parameters()):
        parameter.requires_grad_(wants[1])
    support = getattr(preprocess_triton, f"supports_{kind}", preprocess.supports_factorized_reduce)(x, op)
    assert support.ok, support.reason
    y, expected = getattr(preprocess_triton, kind)(x, op), expected_op(expected_x)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    assert error(y, expected) < tolerance
    g = torch.randn(y.shape, device=DEVICE).to(dtype)
    for leaf, expected_leaf in (
        (x, expected_x),
        *zip(op.parameters(), expected_op.parameters(), strict=True),
    ):
        if leaf.requires_grad:
            (got,) = torch.autograd.grad(y, leaf, g, retain_graph=True)
            (right,) = torch.autograd.grad(expected, expected_leaf, g.double(), retain_graph=True)
            assert error(got, right) < tolerance
    for got, wanted in zip(op.buffers(), expected_op.buffers(), strict=True):
        assert error(got, wanted.double()) < tolerance


@runs_kernels
@pytest.mark.parametrize("kind", ["relu_conv_bn", "factorized_reduce"])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_tiny_preprocessing(kind, wants):
    assert_preprocessing_matches((2, 6, 3, 5), kind, wants, torch.float32)


@gpu
@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (64, 256, 8, 8), (3, 48, 7, 12), (1, 20, 1, 8)])
@pytest.mark.parametrize("kind", ["relu_conv_bn", "factorized_reduce"])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_preprocessing(shape, kind, wants, stored):
    assert_preprocessing_matches(shape, kind, wants, stored)


@runs_kernels
@pytest.mark.parametrize(("reduction", "training"), [(False, True), (True, False)])
def test_tiny_cells_match_the_modules(reduction, training):
    primitives = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")
    cell = make_cell(reduction, 2, primitives, nodes=2 if reduction else 1).train(training)
    inputs = make_inputs(cell, (2, 3, 5), channels=2)
    expected = results(run_reference, cell, inputs)
    actual = results(run_fused, cell.float(), exact_to_fp32(inputs))
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (actual[name] is None) == (wanted is None), name
        if wanted is not None:
            assert error(actual[name], wanted.double()) < 2e-5, name


@gpu
@pytest.mark.usefixtures("drawn_by_values")
@pytest.mark.parametrize("reduction", [False, True])
def test_knows_what_was_drawn(reduction):
    cell, (*states, weights) = cell_on_gpu(24, (4, 16, 16), reduction)
    cell.drawn_only = True

    def run(cell: SearchCell, *inputs: Tensor) -> Tensor:
        *states, weights = inputs
        return cell_triton.cell(plan_cell(cell), states, weights, drawn_only=True)

    assert_as_good_as_eager(run, cell, (*states, draw(weights, 0)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"channels": 129}, "129 channels"),
        ({"size": (0, 8, 8)}, "an empty batch"),
        ({"size": (1, 1, 1)}, "a single value"),
        ({"primitives": ("sep_conv_7x7",)}, "kernel size 7"),
    ],
)
def test_says_which_cells_it_takes(change, reason):
    options = {"channels": 20, "primitives": ("skip_connect",), "nodes": 1, "size": (2, 8, 8)} | change
    size = options.pop("size")
    cell = make_cell(**options).float()
    *states, weights = exact_to_fp32(make_inputs(cell, size, options["channels"]))
    support = cell_triton.supports(plan_cell(cell), states, weights)
    assert support.ok == (not reason)
    assert reason in support.reason


@gpu
@pytest.mark.parametrize("channels", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_matches_the_modules(channels, reduction, training, wants):
    cell, inputs = cell_on_gpu(channels, (4, 16, 16), reduction)
    assert_as_good_as_eager(run_fused, cell.train(training), inputs, *wants)


@gpu
@pytest.mark.parametrize("size", [(1, 2, 3), (2, 9, 7), (3, 33, 18), (1, 40, 40), (64, 8, 8)])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("channels", [2, 16])
def test_of_odd_sizes(size, reduction, channels):
    cell, inputs = cell_on_gpu(channels, size, reduction)
    assert_as_good_as_eager(run_fused, cell, inputs)


@gpu
@pytest.mark.parametrize(("channels", "size"), [(16, (4, 32, 32)), (32, (3, 9, 7)), (64, (2, 8, 8))])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_of_one_input_and_the_last_node_alone(channels, size, training, wants):
    assert_takes_one_input(run_fused, channels, size, training, wants)


@gpu
@pytest.mark.parametrize("count", [4, 8, 12, 16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_an_edge_by_itself(monkeypatch, count, stride, training):
    edge = make_edge(sixteen_operations(monkeypatch)[:count], stride, 16).cuda().train(training)
    inputs = tuple(x.cuda() for x in make_edge_inputs(edge, (3, 9, 7), 16))
    assert_as_good_as_eager(run_edge("triton"), edge, inputs, reference=run_edge_reference)


@gpu
@pytest.mark.parametrize(("channels", "size"), [(16, (8, 32, 32)), (32, (8, 16, 16)), (64, (3, 9, 7))])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_in_bf16_is_as_good_as_autocast(channels, size, reduction, wants):
    cell, inputs = cell_on_gpu(channels, size, reduction)
    assert_bf16_is_as_good_as_autocast(run_fused, cell, inputs, wants)


@gpu
def test_with_tf32_products():
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert_products_are_tf32(run_fused, tolerance=4e-3)


@pytest.fixture
def deterministic_convolutions(monkeypatch):
    """Of PyTorch, whose factorized reductions are."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@gpu
@pytest.mark.usefixtures("deterministic_convolutions")
@pytest.mark.parametrize("reduction", [False, True])
def test_twenty_runs_give_the_same_bits(reduction, stored):
    assert_twenty_runs_give_the_same_bits(run_fused, reduction, stored)


@gpu
@pytest.mark.usefixtures("deterministic_convolutions")
@pytest.mark.parametrize("reduction", [False, True])
def test_runs_inside_a_cuda_graph(reduction):
    assert_runs_inside_a_cuda_graph(run_fused, reduction)


@gpu
def test_is_chosen_by_name():
    cell, inputs = cell_on_gpu(16, (8, 16, 16))
    *states, weights = exact_to_fp32(inputs)
    with use_backend("cuda:triton"):
        assert explain("cell", plan_cell(cell.float()), states, weights).impl == "triton"
