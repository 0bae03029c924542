import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuroexapt.backend import dispatch_report, reset_dispatch_report
from neuroexapt.core import merged
from neuroexapt.core.cells import CellTopology, SearchCell, TwoInputs
from neuroexapt.core.layouts import Layout, Merging, Pictures, SmallPlanes, choose_layout
from neuroexapt.core.operations import (
    OPS,
    PRIMITIVES,
    FactorizedConv,
    MixedOp,
    Pool,
    ReLUConvBN,
    SepConvBlock,
    Zero,
)
from neuroexapt.core.plan import plan_cell
from neuroexapt.core.supernet import Supernet
from neuroexapt.engine.bilevel import Batch
from neuroexapt.errors import UserError
from neuroexapt.spaces import DARTS
from tests.core.bilevel_step import make_step

TWO_NODES = CellTopology(nodes=2)
LAYOUTS = {
    "small planes": SmallPlanes(),
    "single": Pictures(Merging.NONE),
    "grouped": Pictures(Merging.KINDS),
}


def make_cell(
    *,
    topology: CellTopology = TWO_NODES,
    primitives: tuple[str, ...] = PRIMITIVES,
    channels: int = 4,
    reduction: bool = False,
    training: bool = True,
    dtype: torch.dtype = torch.float64,
) -> SearchCell:
    torch.manual_seed(0)
    inputs = TwoInputs(channels, channels, channels, False, affine=False)
    cell = SearchCell(topology, primitives, inputs, channels, reduction=reduction)
    for module in cell.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Statistics of their own, so that evaluation mode tells one BatchNorm from another.
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return cell.to(dtype).train(training)


Call = tuple[Tensor, Tensor, Tensor]


def make_call(cell: SearchCell, batch: int = 5, height: int = 7, width: int = 6) -> Call:
    """Both inputs and mixing weights, all of which want gradients."""
    torch.manual_seed(1)
    dtype = next(cell.parameters()).dtype
    channels = cell.inputs.preprocess1.op[1].in_channels
    s0, s1 = (torch.randn(batch, channels, height, width, dtype=dtype) for _ in range(2))
    weights = torch.randn(len(cell.edges), len(cell.edges[0].ops), dtype=dtype).softmax(1)
    return tuple(tensor.requires_grad_() for tensor in (s0, s1, weights))


