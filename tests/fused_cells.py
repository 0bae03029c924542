"""What both tiers of the fused cell are held to on a GPU: whole cells, which ``run`` computes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuroexapt.backend.dispatch import dispatch_report, reset_dispatch_report
from neuroexapt.backend.registry import use_backend
from neuroexapt.core.cells import SearchCell
from neuroexapt.core.operations import MixedOp
from tests.cuda_graphs import assert_replays_the_same_bits
from tests.cuda_ops.test_cell import make_cell, make_cell_of_one_input, make_inputs, results, run_reference

Run = Callable[..., Tensor]


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    assert got.shape == wanted.shape
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def exact_to_fp32(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


def cell_on_gpu(
    channels: int, size: tuple[int, ...], reduction: bool = False
) -> tuple[SearchCell, tuple[Tensor, ...]]:
    cell = make_cell(reduction, channels)
    return cell.cuda(), tuple(x.cuda() for x in make_inputs(cell, size, channels))


def run_edge(tier: str) -> Run:
    """An edge in use by itself."""

    def run(edge: MixedOp, x: Tensor, weights: Tensor) -> Tensor:
        with use_backend(f"cuda:{tier}"):
            reset_dispatch_report()
            y = edge(x, weights)
        assert ("cell", tier) in {(decision.op, decision.impl) for decision in dispatch_report()}
        return y

    return run


def assert_as_good_as_eager(
    run: Run, module: nn.Module, inputs: tuple[Tensor, ...], *wants: bool, reference: Run = run_reference
) -> None:
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


def assert_takes_one_input(
    run: Run, channels: int, size: tuple[int, ...], training: bool, wants: tuple[bool, bool]
) -> None:
    """And the last node alone as the output, as cells of nas-bench-201 have it."""
    cell, inputs = make_cell_of_one_input(channels, size)
    inputs = tuple(x.cuda() for x in inputs)
    cell = cell.cuda().train(training)
    assert_as_good_as_eager(run, cell, inputs, *wants, reference=SearchCell.forward)


def assert_bf16_is_as_good_as_autocast(
    run: Run, cell: SearchCell, inputs: tuple[Tensor, ...], wants: tuple[bool, bool]
) -> None:
    """Over several states together: activations whose sign flips make either worse by half on one of them."""
    *states, weights = inputs
    found: list[tuple[dict[str, Tensor], ...]] = []
    for seed in range(4):
        torch.manual_seed(seed)
        drawn = [torch.randn_like(x).bfloat16() for x in states]
        exact_inputs = (*(x.double() for x in drawn), weights)
        expected = results(run_reference, cell.double(), exact_inputs, *wants)
        cell, inputs = cell.float(), (*drawn, weights.float())
        eager = results(_under_autocast(run_reference), cell, inputs, *wants)
        actual = results(_under_autocast(run), cell, inputs, *wants)
        assert actual["y"].dtype == torch.bfloat16
        found.append((actual, eager, expected))
    for kind in ("y", "grad of input", "grad of ", "buffer"):
        got, by_eager, wanted = (
            torch.cat([_of_kind(kind, of_seed) for of_seed in of_way]) for of_way in zip(*found, strict=True)
        )
        ours, eagers = error(got, wanted), error(by_eager, wanted)
        assert ours <= max(5e-3, 1.25 * eagers), f"{kind}: {ours:.4f}, eager {eagers:.4f}"


def assert_products_are_tf32(run: Run, tolerance: float) -> None:
    cell, inputs = cell_on_gpu(32, (8, 16, 16))
    expected = run_reference(cell, *inputs)
    y = run(cell.float(), *exact_to_fp32(inputs))
    assert 1e-6 < error(y, expected) < tolerance


def assert_twenty_runs_give_the_same_bits(run: Run, reduction: bool, stored: torch.dtype) -> None:
    cell, (*states, weights) = cell_on_gpu(16, (64, 32, 32), reduction)
    cell, inputs = cell.float(), (*(x.to(stored) for x in states), weights.float())
    first = results(run, cell, inputs)
    for _ in range(19):
        again = results(run, cell, inputs)
        assert all(torch.equal(again[name], wanted) for name, wanted in first.items())


def assert_runs_inside_a_cuda_graph(run: Run, reduction: bool) -> None:
    cell, inputs = cell_on_gpu(16, (8, 16, 16), reduction)
    cell, leaves = cell.float(), [x.float().requires_grad_() for x in inputs]
    leaves += list(cell.edges.parameters())
    torch.use_deterministic_algorithms(False)  # filling memory with NaN would be captured, too

    def step() -> list[Tensor]:
        y = run(cell, *leaves[:3])
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    assert_replays_the_same_bits(step)


def _of_kind(kind: str, found: dict[str, Tensor]) -> Tensor:
    """All that is named so, in a row."""
    named = (tensor for name, tensor in found.items() if name.startswith(kind) and tensor is not None)
    return torch.cat([tensor.double().flatten() for tensor in named])


def _under_autocast(run: Run) -> Run:
    def inside(module: nn.Module, *arguments: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return run(module, *arguments)

    return inside
