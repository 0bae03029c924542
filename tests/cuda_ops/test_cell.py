"""The fused cell's autograd functions against module by module, in fp64 with kernels in plain PyTorch."""

import copy
import gc
import itertools
from functools import partial
from typing import TypeVar
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neuroexapt.core import drawn
from neuroexapt.core.cells import CellTopology, OneInput, SearchCell, TwoInputs
from neuroexapt.core.operations import OPS, PRIMITIVES, DilConv, MixedOp, Pool, ReLUConvBN
from neuroexapt.core.plan import plan_cell
from neuroexapt.core.recompute import recomputed
from neuroexapt.cuda_ops import cell as fused
from neuroexapt.spaces import nas_bench_201
from tests.cuda_ops import torch_kernels

TOLERANCE = 1e-10
Module = TypeVar("Module", bound=nn.Module)


def make_cell(
    reduction: bool = False, channels: int = 4, primitives=PRIMITIVES, nodes: int = 4
) -> SearchCell:
    torch.manual_seed(0)
    inputs = TwoInputs(channels, channels, channels, False, affine=False)
    cell = SearchCell(CellTopology(nodes), primitives, inputs, channels, reduction=reduction)
    cell.fused = False  # for the reference; the plan does not ask
    return with_statistics(cell)


def make_cell_of_one_input(channels: int, size: tuple[int, ...]) -> tuple[SearchCell, tuple[Tensor, Tensor]]:
    """A cell of nas-bench-201, and a state and mixing weights for it."""
    torch.manual_seed(0)
    cell = SearchCell(
        nas_bench_201.TOPOLOGY, nas_bench_201.PRIMITIVES, OneInput(), channels, norm_pools=False
    )
    cell.fused = False  # for the reference; the plan does not ask
    x, _, weights = make_inputs(cell, size, channels)
    return with_statistics(cell), (x, weights)


def make_edge(primitives=PRIMITIVES, stride: int = 1, channels: int = 4) -> MixedOp:
    torch.manual_seed(0)
    return with_statistics(MixedOp(channels, stride, primitives))