def results(cell: SearchCell, call: Call, fused: bool) -> dict[str, Tensor]:
    """Output, all gradients and all buffers of a copy of ``cell``."""
    cell = copy.deepcopy(cell)
    cell.fused = fused
    y = cell(*call)
    wanted = dict(zip(("s0", "s1", "α"), call, strict=True)) | dict(cell.named_parameters())
    torch.manual_seed(2)
    gradients = torch.autograd.grad(y, wanted.values(), torch.randn_like(y), allow_unused=True)
    return {
        "y": y,
        **{name: torch.zeros(1) if g is None else g for name, g in zip(wanted, gradients, strict=True)},
        **{name: buffer.double() for name, buffer in cell.named_buffers()},
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_fused_equals_reference(cell: SearchCell, call: Call, tolerance: float = 1e-10) -> None:
    reset_dispatch_report()
    fused = results(cell, call, fused=True)
    assert [(d.op, d.impl) for d in dispatch_report() if d.op == "cell"] == [("cell", "torch")]
    assert_same(fused, results(cell, call, fused=False), tolerance)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Every state of every cell is held so."""
    chosen = LAYOUTS[request.param]
    monkeypatch.setattr(merged, "choose_layout", lambda x: chosen)
    return chosen


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", [False, True])
def test_equals_the_cell_module_by_module(
    layout: Layout, reduction: bool, training: bool, channels_last: bool
) -> None:
    cell = make_cell(reduction=reduction, training=training)
    s0, s1, weights = make_call(cell)
    if channels_last:
        cell = cell.to(memory_format=torch.channels_last)
        s0, s1 = (s.detach().to(memory_format=torch.channels_last).requires_grad_() for s in (s0, s1))
    assert_fused_equals_reference(cell, (s0, s1, weights))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 5),
    channels=st.sampled_from([2, 4, 6]),
    height=st.integers(3, 13),
    width=st.integers(3, 13),
    reduction=st.booleans(),
    training=st.booleans(),
)
def test_takes_any_size(
    batch: int, channels: int, height: int, width: int, reduction: bool, training: bool
) -> None:
    cell = make_cell(channels=channels, reduction=reduction, training=training)
    assert_fused_equals_reference(cell, make_call(cell, batch, height, width))


@pytest.mark.parametrize("reduction", [False, True])
def test_fp32_differs_by_rounding_only(layout: Layout, reduction: bool) -> None:
    cell = make_cell(topology=CellTopology(), reduction=reduction, dtype=torch.float32)
    assert_fused_equals_reference(cell, make_call(cell, 8, 9, 7), tolerance=2e-5)


def test_small_planes_make_matrix_products_where_the_batch_pays_for_them() -> None:
    assert isinstance(choose_layout(torch.empty(64, 4, 8, 8)), SmallPlanes)
    assert isinstance(choose_layout(torch.empty(64, 4, 8, 9)), Pictures)
    assert isinstance(choose_layout(torch.empty(1, 4, 8, 8)), Pictures)


def test_groups_of_a_reduction_cell() -> None:
    plan = plan_cell(make_cell(reduction=True))
    assert [group.stride for group in plan.states] == [2, 2, 1]
    assert [len(group.convs) for group in plan.states] == [8, 8, 4]
    assert [len(group.pools) for group in plan.states] == [4, 4, 2]
    assert [len(group.identities) for group in plan.states] == [0, 0, 1]
    assert [len(group.modules) for group in plan.states] == [2, 2, 0]
    assert [node.node for node in plan.nodes] == [2, 3]
    # Seven candidates an edge: none adds nothing.
    assert [len(node.terms) for node in plan.nodes] == [14, 21]


def test_terms_name_their_modules() -> None:
    cell = make_cell()
    plan = plan_cell(cell)
    for node in plan.nodes:
        for term in node.terms:
            assert (term.source, term.target) == TWO_NODES.edges[term.edge]
            assert term.bn is None or term.bn in list(cell.edges[term.edge].ops[term.column].modules())
    (dilated,) = (term for term in plan.states[2].convs if term.dilation == 2 and term.kernel_size == 5)
    assert dilated.blocks == (cell.edges[4].candidate("dil_conv_5x5"),)
    assert dilated.bn is dilated.blocks[0].bn


# Other operations


class Doubled(nn.Module):
    """An operation that ends in no BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.fixture
def more_operations(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    factories: dict[str, Callable[[int, int, bool], nn.Module]] = {
        "nor_conv_1x1": lambda c, stride, affine: ReLUConvBN(c, c, 1, stride, affine=affine),
        "nor_conv_3x3": lambda c, stride, affine: ReLUConvBN(c, c, 3, stride, 1, affine),
        "conv_1x3_3x1": lambda c, stride, affine: FactorizedConv(c, 3, stride, affine),
        "block": lambda c, stride, affine: SepConvBlock(c, c, 3, stride, 1, affine),
        "max_pool_5x5": lambda c, stride, affine: Pool("max", 5, stride),
        "doubled": lambda c, stride, affine: Doubled(),
        "affine": lambda c, stride, affine: nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)),
        "slow": lambda c, stride, affine: nn.Sequential(
            nn.Conv2d(c, c, 1), nn.BatchNorm2d(c, momentum=0.01, affine=False)
        ),
    }
    for name, factory in factories.items():
        monkeypatch.setitem(OPS, name, factory)
    return ("none", "skip_connect", "avg_pool_3x3", "sep_conv_7x7", "dil_conv_3x3", *factories)


@pytest.mark.parametrize("training", [True, False])
def test_takes_any_operation(layout: Layout, more_operations: tuple[str, ...], training: bool) -> None:
    cell = make_cell(primitives=more_operations, training=training)
    assert_fused_equals_reference(cell, make_call(cell))


def test_relu_conv_bn_takes_strides(layout: Layout, more_operations: tuple[str, ...]) -> None:
    cell = make_cell(primitives=("none", "nor_conv_1x1", "nor_conv_3x3"), reduction=True)
    assert_fused_equals_reference(cell, make_call(cell))


def test_one_convolution_for_all_of_a_kind(more_operations: tuple[str, ...]) -> None:
    cell = make_cell(primitives=("nor_conv_3x3", "nor_conv_1x1"))
    call = make_call(cell, height=9, width=9)
    with torch.profiler.profile() as profile:
        cell(*call)
    convolutions = sum(event.name == "aten::conv2d" for event in profile.events())
    inputs = 2
    states = 3
    assert convolutions == inputs + 2 * states


