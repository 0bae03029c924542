"""Dense convolutions that leave a state of a nas-bench-201 cell, 3x3 and 1x1 an edge, against PyTorch's.

``python benchmarks/benchmark_dense_conv.py [--quick] [--out FILE]`` takes less than a minute on one GPU.
``ext``: the kernels of the fused cell, with the moments of what leaves and with gradients formed from
dz = A · g + B · z + D. ``eager``: relu and joined convolutions by PyTorch, moments and dz by kernels. Each
is held to fp64 before it is timed; one that fails is reported, not timed, and makes the exit code 1.
"""

import sys
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from _harness import Results, device_ms, open_results, results_parser, sets_beyond_l2
from torch import Tensor

from neuroexapt.cuda_ops import cell_kernels
from neuroexapt.cuda_ops.branch import NoBranch
from neuroexapt.cuda_ops.cell_operands import DenseGrad

TOLERANCES = {"tf32": 1e-3, "float32": 1e-5}
KERNEL_SIZES = (3, 1)  # of every edge


@dataclass(frozen=True)
class Case:
    """The convolutions of ``edges`` edges that leave a state of a batch of 64."""

    channels: int
    side: int
    edges: int

    @property
    def name(self) -> str:
        return f"nb201-c{self.channels}-e{self.edges}"

    def operands(self) -> "Operands":
        size = (64, self.channels, self.side, self.side)
        x, grads = torch.randn(size, device="cuda"), []
        for kernel_size in self.edges * KERNEL_SIZES:
            shape = (self.channels, self.channels, kernel_size, kernel_size)
            weight = torch.randn(shape, device="cuda") / (self.channels * kernel_size**2) ** 0.5
            z, g = (torch.randn(size, device="cuda") for _ in range(2))
            grads.append(DenseGrad(weight, z, g, torch.randn(self.channels, 4, device="cuda")))
        return Operands(x, grads)

    @property
    def bytes_per_set(self) -> int:
        return 4 * 64 * self.channels * self.side**2 * (1 + 4 * self.edges)


@dataclass(frozen=True)
class Operands:
    x: Tensor
    grads: list[DenseGrad]

    def double(self) -> "Operands":
        return Operands(self.x.double(), [DenseGrad(*(t.double() for t in grad)) for grad in self.grads])


class Implementation(Protocol):
    """A way to run the convolutions both ways."""

    def forward(self, operands: Operands, exact: bool) -> list[Tensor]:
        """The outputs in order."""

    def backward(self, operands: Operands, exact: bool, wants_weights: bool) -> list[Tensor]:
        """The gradients of x and, where they are wanted, of the weights."""


class Extension:
    """The kernels of the fused cell."""

    def forward(self, operands: Operands, exact: bool) -> list[Tensor]:
        zs, _ = cell_kernels.convolve_dense(operands.x, [grad.weight for grad in operands.grads], exact)
        return zs

    def backward(self, operands: Operands, exact: bool, wants_weights: bool) -> list[Tensor]:
        dxs, partials = cell_kernels.backward_dense(
            operands.x, operands.grads, exact, wants_weights, NoBranch()
        )
        (dx,) = cell_kernels.state_gradients([cell_kernels.StateGrad(dxs[0], [], dxs)], 1, None)
        weights = [grad.weight for grad in operands.grads]
        return [dx, *(cell_kernels.reduce_partials(partials, weights) if wants_weights else [])]


class PyTorch:
    """Convolutions of one size as one."""

    def forward(self, operands: Operands, exact: bool) -> list[Tensor]:
        active, zs = F.relu(operands.x), {}
        for size, grads in self._by_size(operands.grads).items():
            z = F.conv2d(active, torch.cat([grad.weight for grad in grads]), padding=size // 2)
            zs[size] = iter(z.chunk(len(grads), 1))
        ordered = [next(zs[grad.weight.shape[-1]]) for grad in operands.grads]
        if operands.x.dtype == torch.float32:
            cell_kernels.plane_moments(ordered)
        return ordered

    def backward(self, operands: Operands, exact: bool, wants_weights: bool) -> list[Tensor]:
        x, dxs, of_weights = operands.x, [], {}
        active = F.relu(x)
        for size, grads in self._by_size(operands.grads).items():
            dz = torch.cat(self._dzs(grads), dim=1)
            weight, padding = torch.cat([grad.weight for grad in grads]), [size // 2] * 2
            wanted = [True, wants_weights, False]
            dx, dw, _ = torch.ops.aten.convolution_backward(
                dz, active, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, wanted
            )
            dxs.append(dx)
            of_weights[size] = iter(dw.chunk(len(grads)) if wants_weights else ())
        dx = torch.where(x > 0, sum(dxs), 0)
        return [dx, *(next(of_weights[grad.weight.shape[-1]]) for grad in operands.grads if wants_weights)]

    def _by_size(self, grads: list[DenseGrad]) -> dict[int, list[DenseGrad]]:
        return {size: [grad for grad in grads if grad.weight.shape[-1] == size] for size in KERNEL_SIZES}

    def _dzs(self, grads: list[DenseGrad]) -> list[Tensor]:
        _, zs, gs, coefs = zip(*grads, strict=True)
        if zs[0].dtype == torch.float32:
            return cell_kernels.affine_gradients(gs, zs, coefs)
        parts = [[part.view(-1, 1, 1) for part in coef.unbind(1)[:3]] for coef in coefs]
        return [a * g + b * z + d for (a, b, d), g, z in zip(parts, gs, zs, strict=True)]


IMPLEMENTATIONS: dict[str, Implementation] = {"eager": PyTorch(), "ext": Extension()}


def largest_error(implementation: Implementation, case: Case, exact: bool) -> float:
    """Of every result, relative in the Euclidean norm, against fp64."""
    operands, truth = case.operands(), PyTorch()
    in_fp64 = operands.double()
    got = [*implementation.forward(operands, exact), *implementation.backward(operands, exact, True)]
    right = [*truth.forward(in_fp64, True), *truth.backward(in_fp64, True, True)]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, right, strict=True))


def measure(results: Results, case: Case, name: str, dtype: str) -> bool:
    """Whether it was right."""
    implementation, exact = IMPLEMENTATIONS[name], dtype == "float32"
    error = largest_error(implementation, case, exact)
    if not error <= TOLERANCES[dtype]:
        results.add_status(case.name, name, dtype, f"failed: error {error:.1e}")
        return False
    sets = [case.operands() for _ in range(sets_beyond_l2(case.bytes_per_set))]
    directions = {
        "forward": lambda operands: implementation.forward(operands, exact),
        "backward": lambda operands: implementation.backward(operands, exact, False),
        "backward-weights": lambda operands: implementation.backward(operands, exact, True),
    }
    for direction, run in directions.items():
        calls = [lambda run=run, operands=operands: run(operands) for operands in sets]
        results.add(f"{case.name}/{direction}", name, dtype, "device_ms", "ms", device_ms(calls), error)
    return True


def main() -> int:
    parser = results_parser("dense_conv", __doc__)
    parser.add_argument("--quick", action="store_true", help="one and three edges with TF32 products alone")
    arguments = parser.parse_args()
    results, failed = open_results("dense_conv", arguments), False
    with torch.cuda.stream(torch.cuda.Stream()):
        for channels, side in ((16, 32), (32, 16), (64, 8)):
            for edges in (1, 3) if arguments.quick else (1, 2, 3):
                for dtype in ("tf32",) if arguments.quick else TOLERANCES:
                    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
                    for name in IMPLEMENTATIONS:
                        failed |= not measure(results, Case(channels, side, edges), name, dtype)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
