"""Separable convolutions, pools and whole edges (MixedOp) at the DARTS shapes, forward and backward.

``python benchmarks/performance_validation_benchmark.py [--out FILE]`` takes about four minutes on one GPU.
Each implementation is held to the definition in fp64, forward and in every gradient, before it is
timed; one that fails is reported, not timed, and makes the exit code 1. ``float32`` has exact products,
``tf32`` lets convolutions round to TF32, PyTorch's default. An edge runs as in a network of its own, batch
normalisations included: ``fused`` as shipped, ``triton`` as a cell in Triton, ``ext`` as one in CUDA C++;
what these do not know runs in PyTorch. Its eager version, ``sum(w * op(x))``, is the same
module operation by operation on PyTorch's own kernels. It is not compiled, which takes up to a minute.
The floor is the bytes that must move over the bandwidth of a copy measured in the same run.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from _harness import (
    Results,
    Spread,
    copy_gbps,
    device_ms,
    peak_bytes,
    results_from_arguments,
    sets_beyond_l2,
    wall_ms,
)
from torch import Tensor

from neuroexapt.backend import use_backend
from neuroexapt.core.operations import OPS, PRIMITIVES, DilConv, MixedOp, Pool, ReLUConvBN
from neuroexapt.cuda_ops import sepconv as sepconv_ext
from neuroexapt.kernels import pool_triton, reference, sepconv_triton

Op = Callable[..., Tensor]
BATCH = 64
SHAPES = ((16, 32), (32, 16), (64, 8))  # channels, pixels a side: the DARTS search network
TOLERANCES = {"float32": 2e-5, "tf32": 2e-2, "bfloat16": 4e-2}
# A rounding error before a relu or a maximum sends single gradients another way.
EDGE_TOLERANCE = 2e-2

OPS |= {
    "avg_pool_5x5": lambda channels, stride, affine: Pool("avg", 5, stride),
    "max_pool_5x5": lambda channels, stride, affine: Pool("max", 5, stride),
    "avg_pool_7x7": lambda channels, stride, affine: Pool("avg", 7, stride),
    "max_pool_7x7": lambda channels, stride, affine: Pool("max", 7, stride),
    "dil_conv_7x7": lambda channels, stride, affine: DilConv(channels, channels, 7, stride, 2, affine),
    "conv_1x1": lambda channels, stride, affine: ReLUConvBN(channels, channels, 1, stride, 0, affine),
    "conv_3x3": lambda channels, stride, affine: ReLUConvBN(channels, channels, 3, stride, 1, affine),
}
TWELVE = (*PRIMITIVES, "sep_conv_7x7", "dil_conv_7x7", "avg_pool_5x5", "max_pool_5x5")
EDGES = {
    4: ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"),
    8: PRIMITIVES,
    12: TWELVE,
    16: (*TWELVE, "avg_pool_7x7", "max_pool_7x7", "conv_1x1", "conv_3x3"),
}


@dataclass(frozen=True)
class Case:
    """A function at one shape: its definition for fp64, implementations by name, and fresh inputs."""

    name: str
    dtype: str
    tolerance: float
    definition: Op
    implementations: dict[str, Op]
    make_leaves: Callable[[], list[Tensor]]

    def leaves(self) -> list[Tensor]:
        """Inputs of the case's dtype, every gradient wanted; the first is the picture."""
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        return [leaf.to(dtype).requires_grad_() for leaf in self.make_leaves()]


def op_cases(dtype: str) -> Iterator[Case]:
    for channels, size in SHAPES:
        for name, k, options in (
            ("sep_conv_3x3", 3, {}),
            ("sep_conv_5x5", 5, {}),
            ("dil_conv_3x3", 3, {"dilation": 2}),
            ("dil_conv_5x5", 5, {"dilation": 2}),
            ("sep_conv_5x5-stride2", 5, {"stride": 2}),
        ):
            kernels = {"triton": sepconv_triton.sepconv}
            if dtype != "bfloat16":
                kernels["ext"] = sepconv_ext.sepconv
            leaves = functools.partial(sepconv_leaves, channels, size, k)
            yield op_case(name, dtype, channels, size, reference.sepconv, kernels, options, leaves)
        for name, op, options in (
            ("avg_pool_3x3", "avg_pool", {"kernel_size": 3}),
            ("max_pool_3x3", "max_pool", {"kernel_size": 3}),
            ("max_pool_5x5", "max_pool", {"kernel_size": 5}),
            ("global_avg_pool", "global_avg_pool", {}),
        ):
            kernels = {"triton": getattr(pool_triton, op)}
            leaves = functools.partial(picture, channels, size)
            yield op_case(name, dtype, channels, size, getattr(reference, op), kernels, options, leaves)