@pytest.mark.parametrize("reduction", [False, True])
def test_what_kernels_do_not_know_becomes_modules(
    layout: Layout, more_operations: tuple[str, ...], reduction: bool
) -> None:
    primitives = ("none", "sep_conv_3x3", "sep_conv_7x7", "dil_conv_3x3", "avg_pool_3x3", "max_pool_5x5")
    cell = make_cell(primitives=primitives, reduction=reduction)
    *states, weights = make_call(cell)
    plan = cell.plan.for_kernels
    assert {term.kernel_size for state in plan.states for term in state.convs} == {3}
    assert {term.pool.kernel_size for state in plan.states for term in state.pools} == {3}
    assert [len(node.terms) for node in plan.nodes] == [len(node.terms) for node in cell.plan.nodes]
    torch.testing.assert_close(merged.cell(plan, states, weights), merged.cell(cell.plan, states, weights))


# Edges that run whole


@pytest.mark.parametrize("inner", [False, True])
def test_hooks_fire(inner: bool) -> None:
    cell = make_cell()
    call = make_call(cell)
    hooked = cell.edges[3].candidate("sep_conv_3x3") if inner else cell.edges[3]
    outputs = []
    handle = hooked.register_forward_hook(lambda module, args, output: outputs.append(output))
    y = cell(*call)
    assert len(outputs) == 1
    assert [edge.edge for node in cell.plan.nodes for edge in node.edges] == [3]
    handle.remove()
    torch.testing.assert_close(cell(*call), y)
    assert len(outputs) == 1
    assert not any(node.edges for node in cell.plan.nodes)


def test_a_hook_may_change_what_an_edge_adds() -> None:
    cell = make_cell()
    cell.edges[0].register_forward_hook(lambda module, args, output: 3 * output)
    assert_fused_equals_reference(cell, make_call(cell))


class Halved(MixedOp):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, weights) / 2


def halve(cell: SearchCell) -> None:
    halved = Halved(4, 1)
    halved.load_state_dict(cell.edges[1].state_dict())
    cell.edges[1] = halved.double()


def prune_one_operation(cell: SearchCell) -> None:
    cell.edges[1].ops[PRIMITIVES.index("sep_conv_5x5")] = Zero(1)
    cell.edges[4].ops[PRIMITIVES.index("max_pool_3x3")] = Zero(1)


def prune_all_that_enters_a_node(cell: SearchCell) -> None:
    for edge in cell.edges[:2]:
        for k in range(len(edge.ops)):
            edge.ops[k] = Zero(1)


def freeze_an_edge(cell: SearchCell) -> None:
    cell.edges[2].eval()


def freeze_one_batch_norm(cell: SearchCell) -> None:
    cell.edges[2].candidate("sep_conv_3x3").op[1].bn.eval()


def compile_an_edge(cell: SearchCell) -> None:
    cell.edges[0].compile(backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        halve,
        prune_one_operation,
        prune_all_that_enters_a_node,
        freeze_an_edge,
        freeze_one_batch_norm,
        compile_an_edge,
    ],
)
def test_follows_changes_of_the_cell(change: Callable[[SearchCell], None]) -> None:
    cell = make_cell()
    before = cell.plan
    assert cell.plan is before
    change(cell)
    assert cell.plan is not before
    assert_fused_equals_reference(cell, make_call(cell))


def test_follows_the_mode_without_a_new_plan() -> None:
    cell = make_cell()
    plan = cell.plan
    cell.eval()
    assert cell.plan is plan
    assert_fused_equals_reference(cell, make_call(cell))


# The search network


def make_supernet(channels: int = 2, layers: int = 3) -> Supernet:
    torch.manual_seed(0)
    return DARTS.supernet(in_channels=1, num_classes=3, channels=channels, layers=layers).double()


