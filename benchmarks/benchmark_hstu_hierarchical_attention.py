"""HSTU's attention with its position table against the ways to write it in PyTorch, forward and backward.

``python benchmarks/benchmark_hstu_hierarchical_attention.py [--length N …] [--quick] [--sweep KERNEL …]``
takes about three minutes on one GPU, most of it for compiling; ``--quick`` leaves out what torch.compile
compiles. Each implementation is held to the definition in fp64, its result and every gradient, before it is
timed: ours to 0.04 of the largest value, others to 0.1, since PyTorch sums the table's gradient in bf16. One
that fails is recorded and not timed; if it is ours, the exit code is 1. Lengths of jagged sequences spread
evenly from half to all of N. What takes padded input alone is not timed again there: it would do the same
work. ``--sweep`` times kernels by themselves with other tiles than their table's.

FlexAttention has a softmax, which log(SiLU(s) + c) as score and the log-sum-exp undo: they give
Σ (SiLU(s) + c) v, from which c Σ v is taken. ``public`` is the Triton kernel of meta-recsys's
generative-recommenders, which has no bias: compare it with ``triton-no-bias``. It is measured where that
package is installed, from N = 1,024 on. It tunes itself over some fifty tiles, all of which it may try: only
their compilation, minutes one after another, is done beforehand by several processes.
"""

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
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
from _sequences import compile_in_parallel
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from neuroexapt.kernels import hstu_hierarchical_attention_triton as kernels
from neuroexapt.kernels.hstu_hierarchical_attention import hstu_hierarchical_attention as definition

BENCHMARK = "hstu_hierarchical_attention"
DTYPE = torch.bfloat16
TOLERANCE = 4e-2
RIVALS_TOLERANCE = 1e-1
# More than the 0.2785 below zero that SiLU never falls under.
_SHIFT = 0.3
# At least as many as the public kernels choose from, each direction.
_MOST_CHOICES = 32


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

    def layout(self) -> dict[str, Any]:
        """What tells the kernels where the rows of jagged sequences are."""
        return {"offsets": self.offsets, "max_length": self.length}

    def bytes(self) -> int:
        """Of q, k, v and the gradient of y."""
        return 4 * self.batch * self.length * self.width * DTYPE.itemsize


CASES = [
    Case(*shape, is_jagged)
    for shape in ((128, 50, 64, 2), (128, 200, 64, 2), (32, 1024, 256, 4), (8, 4096, 256, 4))
    for is_jagged in (False, True)
]
WIDE = Case(16, 1024, 512, 4)  # heads of 128, swept over too


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


def flex(case: Case) -> Implementation:
    """By FlexAttention."""
    length = case.length
    # With more, the table's entries, copied ahead as keys are, overflow shared memory where heads are wider.
    options = {"num_stages": 1} if case.width // case.heads > 32 else None
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, "cuda")

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        def score(product, batch, head, i, j):
            s = product + table[length - 1 + j - i]
            return torch.log(s * torch.sigmoid(s) + _SHIFT)

        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        y, sums = compiled(
            query, key, value, score, mask, kernel_options=options, return_aux=AuxRequest(lse=True)
        )
        total = y.float() * torch.exp(sums.lse)[..., None] - _SHIFT * value.float().cumsum(2)
        return (total / length).to(query.dtype).transpose(1, 2)

    return Implementation(attend)


def triton(case: Case, has_bias: bool = True) -> Implementation:
    """This package's kernels."""
    layout = case.layout() if case.is_jagged else {}

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        bias = table if has_bias else None
        return kernels.hstu_hierarchical_attention(query, key, value, position_bias=bias, **layout)

    return Implementation(attend, case.is_jagged, has_bias)


def has_public(case: Case) -> bool:
    """Whether generative-recommenders' kernel is measured."""
    return case.length >= 1024 and importlib.util.find_spec("generative_recommenders") is not None


