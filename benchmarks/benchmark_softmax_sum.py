"""``softmax_sum`` against the ways to write it in PyTorch, torch.compile and the memory floor.

``python benchmarks/benchmark_softmax_sum.py [--out FILE]`` takes about three minutes on one GPU. Each
implementation is held to the reference in fp64, forward and in every gradient, before it is timed;
one that fails is reported, not timed, and makes the exit code 1. The floor is the bytes that must
move (forward reads K tensors and writes one, backward reads K + 1 and writes K) over the bandwidth of
a copy measured in the same run.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _harness import (
    Spread,
    copy_gbps,
    device_ms,
    peak_bytes,
    results_from_arguments,
    sets_beyond_l2,
    wall_ms,
)
from torch import Tensor

from neuroexapt.cuda_ops import softmax_sum as ext
from neuroexapt.kernels import reference
from neuroexapt.kernels import softmax_sum_triton as triton

Sum = Callable[[list[Tensor], Tensor], Tensor]
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """K operands of one shape [B, C, H, W]."""

    name: str
    operands: int
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """Random operands and logits, every gradient wanted."""
        xs = [torch.randn(self.shape, device="cuda").to(self.dtype) for _ in range(self.operands)]
        logits = torch.randn(self.operands, device="cuda")
        return [x.requires_grad_() for x in xs], logits.requires_grad_()

    def tensor_bytes(self) -> int:
        """The size of one operand."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


CASES = [
    Case("small-k8", 8, (2, 16, 16, 16)),
    Case("medium-k8", 8, (4, 32, 32, 32)),
    Case("large-k12", 12, (4, 48, 32, 32)),
    Case("xlarge-k16", 16, (8, 64, 32, 32)),
    Case("darts-c16-k4", 4, (64, 16, 32, 32)),
    Case("darts-c16-k8", 8, (64, 16, 32, 32)),
    Case("darts-c16-k16", 16, (64, 16, 32, 32)),
    Case("darts-c32-k8", 8, (64, 32, 16, 16)),
    Case("darts-c64-k8", 8, (64, 64, 8, 8)),
    Case("past-l2-k8", 8, (256, 32, 32, 32)),
    Case("darts-c16-k8", 8, (64, 16, 32, 32), torch.bfloat16),
    Case("past-l2-k8", 8, (256, 32, 32, 32), torch.bfloat16),
]


def python_sum(xs: list[Tensor], logits: Tensor) -> Tensor:
    """``sum(w * x)``, as most searches write it."""
    return sum(w * x for w, x in zip(torch.softmax(logits, 0), xs, strict=True))  # type: ignore[return-value]


def stack(xs: list[Tensor], logits: Tensor) -> Tensor:
    """Stack, multiply, sum."""
    weights = torch.softmax(logits, 0).to(xs[0].dtype)
    return (torch.stack(xs) * weights.view(-1, 1, 1, 1, 1)).sum(0)


def einsum(xs: list[Tensor], logits: Tensor) -> Tensor:
    """Stack, then one contraction."""
    return torch.einsum("k,kbchw->bchw", torch.softmax(logits, 0).to(xs[0].dtype), torch.stack(xs))


def addcmul(xs: list[Tensor], logits: Tensor) -> Tensor:
    """A chain of fused multiply-adds."""
    weights = torch.softmax(logits, 0).to(xs[0].dtype)
    total = weights[0] * xs[0]
    for weight, x in zip(weights[1:], xs[1:], strict=True):
        total = torch.addcmul(total, weight, x)
    return total


def implementations() -> dict[str, Sum]:
    """By name; torch.compile is made anew for each case, so that it specialises on the shape."""
    torch.compiler.reset()
    return {
        "eager": python_sum,
        "stack": stack,
        "einsum": einsum,
        "addcmul": addcmul,
        "compile": torch.compile(python_sum, fullgraph=True, dynamic=False),
        "triton": triton.softmax_sum,
        "ext": ext.softmax_sum,
    }


def gradients(sum_op: Sum, xs: list[Tensor], logits: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    y = sum_op(xs, logits)
    return (y.detach(), *torch.autograd.grad(y, [*xs, logits], grad_y))


def largest_error(sum_op: Sum, case: Case) -> float:
    """Of the result and every gradient, relative to the largest value of the reference in fp64."""
    xs, logits = case.inputs()
    grad_y = torch.randn_like(xs[0])
    in_fp64 = [x.detach().double().requires_grad_() for x in xs], logits.detach().double().requires_grad_()
    exact = gradients(reference.softmax_sum, *in_fp64, grad_y.double())
    results = gradients(sum_op, xs, logits, grad_y)
    pairs = zip(results, exact, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def measure(sum_op: Sum, case: Case) -> dict[tuple[str, str, str], Spread]:
    """(direction, metric, unit) → figure."""
    sets = [case.inputs() for _ in range(sets_beyond_l2((case.operands + 1) * case.tensor_bytes()))]
    grads = [torch.randn_like(xs[0]) for xs, _ in sets]
    sums = [sum_op(xs, logits) for xs, logits in sets]

    def step() -> None:
        gradients(sum_op, *sets[0], grads[0])

    step()
    backward = [
        lambda y=y, xs=xs, logits=logits, g=g: torch.autograd.grad(y, [*xs, logits], g)
        for y, (xs, logits), g in zip(sums, sets, grads, strict=True)
    ]
    forward = [lambda xs=xs, logits=logits: sum_op(xs, logits).detach() for xs, logits in sets]
    return {
        ("backward", "device_ms", "ms"): device_ms(backward),
        ("forward", "device_ms", "ms"): device_ms(forward),
        ("forward+backward", "step_ms", "ms"): wall_ms(step),
        ("forward+backward", "peak_bytes", "bytes"): Spread.exactly(peak_bytes(step)),
    }


def main() -> int:
    results = results_from_arguments("softmax_sum", __doc__)
    torch.manual_seed(0)
    failed = False
    # One stream for forward, backward and capture: autograd runs a backward where its forward ran.
    with torch.cuda.stream(torch.cuda.Stream()):
        bandwidth = copy_gbps()
        results.add("copy-1gib", "copy_", "float32", "gbps", "GB/s", bandwidth)
        for case in CASES:
            dtype = str(case.dtype).removeprefix("torch.")
            passes = {"forward": case.operands + 1, "backward": 2 * case.operands + 1}
            for direction, tensors in passes.items():
                floor = Spread.exactly(tensors * case.tensor_bytes() / bandwidth.median / 1e6)
                results.add(f"{case.name}/{direction}", "floor", dtype, "device_ms", "ms", floor)
            for name, sum_op in implementations().items():
                error = largest_error(sum_op, case)
                if not error <= TOLERANCES[case.dtype]:
                    print(
                        f"{case.name} {dtype} {name}: error {error:.1e}, so it is not timed", file=sys.stderr
                    )
                    failed = True
                    continue
                for (direction, metric, unit), spread in measure(sum_op, case).items():
                    results.add(f"{case.name}/{direction}", name, dtype, metric, unit, spread, error)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
