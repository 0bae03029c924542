"""What the benchmarks of operators on sequences share: a gated comparison, forward and backward together."""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _harness import (
    Results,
    Spread,
    device_ms,
    open_results,
    peak_bytes,
    results_parser,
    sets_beyond_l2,
    wall_ms,
)
from torch import Tensor

from neuroexapt.kernels.ragged import Ragged, to_jagged, to_padded

Op = Callable[..., Any]  # which gives a tensor or several
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_MOST_SETS = 32
_COMPILING_PROCESSES = 12


@dataclass
class Comparison:
    """Implementations of one operator at one size; the first of their inputs has the results' dtype."""

    name: str
    implementations: dict[str, Op]
    definition: Op
    make_inputs: Callable[[], list[Tensor]]


class Sequences:
    """Jagged sequences up to ``length`` long, half as long in the mean, and how plain PyTorch runs them."""

    def __init__(self, batch: int, length: int, device: str = "cuda") -> None:
        self.lengths = torch.linspace(1, length, batch, device=device).round().long()
        offsets = F.pad(self.lengths.cumsum(0), (1, 0))
        self.rows = int(offsets[-1])
        self.jagged = {"offsets": offsets, "max_length": length}
        self.layout = Ragged(offsets[:-1], self.lengths, length, self.rows)

    def padded(self, op: Op, operands: int) -> Op:
        """``op`` of jagged tensors, the first ``operands`` of its inputs, by way of padded ones."""

        def run(*inputs: Tensor) -> Tensor:
            sequences = [to_padded(x, self.layout) for x in inputs[:operands]]
            y = op(*sequences, *inputs[operands:], lengths=self.lengths)
            return to_jagged(y, self.layout)

        return run


def start(benchmark: str, description: str) -> tuple[Results, argparse.Namespace]:
    """The results file and the options: --quick times few cases, --sweep the kernels' block sizes."""
    parser = results_parser(benchmark, description)
    parser.add_argument("--quick", action="store_true", help="only eager, the best rivals and the kernels")
    parser.add_argument("--cases", default="", help="only cases whose names begin with this pattern")
    parser.add_argument("--sweep", action="store_true", help="time block sizes instead, recording nothing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    return open_results(benchmark, arguments), arguments


def compile_in_parallel(call: Callable[..., Any], arguments: Iterable[tuple]) -> None:
    """Fill the compilers' caches on disk: ``call`` each of ``arguments`` in a process of several."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # of each process
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_COMPILING_PROCESSES, mp_context=context) as pool:
        for future in [pool.submit(call, *each) for each in arguments]:
            future.exception()  # which the measurement itself will tell of


def compile_comparisons(
    compile_one: Callable[..., None], compared: Mapping[Any, Sequence[Comparison]]
) -> None:
    """Call ``compile_one(case, number of the comparison, implementation)`` for all that is compiled, kernels
    included, in parallel.
    """
    compile_in_parallel(
        compile_one,
        [
            (case, number, name)
            for case, comparisons in compared.items()
            for number, comparison in enumerate(comparisons)
            for name in comparison.implementations
            if "fused" in name or "compile" in name
        ],
    )


def add_floor(results: Results, name: str, moved_bytes: float, gbps: float) -> None:
    """Record how long a copy of as many bytes takes."""
    results.add(name, "floor", "bfloat16", "device_ms", "ms", Spread.exactly(moved_bytes / gbps / 1e6))


def results_of(op: Op, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One or several."""
    results = op(*inputs)
    return results if isinstance(results, tuple) else (results,)


def gradients(op: Op, inputs: Sequence[Tensor], y_gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results and the gradient of each input."""
    results = results_of(op, inputs)
    return (*(y.detach() for y in results), *torch.autograd.grad(results, inputs, y_gradients))


def random_gradients(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """One for each result of ``op``."""
    return [torch.randn_like(y) for y in results_of(op, inputs)]


def run_once(op: Op, inputs: Sequence[Tensor]) -> None:
    """Forward and backward."""
    results = results_of(op, inputs)
    torch.autograd.grad(results, inputs, [torch.ones_like(y) for y in results])


def exact_results(definition: Op, inputs: Sequence[Tensor], y_gradients: Sequence[Tensor]) -> list[Tensor]:
    """Results and gradients of the definition in fp64."""
    in_fp64 = [x.detach().double().requires_grad_() for x in inputs]
    return [x.float() for x in gradients(definition, in_fp64, [y.double() for y in y_gradients])]


def largest_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of results and gradients, each relative to the largest value of the exact one."""
    pairs = zip(results, exact, strict=True)
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def steps(
    op: Op, make_inputs: Callable[[], list[Tensor]], y_gradients: Sequence[Tensor]
) -> list[Callable[[], object]]:
    """Forward and backward on as many sets of inputs as exceed the L2 cache."""
    first = make_inputs()
    count = min(sets_beyond_l2(sum(x.nbytes for x in first)), _MOST_SETS)
    sets = [first, *(make_inputs() for _ in range(count - 1))]
    return [lambda xs=xs: gradients(op, xs, y_gradients) for xs in sets]


def time_op(op: Op, make_inputs: Callable[[], list[Tensor]]) -> Spread:
    """Forward and backward by graph replay, without a check: to compare block sizes."""
    calls = steps(op, make_inputs, random_gradients(op, make_inputs()))
    calls[0]()
    return device_ms(calls)


def compare(results: Results, comparison: Comparison) -> bool:
    """Time each implementation that is right; whether all were."""
    inputs = comparison.make_inputs()
    y_gradients = random_gradients(comparison.definition, inputs)
    exact = exact_results(comparison.definition, inputs, y_gradients)
    dtype, all_right = inputs[0].dtype, True
    name_of_dtype = str(dtype).removeprefix("torch.")
    for name, op in comparison.implementations.items():
        try:
            error = largest_error(gradients(op, inputs, y_gradients), exact)
        except RuntimeError as failure:
            reason = f"does not run: {str(failure).splitlines()[0]}"
            results.add_status(comparison.name, name, name_of_dtype, reason)
            continue
        if not error <= TOLERANCES[dtype]:
            print(f"{comparison.name} {name}: error {error:.1e}, so it is not timed", file=sys.stderr)
            all_right = False
            continue
        calls = steps(op, comparison.make_inputs, y_gradients)
        calls[0]()
        figures = {
            ("step_ms", "ms"): wall_ms(calls[0]),
            ("device_ms", "ms"): device_ms(calls),
            ("peak_bytes", "bytes"): Spread.exactly(peak_bytes(calls[0])),
        }
        for (metric, unit), spread in figures.items():
            results.add(comparison.name, name, name_of_dtype, metric, unit, spread, error)
    return all_right
