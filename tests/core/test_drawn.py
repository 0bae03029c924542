"""Candidates of weight 0 that do not run: by the plan, module by module, and where nobody may look."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.core import drawn, merged
from neuroexapt.core.cells import CellTopology, OneInput, SearchCell, TwoInputs
from neuroexapt.core.operations import PRIMITIVES
from neuroexapt.spaces import nas_bench_201

CHANNELS = 4


def darts_cell(reduction: bool) -> SearchCell:
    inputs = TwoInputs(CHANNELS, CHANNELS, CHANNELS, False, affine=False)
    return SearchCell(CellTopology(2), PRIMITIVES, inputs, CHANNELS, reduction=reduction)


CELLS: dict[str, Callable[[], SearchCell]] = {
    "normal": lambda: darts_cell(reduction=False),
    "reduction": lambda: darts_cell(reduction=True),
    "nas-bench-201": lambda: SearchCell(
        nas_bench_201.TOPOLOGY, nas_bench_201.PRIMITIVES, OneInput(), CHANNELS, norm_pools=False
    ),
}


@pytest.fixture(params=CELLS)
def cell(request: pytest.FixtureRequest) -> SearchCell:
    torch.manual_seed(0)
    return CELLS[request.param]().double()


def one_hot(cell: SearchCell, columns: list[int]) -> Tensor:
    """[E, K]; edge e draws candidate ``columns[e % len(columns)]``."""
    rows = [columns[row % len(columns)] for row in range(len(cell.edges))]
    return torch.eye(len(cell.edges[0].ops), dtype=torch.double)[rows].requires_grad_()


def run(cell: SearchCell, weights: Tensor, *, drawn_only: bool, fused: bool) -> dict[str, Tensor | None]:
    """Output, gradients and buffers of a copy of ``cell``."""
    cell = copy.deepcopy(cell)
    cell.drawn_only, cell.fused = drawn_only, fused
    torch.manual_seed(1)
    xs = [torch.randn(3, CHANNELS, 8, 8, dtype=torch.double) for _ in range(cell.topology.inputs)]
    xs = [x.requires_grad_() for x in xs]
    y = cell(*xs, weights)
    wanted = dict(enumerate(xs)) | {"α": weights} | dict(cell.named_parameters())
    found = torch.autograd.grad(y, wanted.values(), torch.randn_like(y), allow_unused=True)
    gradients = {f"gradient of {name}": g for name, g in zip(wanted, found, strict=True)}
    return {"y": y.detach(), **gradients, **dict(cell.named_buffers())}


class One(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[:, :, :: self.stride, :: self.stride])


def drawn_by_hand(cell: SearchCell, weights: Tensor) -> SearchCell:
    """A copy in which only the drawn candidates are there, and constants in the places of the others."""
    cell = copy.deepcopy(cell)
    for edge, row in zip(cell.edges, weights, strict=True):
        for k in range(len(edge.ops)):
            if row[k] == 0:
                edge.ops[k] = One(edge.stride)
    return cell


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, wanted in expected.items():
        got = actual[name]
        if wanted is None or got is None:
            assert not any(found.any() for found in (wanted, got) if found is not None), name
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=name)


DRAWS = [[1, 2, 3], [3, 0, 4], [4, 1, 0, 2], [0]]


@pytest.mark.parametrize("columns", DRAWS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("readable", "training"), [(True, True), (False, True), (True, False)])
def test_equals_a_cell_of_the_drawn_candidates(cell, columns, fused, readable, training, monkeypatch):
    if not readable:
        for module in (drawn, merged):
            monkeypatch.setattr(module, "can_be_read", lambda weights: False)
    weights = one_hot(cell, columns)
    actual = run(cell.train(training), weights, drawn_only=True, fused=fused)
    expected = run(drawn_by_hand(cell, weights), weights, drawn_only=False, fused=False)
    assert actual["gradient of α"][weights == 0].any()
    assert_same(actual, expected)
    before = dict(cell.named_buffers())
    for name in before.keys() - expected.keys():  # of the others
        assert torch.equal(actual[name], before[name]), name
    for name in actual.keys() - expected.keys() - before.keys():
        assert actual[name] is None or not actual[name].any(), name


@pytest.mark.parametrize("fused", [True, False])
def test_weights_that_are_not_zero_count_as_ever(cell, fused):
    torch.manual_seed(0)
    weights = torch.rand_like(one_hot(cell, [0])).requires_grad_()
    assert_same(
        run(cell, weights, drawn_only=True, fused=fused), run(cell, weights, drawn_only=False, fused=fused)
    )


@pytest.mark.parametrize("fused", [True, False])
def test_operations_that_were_not_drawn_are_not_called(fused):
    calls = []

    class Recorded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return x

    cell = darts_cell(reduction=False).double()
    for edge in cell.edges:
        edge.ops[3] = Recorded()
    run(cell, one_hot(cell, [3, 1, 2]), drawn_only=True, fused=fused)
    assert len(calls) == 2  # of five edges


def test_the_constants_of_an_edge_with_hooks_count_once(cell):
    weights = one_hot(cell, [1, 2, 3])
    cell.edges[1].register_forward_hook(lambda edge, arguments, y: None)
    expected = run(drawn_by_hand(cell, weights), weights, drawn_only=False, fused=False)
    assert_same(run(cell, weights, drawn_only=True, fused=True), expected)


def test_constants_cost_nothing_where_only_the_weights_of_operations_learn():
    y = torch.ones(2, requires_grad=True)
    for learns_alpha in (True, False):
        _, constants = drawn.part(torch.eye(3, requires_grad=learns_alpha))
        assert (drawn.add_constants(y, constants.unbind()) is y) != learns_alpha
