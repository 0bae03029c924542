"""Times the fusion of windows, forward and backward: plain PyTorch, two formulations, compiled, kernels.

Every implementation is first held to the definition in fp64; one that is wrong is not timed. From the
repository's root: ``python benchmarks/benchmark_hierarchical_sequence_fusion.py``.
"""

import functools
import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _harness import copy_gbps
from _sequences import (
    Comparison,
    Op,
    Sequences,
    add_floor,
    compare,
    compile_comparisons,
    compile_in_parallel,
    run_once,
    start,
    time_op,
)
from torch import Tensor

from neuroexapt.kernels import hierarchical_sequence_fusion as definition
from neuroexapt.kernels import hierarchical_sequence_fusion_triton as triton

WINDOWS = (1, 3, 7, 15)
# What --sweep tries: rows and features a tile, warps, stages.
BLOCKS = [
    (32, 32, 4, 2),
    (32, 32, 8, 2),
    (32, 64, 4, 1),
    (64, 32, 4, 2),
    (64, 32, 8, 1),
    (64, 32, 8, 2),
    (64, 32, 8, 3),
    (64, 64, 4, 1),
    (64, 64, 8, 1),
]
# Sequences, positions, features.
CASES = [(128, 50, 64), (128, 200, 64), (32, 1024, 256)]


def make_inputs(batch: int, length: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x and the weights, every gradient wanted."""
    x = torch.randn(batch, length, width, device="cuda")
    shapes = (len(WINDOWS), width), (width, 2 * width), (width,), (width, width), (width,), (width,)
    weights = [torch.randn(shape, device="cuda") / (width**0.5 if len(shape) > 1 else 1) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in (x, *weights)]


def by_cumulative_sums(x: Tensor, *weights: Tensor) -> Tensor:
    """Every mean as a difference of two cumulative sums, which are kept in fp32."""
    scales, gate_weight, gate_bias, out_weight, norm_weight, norm_bias = weights
    sums = F.pad(x.float().cumsum(1), (0, 0, 1, 0))  # [B, N + 1, D]
    ends = torch.arange(1, x.shape[1] + 1, device=x.device)
    starts = [(ends - window).clamp(min=0) for window in WINDOWS]
    means = [(sums[:, 1:] - sums[:, start]) / (ends - start)[:, None] for start in starts]
    shares = torch.softmax(F.linear(x, scales), dim=-1)
    fused = torch.einsum("bnk,bnkd->bnd", shares, torch.stack(means, dim=-2).to(x.dtype))
    gate = torch.sigmoid(F.linear(torch.cat([x, fused], dim=-1), gate_weight, gate_bias))
    return F.layer_norm(x + gate * F.linear(fused, out_weight), x.shape[-1:], norm_weight, norm_bias)


def jagged_inputs(rows: int, width: int) -> list[Tensor]:
    """x [T, D] and the weights."""
    x, *weights = make_inputs(1, rows, width)
    return [x[0].detach().requires_grad_(), *weights]


def name_of(batch: int, length: int, width: int) -> str:
    """As results are recorded under."""
    return f"b{batch}-n{length}-d{width}"


def comparisons(batch: int, length: int, width: int, quick: bool) -> list[Comparison]:
    """Padded, all sequences full; then jagged, half as long in the mean."""
    case = name_of(batch, length, width)
    plain, kernels = definition.hierarchical_sequence_fusion, triton.hierarchical_sequence_fusion
    sequences = Sequences(batch, length)
    by_padding = sequences.padded(plain, 1)
    padded: dict[str, Op] = {
        "eager": plain,
        "cumsum": by_cumulative_sums,
        "compile": torch.compile(plain, dynamic=False),
        "cumsum-compile": torch.compile(by_cumulative_sums, dynamic=False),
        "fused": kernels,
    }
    jagged: dict[str, Op] = {
        "eager": by_padding,
        "fused": functools.partial(kernels, **sequences.jagged),
    }
    if quick:
        padded = {name: padded[name] for name in ("eager", "compile", "fused")}
    make_padded = functools.partial(make_inputs, batch, length, width)
    make_jagged = functools.partial(jagged_inputs, sequences.rows, width)
    return [
        Comparison(f"{case}/padded", padded, plain, make_padded),
        Comparison(f"{case}/jagged", jagged, by_padding, make_jagged),
    ]


def compile_one(case: tuple[int, int, int], is_jagged: bool, name: str) -> None:
    """Fill the caches with what one implementation needs."""
    comparison = comparisons(*case, quick=False)[is_jagged]
    run_once(comparison.implementations[name], comparison.make_inputs())


def run_with_blocks(case: tuple[int, int, int], narrow: int, changed: dict, run: Callable[..., Any]) -> Any:
    """``run`` the kernels at ``case`` with other block sizes."""
    standard, standard_narrow = triton._blocks, triton._NARROW
    triton._blocks = lambda *sizes: standard(*sizes) | changed  # type: ignore[assignment]
    triton._NARROW = narrow
    try:
        return run(triton.hierarchical_sequence_fusion, functools.partial(make_inputs, *case))
    finally:
        triton._blocks, triton._NARROW = standard, standard_narrow


def compile_blocks(case: tuple[int, int, int], narrow: int, changed: dict) -> None:
    """Fill the caches with the kernels of these block sizes."""
    run_with_blocks(case, narrow, changed, lambda op, make: run_once(op, make()))


def sweep() -> None:
    """Print the time of each size of blocks."""
    names = "BM", "BK", "num_warps", "num_stages"
    sizes = [dict(zip(names, blocks, strict=True)) for blocks in BLOCKS]
    combinations = list(itertools.product(CASES, (0, 256), sizes))
    compile_in_parallel(compile_blocks, combinations)
    for case, narrow, changed in combinations:
        name = f"{case} {'one kernel' if narrow else 'products between'} {[*changed.values()]}"
        try:
            spread = run_with_blocks(case, narrow, changed, time_op)
        except Exception as error:  # what does not fit the chip fails in many ways
            print(f"{name}: {str(error).splitlines()[0][:80]}")
            continue
        print(f"{name}: {spread.median:.4f} ms", flush=True)


def main() -> int:
    results, arguments = start("hierarchical_sequence_fusion", __doc__)
    with torch.cuda.stream(torch.cuda.Stream()):
        if arguments.sweep:
            sweep()
            return 0
        cases = [case for case in CASES if re.match(arguments.cases, name_of(*case))]
        compared = {case: comparisons(*case, arguments.quick) for case in cases}
        compile_comparisons(compile_one, compared)
        gbps = copy_gbps().median
        for (batch, length, width), (padded, _) in compared.items():
            # Forward reads x and writes y, backward reads x and dy and writes dx.
            add_floor(results, padded.name, 5 * batch * length * width * 2, gbps)
        pairs = reversed(compared.values())  # what is measured with most interest comes first
        rights = [compare(results, comparison) for pair in pairs for comparison in pair]
        return int(not all(rights))


if __name__ == "__main__":
    sys.exit(main())