def with_statistics(module: Module) -> Module:
    """In fp64, with running statistics that tell one BatchNorm from another."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
    return module.double()


def make_inputs(cell: SearchCell, size=(3, 7, 6), channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    batch, height, width = size
    states = (torch.randn(batch, channels, height, width, dtype=torch.double) for _ in range(2))
    weights = torch.softmax(
        torch.randn(len(cell.topology.edges), len(cell.edges[0].primitives), dtype=torch.double), -1
    )
    return *states, weights


def run_reference(cell: SearchCell, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
    """What a SearchCell does after its preprocessing, module by module."""
    states, rows = [s0, s1], itertools.count()
    for _ in range(cell.topology.nodes):
        states.append(sum(cell.edges[row](x, weights[row]) for x, row in zip(states, rows, strict=False)))
    return torch.cat(states[2:], dim=1)


def run_fused(cell: SearchCell, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
    return fused.run(plan_cell(cell), [s0, s1], weights, torch_kernels)


def make_edge_inputs(edge: MixedOp, size=(3, 7, 6), channels: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    batch, height, width = size
    x = torch.randn(batch, channels, height, width, dtype=torch.double)
    return x, torch.softmax(torch.randn(len(edge.ops), dtype=torch.double), -1)


def run_edge_reference(edge: MixedOp, x: Tensor, weights: Tensor) -> Tensor:
    edge.fused = False
    return edge(x, weights)


def run_edge_fused(edge: MixedOp, x: Tensor, weights: Tensor) -> Tensor:
    return fused.run(edge.plan.for_kernels, [x], weights[None], torch_kernels)


def results(function, module: nn.Module, inputs, wants_weights=True, wants_alpha=True) -> dict[str, Tensor]:
    """Output, gradients and buffers after one pass; ``inputs``: states and mixing weights."""
    module = copy.deepcopy(module)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    leaves[-1].requires_grad_(wants_alpha)
    for parameter in module.parameters():
        parameter.requires_grad_(wants_weights)
    y = function(module, *leaves)
    torch.manual_seed(2)
    # Some of the gradient from outside the nodes' sum, as from the next cells.
    # The same numbers for all dtypes and devices, of which each draws its own.
    (y * torch.randn(y.shape, dtype=torch.double).to(y)).sum().backward()
    edges = module.edges if isinstance(module, SearchCell) else module
    named = {f"grad of input {i}": leaf.grad for i, leaf in enumerate(leaves)} | {"y": y.detach()}
    named |= {f"grad of {name}": p.grad for name, p in edges.named_parameters()}
    return named | {f"buffer {name}": b for name, b in edges.named_buffers()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert (got is None) == (wanted is None), name
        if wanted is not None:
            scale = max(wanted.abs().max().item(), 1e-3)
            assert (got - wanted).abs().max().item() <= TOLERANCE * scale, name


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_matches_the_modules(reduction, training, wants):
    cell = make_cell(reduction).train(training)
    inputs = make_inputs(cell)
    assert_close(results(run_fused, cell, inputs, *wants), results(run_reference, cell, inputs, *wants))


@pytest.mark.parametrize("size", [(1, 2, 2), (2, 1, 5), (2, 9, 4)])
def test_of_odd_sizes(size):
    cell = make_cell(reduction=False)
    inputs = make_inputs(cell, size)
    assert_close(results(run_fused, cell, inputs), results(run_reference, cell, inputs))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("width", "dense"), [(8, True), (6, False)])
def test_of_one_input_and_the_last_node_alone(training, wants, width, dense, monkeypatch):
    cell, inputs = make_cell_of_one_input(4, (3, 7, width))
    convolve = Mock(side_effect=torch_kernels.convolve_dense)
    monkeypatch.setattr(torch_kernels, "convolve_dense", convolve)

    def run(cell: SearchCell, x: Tensor, weights: Tensor) -> Tensor:
        return fused.run(plan_cell(cell), [x], weights, torch_kernels)

    expected = results(SearchCell.forward, cell.train(training), inputs, *wants)
    assert expected["y"].shape == inputs[0].shape
    assert_close(results(run, cell, inputs, *wants), expected)
    assert convolve.called == dense


@pytest.fixture
def drawn_by_values(monkeypatch):
    """The reference runs all candidates, so that those of weight 0 have gradients, which are 0."""
    monkeypatch.setattr(drawn, "can_be_read", lambda weights: False)


@pytest.mark.usefixtures("drawn_by_values")
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("wants", "seed"), [((True, True), 0), ((True, False), 1), ((False, True), 2)])
def test_runs_only_what_was_drawn(reduction, training, wants, seed):
    cell = make_cell(reduction, nodes=3).train(training)
    cell.drawn_only = True
    *states, weights = make_inputs(cell)
    inputs = (*states, draw(weights, seed))
    assert_close(results(run_drawn, cell, inputs, *wants), results(run_reference, cell, inputs, *wants))


@pytest.mark.usefixtures("drawn_by_values")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("seed", range(3))
def test_runs_only_what_was_drawn_of_one_input(training, width, seed):
    cell, (x, weights) = make_cell_of_one_input(4, (3, 7, width))
    cell.train(training).drawn_only = True
    inputs = x, draw(weights, seed)
    assert_close(results(run_drawn, cell, inputs), results(SearchCell.forward, cell, inputs))


@pytest.mark.usefixtures("drawn_by_values")
def test_what_was_not_drawn_weighs_nothing_where_kernels_run_it(monkeypatch):
    monkeypatch.setattr(torch_kernels, "LEAVES_OUT", False)
    cell, (x, weights) = make_cell_of_one_input(4, (3, 7, 8))
    cell.drawn_only = True

    def run(cell: SearchCell, *arguments: Tensor) -> Tensor:
        with drawn.statistics_of_drawn(plan_cell(cell), arguments[-1]):
            return run_drawn(cell, *arguments)

    inputs = x, draw(weights, 0)
    assert_close(results(run, cell, inputs), results(SearchCell.forward, cell, inputs))


@pytest.mark.usefixtures("drawn_by_values")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("column", range(16))
def test_an_edge_of_one_drawn_operation(sixteen, stride, column):
    edge = make_edge(sixteen, stride)
    edge.drawn_only = True
    x, weights = make_edge_inputs(edge)
    inputs = x, torch.eye(len(weights), dtype=weights.dtype)[column]

    def run(edge: MixedOp, x: Tensor, weights: Tensor) -> Tensor:
        return fused.run(edge.plan.for_kernels, [x], weights[None], torch_kernels, drawn_only=True)

    assert_close(results(run, edge, inputs), results(run_edge_reference, edge, inputs))


def draw(weights: Tensor, seed: int) -> Tensor:
    """Weight 1 for one candidate of each edge, 0 for the others."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(weights.shape[1], (len(weights), 1), generator=generator)
    return torch.zeros_like(weights).scatter_(1, columns.to(weights.device), 1.0)


