"""HSTU's attention with its position table against the ways to write it in PyTorch, forward and backward.

``python benchmarks/benchmark_hstu_hierarchical_attention.py [--quick] [--sweep] [--out FILE]`` takes about
four minutes on one GPU, with ``--quick`` (kernels and eager alone) one. Each implementation is held to the
definition in fp64, its result and every gradient, on two of the sequences before it is timed; one that fails
is reported, not timed, and makes the exit code 1. Where sequences are jagged their lengths spread evenly from
half to all of N; what is not ours then runs on padded input. ``--sweep`` times each kernel for itself with
other tiles than its table's.

FlexAttention has a softmax, which log(SiLU(s) + c) as score and the log-sum-exp undo: they give
Σ (SiLU(s) + c) v, from which c Σ v is taken. ``public`` is the Triton kernel of meta-recsys's
generative-recommenders, which has no bias: compare it with ``triton-no-bias``. It is measured where that
package is installed, from N = 1,024 on, since it tunes itself for minutes.
"""

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

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
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from neuroexapt.kernels import hstu_hierarchical_attention_triton as kernels
from neuroexapt.kernels.hstu_hierarchical_attention import hstu_hierarchical_attention as definition

BENCHMARK = "hstu_hierarchical_attention"
DTYPE = torch.bfloat16
TOLERANCE = 4e-2
# More than the 0.2785 below zero that SiLU never falls under.
_SHIFT = 0.3