def batches(number: int) -> Iterator[tuple[Batch, Batch]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        images = torch.randn(2, 8, 1, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (2, 8), generator=generator)
        yield Batch(images[0], labels[0]), Batch(images[1], labels[1])


def search(executions: list[str], strategy: str) -> dict[str, Tensor]:
    """The state after one bilevel step for each of ``executions``."""
    supernet = make_supernet()
    step = make_step(supernet, strategy)
    for execution, (train, valid) in zip(executions, batches(len(executions)), strict=True):
        supernet.set_execution(execution)
        step(train, valid)
    return {name: tensor.double() for name, tensor in supernet.state_dict().items()}


@pytest.mark.parametrize("strategy", ["darts", "darts-2nd"])
def test_search_steps_are_the_same(strategy: str) -> None:
    expected = search(["reference", "reference"], strategy)
    assert_same(search(["fused", "fused"], strategy), expected, 1e-8)
    assert_same(search(["reference", "fused"], strategy), expected, 1e-8)


def test_asks_for_the_gradients_that_are_wanted() -> None:
    cell = make_cell()
    s0, s1, weights = make_call(cell)
    (grad_alpha,) = torch.autograd.grad(cell(s0.detach(), s1.detach(), weights).sum(), weights)
    assert grad_alpha.isfinite().all()
    parameters = list(cell.parameters())
    gradients = torch.autograd.grad(cell(s0.detach(), s1.detach(), weights.detach()).sum(), parameters)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_same_bits_every_time() -> None:
    cell = make_cell(dtype=torch.float32)
    call = make_call(cell)
    first = results(cell, call, fused=True)
    for _ in range(3):
        again = results(cell, call, fused=True)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_trains_after_inference_mode() -> None:
    cell = make_cell(reduction=True)
    call = make_call(cell, height=5, width=5)
    with torch.inference_mode():
        cell.eval()(*call)
    cell.train()(*call).sum().backward()
    assert call[2].grad.isfinite().all()


@pytest.mark.parametrize("autocast", [True, False])
def test_runs_in_bfloat16(layout: Layout, autocast: bool, more_operations: tuple[str, ...]) -> None:
    cell = make_cell(primitives=more_operations, dtype=torch.float32 if autocast else torch.bfloat16)
    s0, s1, weights = make_call(cell)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused = results(cell, (s0, s1, weights.float()), fused=True)
        expected = results(cell, (s0, s1, weights.float()), fused=False)
    error = (fused["y"].float() - expected["y"].float()).norm() / expected["y"].float().norm()
    assert error < 0.02
    assert (fused["y"].dtype == torch.bfloat16) or autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_takes_bfloat16_mixing_weights(layout: Layout, training: bool, dtype: torch.dtype) -> None:
    cell = make_cell(reduction=True, training=training, dtype=dtype)
    s0, s1, weights = make_call(cell)
    call = s0, s1, weights.bfloat16()
    fused, expected = (results(cell, call, fused)["y"] for fused in (True, False))
    assert (fused - expected).norm() / expected.norm() < 0.02


def test_takes_an_empty_batch_in_evaluation_mode() -> None:
    cell = make_cell(training=False)
    assert cell(*make_call(cell, batch=0)).shape == (0, 8, 7, 6)


def test_copies_pickles_and_states_hold_no_plan() -> None:
    supernet = make_supernet()
    names = list(supernet.state_dict())
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    supernet(x)
    assert list(supernet.state_dict()) == names
    supernet.eval()
    for twin in (copy.deepcopy(supernet), pickle.loads(pickle.dumps(supernet))):
        torch.testing.assert_close(twin(x), supernet(x))
        assert twin.cells[0].plan is not supernet.cells[0].plan
        with torch.no_grad():
            next(twin.cells[0].edges.parameters()).mul_(2)
        assert not torch.allclose(twin(x), supernet(x))


def test_an_unknown_execution_is_refused() -> None:
    with pytest.raises(UserError, match="fused, reference"):
        make_supernet().set_execution("fastest")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), (6, 8), (5, 7), (5,)])
def test_refuses_weights_of_another_shape(fused: bool, shape: tuple[int, ...]) -> None:
    cell = make_cell()
    cell.fused = fused
    s0, s1, _ = make_call(cell)
    with pytest.raises(UserError, match=r"\[5, 8\], not \["):
        cell(s0, s1, torch.zeros(shape, dtype=s0.dtype))


def test_batches_of_one_value_a_channel_fail_as_module_by_module() -> None:
    cell = make_cell(reduction=True)
    call = make_call(cell, batch=1, height=2, width=2)
    for fused in (True, False):
        cell.fused = fused
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            cell(*call)