def run_drawn(cell: SearchCell, *arguments: Tensor) -> Tensor:
    *states, weights = arguments
    return fused.run(plan_cell(cell), states, weights, torch_kernels, drawn_only=True)


@pytest.mark.parametrize(
    "primitives",
    [
        ("none", "skip_connect"),
        ("none", "max_pool_3x3", "avg_pool_3x3"),
        ("dil_conv_5x5",),
        ("none", "skip_connect", "conv_7x1_1x7"),
    ],
)
@pytest.mark.parametrize("reduction", [False, True])
def test_of_other_primitives(primitives, reduction):
    cell = make_cell(reduction, primitives=primitives, nodes=2)
    inputs = make_inputs(cell)
    assert_close(results(run_fused, cell, inputs), results(run_reference, cell, inputs))


@pytest.mark.parametrize("reduction", [False, True])
def test_edges_with_hooks_run_as_modules(reduction):
    cell = make_cell(reduction)
    inputs = make_inputs(cell)
    expected = results(run_reference, cell, inputs)
    seen: list[Tensor] = []
    for row in (1, 4, 7):
        cell.edges[row].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_close(results(run_fused, cell, inputs), expected)
    assert len(seen) == 3


@pytest.fixture
def sixteen(monkeypatch):
    return sixteen_operations(monkeypatch)


