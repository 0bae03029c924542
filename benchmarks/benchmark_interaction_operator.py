"""Times the dot interaction of DLRM, forward and backward: plain PyTorch, compiled, one kernel each way.

Every implementation is first held to the definition in fp64; one that is wrong is not timed. The floor is
the bytes that must move (forward reads the vectors and writes the result, backward reads the vectors and the
result's gradient and writes the vectors') over the bandwidth of a copy. From the repository's root:
``python benchmarks/benchmark_interaction_operator.py``.
"""

import functools
import sys

import torch
from _harness import Results, Spread, copy_gbps
from _sequences import Comparison, Op, compare, start, time_op
from torch import Tensor

from neuroexapt.kernels import interaction_operator as definition
from neuroexapt.kernels import interaction_operator_triton as triton

# Batch, fields, width.
CASES = [(1024, 26, 64), (8192, 26, 64), (4096, 50, 128)]
WARPS = (2, 4, 8)


def make_inputs(batch: int, fields: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """The dense vector and the fields, both gradients wanted."""
    shapes = (batch, width), (batch, fields, width)
    return [(torch.randn(shape, device="cuda") / 4).to(dtype).requires_grad_() for shape in shapes]


def floor_ms(batch: int, fields: int, width: int, dtype: torch.dtype, gbps: float) -> float:
    vectors = (fields + 1) * width
    result = width + fields * (fields + 1) // 2
    return batch * (3 * vectors + 2 * result) * dtype.itemsize / gbps / 1e6


def sweep() -> None:
    """Print the time with other numbers of warps."""
    standard = triton._blocks
    for case in CASES:
        for warps in WARPS:
            changed = {"num_warps": warps}
            triton._blocks = lambda *sizes, changed=changed: standard(*sizes) | changed  # type: ignore[assignment]
            make = functools.partial(make_inputs, *case, torch.bfloat16)
            spread = time_op(triton.interaction_operator, make)
            print(f"{case} {warps} warps: {spread.median:.4f} ms", flush=True)
    triton._blocks = standard


def compare_case(
    results: Results, case: tuple[int, int, int], dtype: torch.dtype, quick: bool, gbps: float
) -> bool:
    torch.compiler.reset()
    batch, fields, width = case
    name = f"b{batch}-f{fields}-d{width}"
    floor = Spread.exactly(floor_ms(*case, dtype, gbps))
    results.add(name, "floor", str(dtype).removeprefix("torch."), "device_ms", "ms", floor)
    plain = definition.interaction_operator
    implementations: dict[str, Op] = {"fused": triton.interaction_operator, "eager": plain}
    if not quick:
        implementations["compile"] = torch.compile(plain, dynamic=False)
    make = functools.partial(make_inputs, *case, dtype)
    return compare(results, Comparison(name, implementations, plain, make))


def main() -> int:
    results, arguments = start("interaction_operator", __doc__)
    dtypes = [torch.bfloat16] if arguments.quick else [torch.bfloat16, torch.float32]
    with torch.cuda.stream(torch.cuda.Stream()):
        if arguments.sweep:
            sweep()
            return 0
        gbps = copy_gbps().median
        rights = [
            compare_case(results, case, dtype, arguments.quick, gbps) for dtype in dtypes for case in CASES
        ]
    return int(not all(rights))


if __name__ == "__main__":
    sys.exit(main())