def public(case: Case) -> Implementation:
    """generative-recommenders' kernel, which takes rows and no bias."""
    from generative_recommenders.ops.triton.triton_hstu_attention import triton_hstu_mha

    offsets = case.offsets

    def attend(query: Tensor, key: Tensor, value: Tensor, _table: Tensor) -> Tensor:
        return triton_hstu_mha(case.length, query.shape[-1] ** -0.5, query, key, value, offsets)

    return Implementation(attend, takes_rows=True, has_bias=False)


def compile_public(case: Case, choice: int) -> None:
    """Fill Triton's cache with one of the tiles that ``public`` chooses from."""
    from generative_recommenders.ops.triton import triton_hstu_attention as module

    forward, backward = module._hstu_attn_fwd, module._hstu_attn_bwd
    with (
        mock.patch.object(forward, "configs", [forward.configs[choice % len(forward.configs)]]),
        mock.patch.object(backward, "configs", [backward.configs[choice % len(backward.configs)]]),
    ):
        implementation = public(case)
        implementation.gradients(*implementation.inputs(case))


def implementations(case: Case, quick: bool) -> dict[str, Callable[[], Implementation]]:
    """What makes each, by name; torch.compile anew, so that it specialises on the shape."""
    makers = {
        "triton": lambda: triton(case),
        "triton-no-bias": lambda: triton(case, has_bias=False),
    }
    if not case.is_jagged:
        makers["eager"] = lambda: Implementation(eager)
    if not case.is_jagged and not quick:
        torch.compiler.reset()
        makers["compile"] = lambda: Implementation(torch.compile(eager, fullgraph=True, dynamic=False))
        makers["flex"] = lambda: flex(case)
    if not quick and has_public(case):
        makers["public"] = lambda: public(case)
    return makers


def largest_error(implementation: Implementation, case: Case) -> float:
    """Of y and every gradient, relative to the largest value of the definition in fp64."""
    torch.manual_seed(0)
    leaves, dy = implementation.inputs(case)
    results = implementation.gradients(leaves, dy)
    rows = [x.detach() if implementation.takes_rows else x.detach()[case.valid] for x in (*leaves[:3], dy)]
    *exact_leaves, exact_dy = (x.double().requires_grad_() for x in (*rows[:3], leaves[3].detach(), rows[3]))
    exact = Implementation(lambda q, k, v, t: definition(q, k, v, position_bias=t, **case.layout()))
    largest = 0.0
    for result, wanted in zip(results, exact.gradients(exact_leaves, exact_dy), strict=False):
        if result.shape != wanted.shape:
            result = result[case.valid]
        largest = max(largest, ((result.double() - wanted).abs().max() / wanted.abs().max()).item())
    return largest


def measure(implementation: Implementation, case: Case) -> dict[tuple[str, str], Spread]:
    """(metric, unit) → figure of forward and backward."""
    sets = [implementation.inputs(case) for _ in range(sets_beyond_l2(case.bytes()))]
    calls = [functools.partial(implementation.gradients, *inputs) for inputs in sets]
    calls[0]()
    return {
        ("peak_bytes", "bytes"): Spread.exactly(peak_bytes(calls[0])),
        ("device_ms", "ms"): device_ms(calls),
        ("step_ms", "ms"): wall_ms(calls[0]),
    }


