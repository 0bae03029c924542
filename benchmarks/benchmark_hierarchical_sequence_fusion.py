"""Times the fusion of windows, forward and backward: plain PyTorch, two formulations, compiled, kernels.

Every implementation is first held to the definition in fp64; one that is wrong is not timed. From the
repository's root: ``python benchmarks/benchmark_hierarchical_sequence_fusion.py``.
"""

import functools
import itertools
import sys

import torch
import torch.nn.functional as F
from _harness import Results, Spread, copy_gbps
from _sequences import Sequences, compare, start, time_op
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


def sweep() -> None:
    """Print the time of each size of blocks."""
    standard, standard_narrow = triton._blocks, triton._NARROW
    for case, narrow, (rows, chunk, warps, stages) in itertools.product(CASES, (0, 256), BLOCKS):
        changed = {"BM": rows, "BK": chunk, "num_warps": warps, "num_stages": stages}
        triton._blocks = lambda *sizes, changed=changed: standard(*sizes) | changed  # type: ignore[assignment]
        triton._NARROW = narrow
        name = f"{case} {'one kernel' if narrow else 'products between'} {changed}"
        try:
            spread = time_op(triton.hierarchical_sequence_fusion, functools.partial(make_inputs, *case))
        except Exception as error:  # what does not fit the chip fails in many ways
            print(f"{name}: {str(error).splitlines()[0][:80]}")
            continue
        print(f"{name}: {spread.median:.4f} ms", flush=True)
    triton._blocks, triton._NARROW = standard, standard_narrow


def compare_case(results: Results, batch: int, length: int, width: int, quick: bool) -> bool:
    """Padded, all sequences full; then jagged, half as long in the mean."""
    torch.compiler.reset()
    case = f"b{batch}-n{length}-d{width}"
    plain, kernels = definition.hierarchical_sequence_fusion, triton.hierarchical_sequence_fusion
    implementations = {
        "eager": plain,
        "cumsum": by_cumulative_sums,
        "compile": torch.compile(plain, dynamic=False),
        "cumsum-compile": torch.compile(by_cumulative_sums, dynamic=False),
        "fused": kernels,
    }
    if quick:
        implementations = {name: implementations[name] for name in ("eager", "compile", "fused")}
    make_padded = functools.partial(make_inputs, batch, length, width)
    all_right = compare(results, f"{case}/padded", implementations, plain, make_padded)

    sequences = Sequences(batch, length)

    def make_jagged() -> list[Tensor]:
        x, *weights = make_inputs(1, sequences.rows, width)
        return [x[0].detach().requires_grad_(), *weights]

    implementations = {
        "eager": sequences.padded(plain, 1),
        "compile": torch.compile(sequences.padded(plain, 1), dynamic=False),
        "fused": functools.partial(kernels, **sequences.jagged),
    }
    return (
        compare(results, f"{case}/jagged", implementations, sequences.padded(plain, 1), make_jagged)
        & all_right
    )


def main() -> int:
    results, arguments = start("hierarchical_sequence_fusion", __doc__)
    with torch.cuda.stream(torch.cuda.Stream()):
        if arguments.sweep:
            sweep()
            return 0
        bandwidth = copy_gbps().median
        for batch, length, width in CASES:
            # Forward reads x and writes y, backward reads x and dy and writes dx.
            floor = Spread.exactly(5 * batch * length * width * 2 / bandwidth / 1e6)
            results.add(f"b{batch}-n{length}-d{width}/padded", "floor", "bfloat16", "device_ms", "ms", floor)
        rights = [compare_case(results, *case, arguments.quick) for case in CASES]
        return int(not all(rights))


if __name__ == "__main__":
    sys.exit(main())