def sixteen_operations(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Operations of sizes that have kernels, and of others."""
    more = {
        "dil_conv_7x7": lambda channels, stride, affine: DilConv(channels, channels, 7, stride, 2, affine),
        "avg_pool_5x5": lambda channels, stride, affine: Pool("avg", 5, stride),
        "max_pool_5x5": lambda channels, stride, affine: Pool("max", 5, stride),
        "max_pool_7x7": lambda channels, stride, affine: Pool("max", 7, stride),
        "conv_1x1": lambda channels, stride, affine: ReLUConvBN(channels, channels, 1, stride, 0, affine),
        "conv_3x3": lambda channels, stride, affine: ReLUConvBN(channels, channels, 3, stride, 1, affine),
    }
    for name, factory in more.items():
        monkeypatch.setitem(OPS, name, factory)
    return (*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7", *more)


@pytest.mark.parametrize("count", [4, 8, 12, 16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_an_edge_by_itself(sixteen, count, stride, training):
    edge = make_edge(sixteen[:count], stride).train(training)
    inputs = make_edge_inputs(edge)
    assert_close(results(run_edge_fused, edge, inputs), results(run_edge_reference, edge, inputs))


@pytest.mark.parametrize("size", [(1, 2, 3), (2, 1, 5), (2, 9, 4)])
@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_an_edge_of_odd_sizes(size, wants):
    edge = make_edge(stride=2)
    inputs = make_edge_inputs(edge, size)
    assert_close(
        results(run_edge_fused, edge, inputs, *wants), results(run_edge_reference, edge, inputs, *wants)
    )


def test_takes_edges_of_sixteen_operations(sixteen):
    edge = make_edge(sixteen, channels=16).float()
    x, weights = (tensor.float() for tensor in make_edge_inputs(edge, channels=16))
    assert not fused.supports(edge.plan, [x], weights[None]).ok
    assert fused.supports(edge.plan.for_kernels, [x], weights[None]).ok


def test_operations_that_do_not_end_in_a_batch_norm(monkeypatch):
    monkeypatch.setitem(OPS, "tanh", lambda channels, stride, affine: nn.Tanh())
    cell = make_cell(primitives=("none", "skip_connect", "sep_conv_3x3", "tanh"), nodes=2)
    inputs = make_inputs(cell)
    assert_close(results(run_fused, cell, inputs), results(run_reference, cell, inputs))


class Aligned:
    """The kernels, which take no convolution whose weights are not contiguous and 16-byte aligned."""

    def __getattr__(self, name: str):
        return getattr(torch_kernels, name)

    def convolve(self, convs, exact):
        assert all(self._takes(conv) for conv in convs)
        return torch_kernels.convolve(convs, exact)

    def backward_first(self, grads, *options):
        assert all(self._takes(grad.conv) for of_state in grads for grad in of_state)
        return torch_kernels.backward_first(grads, *options)

    @staticmethod
    def _takes(conv) -> bool:
        weights = conv.depthwise, conv.pointwise
        return all(weight.is_contiguous() and weight.data_ptr() % 16 == 0 for weight in weights)


@pytest.mark.parametrize("reduction", [False, True])
def test_weights_may_be_views_at_any_offset(reduction):
    cell = make_cell(reduction, primitives=("sep_conv_3x3", "dil_conv_5x5"), nodes=2)
    for parameter in cell.edges.parameters():
        parameter.data = torch.cat([parameter.data.new_zeros(1), parameter.data.flatten()])[1:].view_as(
            parameter
        )
    *states, weights = make_inputs(cell)
    parameters = list(cell.edges.parameters())
    expected = torch.autograd.grad(run_reference(cell, *states, weights).square().sum(), parameters)
    y = fused.run(plan_cell(cell), states, weights, Aligned())
    actual = torch.autograd.grad(y.square().sum(), parameters)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_graph_can_be_kept_for_a_second_pass():
    cell = make_cell(reduction=True)
    *states, weights = make_inputs(cell)
    weights.requires_grad_()
    loss = run_fused(cell, *states, weights).square().sum()
    parameters = [weights, *cell.edges.parameters()]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(got, wanted) for got, wanted in zip(second, first, strict=True))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("reduction", [False, True])
def test_memory_is_freed_without_the_garbage_collector(reduction, again):
    cell = make_cell(reduction)
    s0, s1, weights = make_inputs(cell)
    leaves = [s0.requires_grad_(), s1, weights.requires_grad_()]

    def run() -> Tensor:
        return recomputed(cell, partial(run_fused, cell), *leaves) if again else run_fused(cell, *leaves)

    torch.autograd.grad(run().sum(), leaves[::2])  # PyTorch makes things of its own the first time
    gc.collect()
    gc.disable()
    try:
        before = _count_tensors()
        y = run()
        if again:
            assert _count_tensors() < before + 10, "y and some of PyTorch's own, where a cell keeps 100"
        torch.autograd.grad(y.sum(), leaves[::2])
        y.detach_()
        del y
        with torch.no_grad():
            run_fused(cell, *leaves)
        assert _count_tensors() == before
        run_fused(cell, *leaves).sum().backward()
        cell.zero_grad()
        s0.grad = weights.grad = None
        assert _count_tensors() == before
    finally:
        gc.enable()


def test_takes_pictures_in_any_memory_order():
    cell = make_cell(reduction=True)
    s0, s1, weights = make_inputs(cell)
    expected = results(run_fused, cell, (s0, s1, weights))
    s0 = s0.contiguous(memory_format=torch.channels_last)
    assert_close(results(run_fused, cell, (s0, s1, weights.t().contiguous().t())), expected)


def test_can_be_differentiated_once():
    cell = make_cell(nodes=1)
    *states, weights = make_inputs(cell)
    weights.requires_grad_()
    y = run_fused(cell, *states, weights)
    (grad,) = torch.autograd.grad(y.square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.bfloat16}, "only fp32"),
        ({"channels": 20}, "20 channels"),
        ({"size": (0, 8, 8)}, "an empty batch"),
        ({"size": (1, 1, 1)}, "a single value"),
        ({"size": (1, 1, 1025)}, "1025 wide"),
        ({"primitives": ("sep_conv_7x7",)}, "kernel size 7"),
        ({"nodes": 17}, "17 nodes"),
    ],
)
def test_says_which_cells_it_takes(change, reason):
    options = {"channels": 16, "primitives": ("skip_connect",), "nodes": 1, "size": (2, 8, 8)} | change
    size, dtype = options.pop("size"), options.pop("dtype", torch.float32)
    cell = make_cell(**options).to(dtype)
    *states, weights = (x.to(dtype) for x in make_inputs(cell, size, options["channels"]))
    support = fused.supports(plan_cell(cell), states, weights)
    assert support.ok == (not reason)
    assert reason in support.reason


@pytest.mark.parametrize(
    ("states", "weights", "autocast", "reason"),
    [
        (torch.bfloat16, torch.float32, None, ""),
        (torch.bfloat16, torch.float32, torch.bfloat16, ""),
        (torch.float32, torch.float32, torch.bfloat16, "autocast is on"),
        (torch.bfloat16, torch.float32, torch.float16, "autocast is on"),
        (torch.bfloat16, torch.bfloat16, None, "beside weights and statistics in fp32"),
        (torch.float16, torch.float32, None, "only fp32, or pictures in bf16"),
    ],
)
def test_says_which_dtypes_it_takes(states, weights, autocast, reason):
    cell = make_cell(channels=16, nodes=1).float()
    s0, s1, mixing = make_inputs(cell, channels=16)
    enabled = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", autocast is not None)
    torch.set_autocast_dtype("cuda", autocast or torch.float16)
    try:
        support = fused.supports(plan_cell(cell), [s0.to(states), s1.to(states)], mixing.to(weights))
    finally:
        torch.set_autocast_enabled("cuda", enabled[0])
        torch.set_autocast_dtype("cuda", enabled[1])
    assert support.ok == (not reason)
    assert reason in support.reason


@pytest.mark.parametrize("moved", [0, 1, 2, "edges"])
def test_takes_no_tensors_on_several_devices(moved):
    cell = make_cell(channels=16, nodes=1).float()
    *states, weights = arguments = [x.float() for x in make_inputs(cell, channels=16)]
    assert fused.supports(plan_cell(cell), states, weights).ok
    if moved == "edges":
        cell.edges.to("meta")
    else:
        arguments[moved] = arguments[moved].to("meta")
    *states, weights = arguments
    assert "several devices" in fused.supports(plan_cell(cell), states, weights).reason


@pytest.mark.parametrize(("room", "takes"), [(227, True), (163, False), (99, False)])
def test_takes_no_gpu_with_little_shared_memory(room, takes, monkeypatch):
    monkeypatch.setattr(fused, "shared_bytes", lambda device: room * 1024)
    monkeypatch.setattr(fused, "refusals", lambda *arguments: iter(()))  # the cell itself is on the CPU
    with FakeTensorMode():
        states = [torch.empty(2, 16, 8, 8, device="cuda") for _ in range(2)]
    support = fused.supports(plan_cell(make_cell(channels=16, nodes=1)), states, torch.empty(0))
    assert support.ok == takes
    assert takes or "less than 227 KB" in support.reason


def test_takes_no_states_of_several_shapes():
    cell = make_cell(channels=16, nodes=1).float()
    s0, s1, weights = (x.float() for x in make_inputs(cell, channels=16))
    assert "several shapes" in fused.supports(plan_cell(cell), [s0, s1[:, :, 1:]], weights).reason


def _count_tensors() -> int:
    return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())