@dataclass(frozen=True)
class Case:
    """B sequences of at most N positions, H heads in a model of width D."""

    batch: int
    length: int
    width: int
    heads: int
    is_jagged: bool = False

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}x{self.heads}" + ("-jagged" if self.is_jagged else "")

    @property
    def offsets(self) -> Tensor:
        """Where sequences start; their lengths are N, or spread from half of N to N where jagged."""
        first = self.length / 2 if self.is_jagged else self.length
        lengths = torch.linspace(first, self.length, self.batch).long()
        return F.pad(lengths.cumsum(0), (1, 0)).to("cuda")

    @property
    def valid(self) -> Tensor:
        """[B, N]"""
        return torch.arange(self.length, device="cuda") < self.offsets.diff()[:, None]

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """Padded q, k and v [B, N, H, d] and the position table, and the gradient of y, zero at padding."""
        shape = (self.batch, self.length, self.heads, self.width // self.heads)
        *leaves, dy = (torch.randn(shape, device="cuda").to(DTYPE) for _ in range(4))
        leaves.append(torch.randn(2 * self.length - 1, device="cuda"))
        return leaves, dy * self.valid[..., None, None]

    def bytes(self) -> int:
        """Of q, k, v and the gradient of y."""
        return 4 * self.batch * self.length * self.width * DTYPE.itemsize


CASES = [
    Case(*shape, is_jagged)
    for shape in ((128, 50, 64, 2), (128, 200, 64, 2), (32, 1024, 256, 4), (8, 4096, 256, 4))
    for is_jagged in (False, True)
]
QUICK = ("triton", "eager")


@dataclass(frozen=True)
class Implementation:
    """A way to compute y of q, k, v and the table, padded or, where ``takes_rows``, rows [T, H, d]."""

    attend: Callable[..., Tensor]
    takes_rows: bool = False
    has_bias: bool = True

    def inputs(self, case: Case) -> tuple[list[Tensor], Tensor]:
        """The case's in this implementation's form, every gradient wanted."""
        (*tensors, table), dy = case.inputs()
        if self.takes_rows:
            *tensors, dy = (x[case.valid] for x in (*tensors, dy))
        if not self.has_bias:
            table = torch.zeros_like(table)
        return [x.requires_grad_() for x in (*tensors, table)], dy

    def gradients(self, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
        """y and the gradient of each leaf, but for the table where there is no bias."""
        y = self.attend(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves if self.has_bias else leaves[:3], dy)]


def eager(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """As one writes it, scores and bias in full. Padding needs no mask: it comes after what is valid."""
    length, width = query.shape[1], query.shape[-1]
    position = torch.arange(length, device=query.device)
    bias = table.to(query.dtype)[length - 1 + position - position[:, None]]
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * width**-0.5 + bias
    weights = F.silu(scores).masked_fill(position > position[:, None], 0) / length
    return torch.einsum("bhij,bjhd->bihd", weights, value)


def flex(length: int) -> Implementation:
    """By FlexAttention."""
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, "cuda")

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        def score(product, batch, head, i, j):
            s = product + table[length - 1 + j - i]
            return torch.log(s * torch.sigmoid(s) + _SHIFT)

        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        y, logsumexp = compiled(query, key, value, score_mod=score, block_mask=mask, return_lse=True)
        total = y.float() * torch.exp(logsumexp)[..., None] - _SHIFT * value.float().cumsum(2)
        return (total / length).to(query.dtype).transpose(1, 2)

    return Implementation(attend)


def triton(case: Case, has_bias: bool = True) -> Implementation:
    """This package's kernels."""
    layout = {"offsets": case.offsets, "max_length": case.length} if case.is_jagged else {}

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        bias = table if has_bias else None
        return kernels.hstu_hierarchical_attention(query, key, value, position_bias=bias, **layout)

    return Implementation(attend, case.is_jagged, has_bias)


def public(case: Case) -> Implementation:
    """generative-recommenders' kernel, which takes rows and no bias."""
    from generative_recommenders.ops.triton.triton_hstu_attention import triton_hstu_mha

    offsets = case.offsets

    def attend(query: Tensor, key: Tensor, value: Tensor, _table: Tensor) -> Tensor:
        return triton_hstu_mha(case.length, query.shape[-1] ** -0.5, query, key, value, offsets)

    return Implementation(attend, takes_rows=True, has_bias=False)


def implementations(case: Case) -> dict[str, Callable[[Case], Implementation]]:
    """What makes each for a case, by name; torch.compile anew, so that it specialises on the shape."""
    torch.compiler.reset()
    makers: dict[str, Callable[[Case], Implementation]] = {
        "triton": triton,
        "eager": lambda _case: Implementation(eager),
        "compile": lambda _case: Implementation(torch.compile(eager, fullgraph=True, dynamic=False)),
        "flex": lambda case: flex(case.length),
        "triton-no-bias": functools.partial(triton, has_bias=False),
    }
    if case.length >= 1024 and importlib.util.find_spec("generative_recommenders"):
        makers["public"] = public
    return makers


def largest_error(make: Callable[[Case], Implementation], case: Case) -> float:
    """Of y and every gradient on two sequences, relative to the largest value of the definition in fp64."""
    case = replace(case, batch=2)
    implementation = make(case)
    leaves, dy = implementation.inputs(case)
    layout = {"offsets": case.offsets, "max_length": case.length} if implementation.takes_rows else {}
    exact = Implementation(lambda q, k, v, t: definition(q, k, v, position_bias=t, **layout))
    expected = exact.gradients([leaf.detach().double().requires_grad_() for leaf in leaves], dy.double())
    results = implementation.gradients(leaves, dy)
    return max(
        ((result.double() - wanted).abs().max() / wanted.abs().max()).item()
        for result, wanted in zip(results, expected, strict=False)
    )


def measure(implementation: Implementation, case: Case) -> dict[tuple[str, str], Spread]:
    """(metric, unit) → figure of forward and backward."""
    sets = [implementation.inputs(case) for _ in range(sets_beyond_l2(case.bytes()))]
    calls = [functools.partial(implementation.gradients, *inputs) for inputs in sets]
    calls[0]()
    return {
        ("device_ms", "ms"): device_ms(calls),
        ("step_ms", "ms"): wall_ms(calls[0]),
        ("peak_bytes", "bytes"): Spread.exactly(peak_bytes(calls[0])),
    }


# What --sweep varies: the kernel's name, which gradients make a backward pass run it alone, and tiles as
# queries, keys, warps, stages and registers a thread (0: as many as the compiler likes).
SWEEP = {
    "forward": ((), [(128, 64, 4, 3, 0), (128, 64, 8, 3, 128), (64, 64, 4, 3, 168), (64, 64, 4, 3, 128),
                     (128, 128, 8, 2, 0), (64, 128, 4, 2, 0)]),
    "query": ((0,), [(128, 64, 8, 3, 0), (128, 64, 8, 2, 128), (64, 64, 4, 3, 0), (64, 64, 4, 3, 168),
                     (64, 128, 4, 2, 0), (64, 32, 4, 3, 128)]),
    "key_value": ((1, 2), [(64, 128, 8, 2, 0), (64, 128, 8, 2, 128), (64, 64, 4, 2, 0), (64, 64, 4, 3, 168),
                           (32, 128, 8, 3, 128), (32, 64, 4, 3, 168), (128, 64, 4, 2, 0)]),
    "bias": ((3,), [(128, 64, 8, 2, 0), (128, 64, 8, 2, 128), (64, 64, 4, 2, 0), (64, 64, 4, 3, 168),
                    (128, 128, 8, 2, 0), (64, 64, 8, 3, 0)]),
}  # fmt: skip


def sweep(results: Results) -> None:
    """Time each kernel alone with several tiles."""
    for case, (kernel, (wanted, tiles)) in itertools.product(CASES, SWEEP.items()):
        if case.is_jagged or case.length < 1024:
            continue
        for tile in tiles:
            rows = {DTYPE.itemsize: ((case.width, kernels.Blocks(*tile)),)}
            with mock.patch.dict(kernels._BLOCKS, {kernel: rows}):
                try:
                    spread = time_alone(case, wanted)
                except Exception as error:  # such as a tile too large for shared memory
                    results.add_status(f"{case.name}/{kernel}", str(tile), "bfloat16", repr(error)[:80])
                    continue
            results.add(f"{case.name}/{kernel}", str(tile), "bfloat16", "device_ms", "ms", spread)


def time_alone(case: Case, wanted: tuple[int, ...]) -> Spread:
    """The forward pass, or, of the backward pass, what computes the gradients of the leaves ``wanted``."""
    implementation = triton(case)
    calls = []
    for _ in range(sets_beyond_l2(case.bytes())):
        leaves, dy = implementation.inputs(case)
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index in wanted)
        y = implementation.attend(*leaves)
        inputs = [leaves[index] for index in wanted]
        backward = functools.partial(torch.autograd.grad, y, inputs, dy, retain_graph=True)
        calls.append(backward if wanted else functools.partial(implementation.attend, *leaves))
    calls[0]()
    return device_ms(calls)


def main() -> int:
    parser = results_parser(BENCHMARK, __doc__ or "")
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--sweep", action="store_true", help="time each kernel with several tiles instead")
    arguments = parser.parse_args()
    results = open_results(BENCHMARK, arguments)
    torch.manual_seed(0)
    failed = False
    # One stream for forward, backward and capture: autograd runs a backward where its forward ran.
    with torch.cuda.stream(torch.cuda.Stream()):
        if arguments.sweep:
            sweep(results)
            return 0
        for case in CASES:
            for name, make in implementations(case).items():
                if arguments.quick and name not in QUICK:
                    continue
                error = largest_error(make, case)
                if not error <= TOLERANCE:
                    results.add_status(case.name, name, "bfloat16", f"error {error:.1e}, so it is not timed")
                    failed = True
                    continue
                for (metric, unit), spread in measure(make(case), case).items():
                    results.add(case.name, name, "bfloat16", metric, unit, spread, error)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