def op_case(
    name: str,
    dtype: str,
    channels: int,
    size: int,
    definition: Op,
    kernels: dict[str, Op],
    options: dict[str, int],
    make_leaves: Callable[[], list[Tensor]],
) -> Case:
    eager = functools.partial(definition, **options)
    ops: dict[str, Op] = {"eager": eager}
    ops |= {tier: functools.partial(op, **options) for tier, op in kernels.items()}
    if dtype == "float32":  # compiling takes most of this benchmark's time
        ops["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    name = f"{name}-c{channels}-{size}x{size}-b{BATCH}"
    return Case(name, dtype, TOLERANCES[dtype], eager, ops, make_leaves)


def picture(channels: int, size: int) -> list[Tensor]:
    return [torch.randn(BATCH, channels, size, size, device="cuda")]


def sepconv_leaves(channels: int, size: int, k: int) -> list[Tensor]:
    """A picture, and weights scaled so that outputs are near 1."""
    depthwise = torch.randn(channels, 1, k, k, device="cuda") / k
    pointwise = torch.randn(channels, channels, 1, 1, device="cuda") / channels**0.5
    return [*picture(channels, size), depthwise, pointwise]


def edge_cases() -> Iterator[Case]:
    shapes = [(count, *SHAPES[0]) for count in EDGES] + [(8, *shape) for shape in SHAPES[1:]]
    for count, channels, size in shapes:
        yield edge_case(count, channels, size)


def edge_case(count: int, channels: int, size: int) -> Case:
    """An edge as a function of its input, its weights and its modules' parameters."""
    edge = MixedOp(channels, 1, EDGES[count]).cuda()
    parameters = dict(edge.named_parameters())
    exact_edge = copy.deepcopy(edge).double()
    exact_edge.fused = False

    def definition(x: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        with use_backend("cuda:torch"):
            return torch.func.functional_call(exact_edge, named, (x, weights))

    def on(backend: str) -> Op:
        def op(x: Tensor, weights: Tensor, *_parameters: Tensor) -> Tensor:
            with use_backend(backend):
                return edge(x, weights)

        return op

    def make_leaves() -> list[Tensor]:
        return [*picture(channels, size), torch.rand(count, device="cuda"), *parameters.values()]

    ops = {"eager": on("cuda:torch"), "fused": on("cuda"), "triton": on("cuda:triton"), "ext": on("cuda:ext")}
    name = f"mixed_op-k{count}-c{channels}-{size}x{size}-b{BATCH}"
    return Case(name, "float32", EDGE_TOLERANCE, definition, ops, make_leaves)


def forward_backward(op: Op, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def largest_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Of output and gradients, each relative to its own largest value."""
    pairs = zip(actual, exact, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def compare(results: Results, case: Case, gbps: float) -> bool:
    """Check and measure a case's implementations; whether all were right."""
    leaves = case.leaves()
    dy = torch.randn_like(case.implementations["eager"](*leaves))
    in_fp64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = forward_backward(case.definition, in_fp64, dy.double())
    moved = 3 * leaves[0].nbytes + 2 * dy.nbytes  # x twice, its gradient, y and its gradient
    sets = [(case.leaves(), torch.randn_like(dy)) for _ in range(sets_beyond_l2(moved))]
    right = True
    for name, op in case.implementations.items():
        error = largest_error(forward_backward(op, leaves, dy), exact)
        if error <= case.tolerance:
            measure(results, case, name, error, op, sets)
        else:
            print(f"{case.name} {case.dtype} {name}: error {error:.1e}, so it is not timed", file=sys.stderr)
            right = False
    floor = Spread.exactly(moved / gbps / 1e6)
    results.add(f"{case.name}/forward+backward", "floor", case.dtype, "device_ms", "ms", floor)
    return right


def measure(
    results: Results,
    case: Case,
    implementation: str,
    error: float,
    op: Op,
    sets: list[tuple[list[Tensor], Tensor]],
) -> None:
    both = [functools.partial(forward_backward, op, *one) for one in sets]
    forward = [functools.partial(op, *leaves) for leaves, _ in sets]
    figures = (
        ("forward+backward", "device_ms", "ms", device_ms(both)),
        ("forward", "device_ms", "ms", device_ms(forward)),
        ("forward+backward", "step_ms", "ms", wall_ms(both[0])),
        ("forward+backward", "peak_bytes", "bytes", Spread.exactly(peak_bytes(both[0]))),
    )
    for direction, metric, unit, spread in figures:
        results.add(f"{case.name}/{direction}", implementation, case.dtype, metric, unit, spread, error)


def main() -> int:
    results = results_from_arguments("performance_validation", __doc__)
    torch.manual_seed(0)
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    right = True
    # One stream for forward, backward and capture: autograd runs a backward where its forward ran.
    with torch.cuda.stream(torch.cuda.Stream()):
        bandwidth = copy_gbps()
        results.add("copy-1gib", "copy_", "float32", "gbps", "GB/s", bandwidth)
        for dtype in TOLERANCES:
            convolutions.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
            for case in op_cases(dtype):
                right &= compare(results, case, bandwidth.median)
                torch.compiler.reset()
        convolutions.fp32_precision = "ieee"
        for case in edge_cases():
            right &= compare(results, case, bandwidth.median)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