# What --sweep tries by kernel and width of a head: queries, keys, warps, stages, registers a thread (0: any).
SWEEP = {
    "forward": {
        64: [(64, 64, 4, 3, 128), (64, 64, 4, 2, 128), (64, 32, 4, 3, 96), (64, 64, 4, 3, 168)],
        128: [(128, 64, 8, 2, 0), (64, 64, 4, 2, 0), (64, 32, 4, 3, 168), (64, 32, 4, 2, 0)],
    },
    "query": {
        64: [(64, 32, 4, 3, 128), (64, 64, 4, 2, 168), (64, 32, 4, 4, 128), (64, 64, 4, 3, 168)],
        128: [(128, 64, 8, 2, 0), (64, 64, 4, 2, 0), (64, 32, 4, 2, 0), (64, 32, 4, 3, 168)],
    },
    "key_value": {
        64: [(32, 64, 4, 3, 168), (32, 64, 4, 2, 168), (32, 64, 4, 3, 128), (64, 64, 4, 3, 168)],
        128: [(64, 128, 8, 2, 0), (32, 64, 4, 2, 0), (64, 64, 4, 2, 0), (64, 64, 8, 2, 0)],
    },
    "bias": {
        64: [(64, 64, 4, 2, 0), (64, 64, 4, 2, 168), (64, 64, 4, 3, 168), (64, 32, 4, 3, 168)],
        128: [(64, 64, 4, 2, 0), (64, 64, 8, 2, 0), (64, 32, 4, 2, 0), (32, 32, 4, 3, 0)],
    },
}  # fmt: skip
# Which leaves' gradients make a backward pass run a kernel by itself.
GRADIENTS_OF = {"forward": (), "query": (0,), "key_value": (1, 2), "bias": (3,)}


def sweep(results: Results, kernel: str, case: Case) -> None:
    """Time a kernel by itself with several tiles."""
    width = case.width // case.heads
    for tile in SWEEP[kernel][64 if width <= 64 else 128]:
        table = {DTYPE.itemsize: ((width, kernels.Blocks(*tile)),)}
        with mock.patch.dict(kernels._BLOCKS, {kernel: table}):
            spread = time_alone(case, GRADIENTS_OF[kernel])
        results.add(f"{case.name}/{kernel}", "x".join(map(str, tile)), "bfloat16", "device_ms", "ms", spread)


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


def compare(results: Results, case: Case, quick: bool, only: list[str] | None) -> bool:
    """Time every implementation that is right, or those of ``only``; whether ours are."""
    are_right = True
    for name, make in implementations(case, quick).items():
        if only and name not in only:
            continue
        is_ours = name.startswith("triton")
        try:
            implementation = make()
            error = largest_error(implementation, case)
        except Exception as failure:
            if is_ours:
                raise
            results.add_status(case.name, name, "bfloat16", str(failure).strip().splitlines()[0][:200])
            continue
        if not error <= (TOLERANCE if is_ours else RIVALS_TOLERANCE):
            results.add_status(case.name, name, "bfloat16", f"error {error:.1e}, so it is not timed")
            are_right = are_right and not is_ours
            continue
        for (metric, unit), spread in measure(implementation, case).items():
            results.add(case.name, name, "bfloat16", metric, unit, spread, error)
    return are_right


def main() -> int:
    parser = results_parser(BENCHMARK, __doc__ or "")
    parser.add_argument("--length", type=int, nargs="+", help="only sequences of these lengths")
    parser.add_argument("--quick", action="store_true", help="leave out what torch.compile compiles")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these implementations")
    parser.add_argument("--sweep", nargs="+", choices=SWEEP, help="time these kernels with several tiles")
    arguments = parser.parse_args()
    results = open_results(BENCHMARK, arguments)
    cases = [case for case in CASES if case.length in (arguments.length or [case.length])]
    # One stream for forward, backward and capture: autograd runs a backward where its forward ran.
    with torch.cuda.stream(torch.cuda.Stream()):
        if arguments.sweep:
            padded = [case for case in cases if not case.is_jagged]
            for kernel in arguments.sweep:
                for case in (*padded, WIDE):
                    sweep(results, kernel, case)
            return 0
        if not arguments.quick and "public" in (arguments.only or ["public"]):
            choices = range(_MOST_CHOICES)
            padded = [case for case in cases if has_public(case) and not case.is_jagged]
            compile_in_parallel(compile_public, itertools.product(padded, choices))
        are_right = [compare(results, case, arguments.quick, arguments.only) for case in cases]
    return int(not all(are_right))


if __name__ == "__main__":
    sys.exit(main())
