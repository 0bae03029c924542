"""Times pools and decayed self-similarity, forward and backward: pair by pair, in chunks, compiled, kernels.

Every implementation is first held to the definition in fp64; one that is wrong is not timed. From the
repository's root: ``python benchmarks/benchmark_sequence_recommendation_interaction.py``.
"""

import functools
import itertools
import re
import sys

import torch
import torch.nn.functional as F
from _harness import copy_gbps
from _sequences import (
    Comparison,
    Op,
    add_floor,
    compare,
    compile_comparisons,
    run_once,
    start,
    time_op,
)
from torch import Tensor

from neuroexapt.kernels import sequence_recommendation_interaction as definition
from neuroexapt.kernels import sequence_recommendation_interaction_triton as triton

# Sequences, positions, width.
CASES = [(128, 50, 64), (128, 200, 64), (32, 1024, 256), (8, 4096, 256)]
CHUNK = 64
# What --sweep tries: items a chunk, columns a tile, warps forward (backward has twice as many).
BLOCKS = list(itertools.product((32, 64), (32, 64, 128), (2, 4)))


def make_inputs(batch: int, length: int, width: int) -> list[Tensor]:
    """Items, target and the decay, every gradient wanted."""
    shapes = (batch, length, width), (batch, width)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    return [x.requires_grad_() for x in (*tensors, torch.tensor(0.05, device="cuda"))]


def in_chunks(items: Tensor, target: Tensor, decay: Tensor, timestamps: Tensor) -> tuple[Tensor, Tensor]:
    """The strongest rival known: linear in N, the state before each chunk by a product across chunks."""
    length, width = items.shape[1:]
    x, times = items.float(), timestamps.float()
    attention = torch.softmax(torch.einsum("bnd,bd->bn", x, target.float()) / width**0.5, dim=1)
    aged = torch.exp(-decay * (times[:, -1:] - times))
    recent = torch.zeros_like(aged)
    recent[:, -5:] = 1 / min(5, length)
    pools = torch.stack([attention, recent, aged / aged.sum(1, keepdim=True)], dim=1) @ x

    unit = x * (x.square().sum(-1, keepdim=True) + definition.EPSILON).rsqrt()
    padding = -length % CHUNK
    unit = F.pad(unit, (0, 0, 0, padding)).to(items.dtype).unflatten(1, (-1, CHUNK))  # [B, chunks, CHUNK, D]
    times = F.pad(times, (0, padding), mode="replicate").unflatten(1, (-1, CHUNK))
    ends = times[..., -1]
    origins = F.pad(ends[:, :-1], (1, 0))
    gaps = (times[..., :, None] - times[..., None, :]).tril(-1)
    within = (unit @ unit.mT * torch.exp(-decay * gaps)).tril(-1).sum(-1)
    summaries = torch.einsum("bcj,bcjd->bcd", torch.exp(-decay * (ends[..., None] - times)), unit.float())
    across = torch.exp(-decay * (origins[:, :, None] - ends[:, None, :]).tril(-1)).tril(-1)
    before = torch.exp(-decay * (times - origins[..., None])) * (
        unit.float() @ (across @ summaries)[..., None]
    ).squeeze(-1)
    similarity = (within + before).flatten(1)[:, :length]
    return pools.to(items.dtype), similarity.to(items.dtype)


def sweep() -> None:
    """Print the time of each size of blocks."""
    standard = triton._blocks, triton._CHUNK_LENGTH
    for case, (chunk, columns, warps) in itertools.product(CASES, BLOCKS):
        changed = {"BLOCK_N": chunk, "BLOCK_D": columns, "num_warps": warps}
        triton._CHUNK_LENGTH = chunk
        triton._blocks = lambda width, changed=changed: standard[0](width) | changed  # type: ignore[assignment]
        spread = time_op(triton.sequence_recommendation_interaction, functools.partial(make_inputs, *case))
        print(f"{case} {changed}: {spread.median:.4f} ms", flush=True)
    triton._blocks, triton._CHUNK_LENGTH = standard


def name_of(batch: int, length: int, width: int) -> str:
    """As results are recorded under."""
    return f"b{batch}-n{length}-d{width}"


def comparisons(case: tuple[int, int, int], quick: bool) -> list[Comparison]:
    """Full sequences with times, then sequences of all lengths."""
    batch, length, _ = case
    name = name_of(*case)
    times = torch.rand(batch, length, device="cuda", dtype=torch.float64).cumsum(1)
    lengths = torch.linspace(0, length, batch, device="cuda").round().long()
    make = functools.partial(make_inputs, *case)
    plain, kernels = (
        definition.sequence_recommendation_interaction,
        triton.sequence_recommendation_interaction,
    )

    def comparison(kind: str, rivals: dict[str, Op], **arguments: Tensor) -> Comparison:
        eager = functools.partial(plain, **arguments)
        mine: dict[str, Op] = {"fused": functools.partial(kernels, **arguments), "eager": eager}
        if not quick:
            mine |= rivals | {"compile": torch.compile(eager, dynamic=False)}
        return Comparison(f"{name}/{kind}", mine, eager, make)

    chunks = functools.partial(in_chunks, timestamps=times)
    rivals: dict[str, Op] = {"chunks": chunks, "chunks-compile": torch.compile(chunks, dynamic=False)}
    return [
        comparison("full", rivals, timestamps=times),
        comparison("ragged", {}, timestamps=times, lengths=lengths),
    ]


def compile_one(case: tuple[int, int, int], index: int, name: str) -> None:
    """Fill the caches with what one implementation needs."""
    comparison = comparisons(case, quick=False)[index]
    run_once(comparison.implementations[name], comparison.make_inputs())


def main() -> int:
    results, arguments = start("sequence_recommendation_interaction", __doc__)
    with torch.cuda.stream(torch.cuda.Stream()):
        if arguments.sweep:
            sweep()
            return 0
        cases = [case for case in CASES if re.match(arguments.cases, name_of(*case))]
        compared = {case: comparisons(case, arguments.quick) for case in cases}
        compile_comparisons(compile_one, compared)
        gbps = copy_gbps().median
        rights = []
        for (batch, length, width), pair in compared.items():
            torch.compiler.reset()
            # Forward reads the items, backward reads them and writes their gradient.
            add_floor(results, pair[0].name, 3 * batch * length * width * 2, gbps)
            rights += [compare(results, comparison) for comparison in pair]
    return int(not all(rights))


if __name__ == "__main__":
    sys.exit(main())
