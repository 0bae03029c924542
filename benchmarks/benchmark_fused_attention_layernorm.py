"""Times attention with projection, residual and LayerNorm, forward and backward, against its rivals.

Rivals: plain PyTorch, scaled_dot_product_attention by flash attention, by cuDNN and compiled, and compiled
FlexAttention for jagged sequences. Every implementation is first held to the definition in fp64; one that is
wrong is not timed. From the repository's root: ``python benchmarks/benchmark_fused_attention_layernorm.py``.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from neuroexapt.kernels import causal_attention_triton
from neuroexapt.kernels import fused_attention_layernorm as definition
from neuroexapt.kernels import fused_attention_layernorm_triton as triton

# Sequences, positions, features, heads.
CASES = [(128, 50, 64, 2), (128, 200, 64, 2), (32, 1024, 256, 4), (8, 4096, 256, 4)]
KINDS = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
# What --sweep tries: queries (of the last kernel, keys) and keys (queries) a block, warps, stages.
KERNELS = ("fwd", "bwd_q", "bwd_kv")
BLOCKS = [
    (32, 64, 4, 2),
    (64, 32, 4, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (128, 32, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
]
SEQUENCES = 4  # x, queries, keys and values come first among the inputs


def make_inputs(*leading: int, width: int, heads: int) -> list[Tensor]:
    """x, queries, keys, values [*leading, …] and the weights in bf16, every gradient wanted."""
    per_head = *leading, heads, width // heads
    shapes = (*leading, width), per_head, per_head, per_head, (width, width), (width,), (width,), (width,)
    tensors = [torch.randn(shape, device="cuda") for shape in shapes]
    tensors[4] /= width**0.5
    return [tensor.bfloat16().requires_grad_() for tensor in tensors]


def make_heads(*shape: int) -> list[Tensor]:
    """Queries, keys and values."""
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def finish(x: Tensor, attended: Tensor, *weights: Tensor) -> Tensor:
    """Projection, residual and LayerNorm in plain PyTorch."""
    out_weight, out_bias, norm_weight, norm_bias = weights
    z = x + F.linear(attended.flatten(-2), out_weight, out_bias)
    return F.layer_norm(z, z.shape[-1:], norm_weight, norm_bias)


def by_sdpa(*inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
    """With ``lengths``, padding is computed like the rest, for what is done to the results takes it out."""
    x, *heads = inputs[:SEQUENCES]
    q, k, v = (tensor.transpose(1, 2) for tensor in heads)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return finish(x, attended, *inputs[SEQUENCES:])


def by_kind_of_sdpa(kind: SDPBackend, *inputs: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return by_sdpa(*inputs)


def by_flex(sequences: Sequences) -> Op:
    """Compiled FlexAttention over all jagged rows at once, skipping blocks between sequences."""
    sequence = torch.repeat_interleave(torch.arange(len(sequences.lengths), device="cuda"), sequences.lengths)

    def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (sequence[query] == sequence[key]) & (key <= query)

    mask = create_block_mask(is_seen, None, None, sequences.rows, sequences.rows)

    def run(*inputs: Tensor) -> Tensor:
        x, *heads = inputs[:SEQUENCES]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in heads)
        attended = flex_attention(q, k, v, block_mask=mask)[0].transpose(0, 1)
        return finish(x, attended, *inputs[SEQUENCES:])

    return torch.compile(run, dynamic=False)


def name_of(batch: int, length: int, width: int, heads: int) -> str:
    """As results are recorded under."""
    return f"b{batch}-n{length}-d{width}-h{heads}"


def comparisons(batch: int, length: int, width: int, heads: int, quick: bool) -> list[Comparison]:
    """Padded, all sequences full; then jagged, half as long in the mean."""
    case = name_of(batch, length, width, heads)
    plain, kernels = definition.fused_attention_layernorm, triton.fused_attention_layernorm
    sequences = Sequences(batch, length)
    by_padding = sequences.padded(plain, SEQUENCES)
    padded: dict[str, Op] = {
        "eager": plain,
        **{name: functools.partial(by_kind_of_sdpa, kind) for name, kind in KINDS.items()},
        "sdpa-compile": torch.compile(by_sdpa, dynamic=False),
        "fused": kernels,
        # Without PyTorch's attention, which is not asked for sequences that may be short.
        "fused-lengths": functools.partial(kernels, lengths=torch.full((batch,), length, device="cuda")),
    }
    jagged: dict[str, Op] = {
        "eager": by_padding,
        "sdpa": sequences.padded(by_sdpa, SEQUENCES),
        "fused": functools.partial(kernels, **sequences.jagged),
    }
    if not quick:
        jagged["flex-compile"] = by_flex(sequences)
    make_padded = functools.partial(make_inputs, batch, length, width=width, heads=heads)
    make_jagged = functools.partial(make_inputs, sequences.rows, width=width, heads=heads)
    return [
        Comparison(f"{case}/padded", padded, plain, make_padded),
        Comparison(f"{case}/jagged", jagged, by_padding, make_jagged),
    ]


def compile_one(case: tuple[int, int, int, int], is_jagged: bool, name: str) -> None:
    """Fill the caches with what one implementation needs."""
    comparison = comparisons(*case, quick=name != "flex-compile")[is_jagged]
    run_once(comparison.implementations[name], comparison.make_inputs())


def run_with_blocks(
    case: tuple[int, int, int, int], kernel: str, sizes: tuple, run: Callable[..., Any]
) -> Any:
    """``run`` attention alone at ``case`` with other block sizes for one of its kernels."""
    batch, length, width, heads = case
    own, other, warps, stages = sizes
    rows = {"BM": other, "BN": own} if kernel == "bwd_kv" else {"BM": own, "BN": other}
    changed = rows | {"num_warps": warps, "num_stages": stages}
    standard = causal_attention_triton._blocks
    causal_attention_triton._blocks = lambda name, *key: (  # type: ignore[assignment]
        standard(name, *key) | (changed if name == kernel else {})
    )
    try:
        make = functools.partial(make_heads, batch, length, heads, width // heads)
        return run(causal_attention_triton.causal_attention, make)
    finally:
        causal_attention_triton._blocks = standard


def compile_blocks(case: tuple[int, int, int, int], kernel: str, sizes: tuple) -> None:
    """Fill the caches with one kernel of these block sizes."""
    run_with_blocks(case, kernel, sizes, lambda op, make: run_once(op, make()))


def sweep() -> None:
    """Print the time of attention alone, forward and backward, with each kernel's block sizes in turn."""
    combinations = list(itertools.product(CASES, KERNELS, BLOCKS))
    compile_in_parallel(compile_blocks, combinations)
    for case, kernel, sizes in combinations:
        name = f"{case} {kernel:6} {sizes}"
        try:
            spread = run_with_blocks(case, kernel, sizes, time_op)
        except Exception as error:  # what does not fit the chip fails in many ways
            print(f"{name}: {str(error).splitlines()[0][:80]}")
            continue
        print(f"{name}: {spread.median:.4f} ms", flush=True)


def main() -> int:
    results, arguments = start("fused_attention_layernorm", __doc__)
    with torch.cuda.stream(torch.cuda.Stream()):
        if arguments.sweep:
            sweep()
            return 0
        cases = [case for case in CASES if re.match(arguments.cases, name_of(*case))]
        compared = {case: comparisons(*case, arguments.quick) for case in cases}
        compile_comparisons(compile_one, compared)
        gbps = copy_gbps().median
        for (batch, length, width, _), (padded, _) in compared.items():
            # Forward reads x, Q, K, V and writes y; backward reads Q, K, V, z, dy and writes four gradients.
            add_floor(results, padded.name, 14 * batch * length * width * 2, gbps)
        pairs = reversed(compared.values())  # what is measured with most interest comes first
        rights = [compare(results, comparison) for pair in pairs for comparison in pair]
        return int(not all(rights))


if __name__ == "__main__":
    sys.exit(main())
