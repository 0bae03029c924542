"""The dot interaction in Triton: bmm, choice of the pairs and concatenation in one launch, both ways.

Legend: B batch, V = F + 1 vectors a sample, x and the fields e; D width; P = V · (V − 1) / 2 pairs. A
program holds MEMBERS samples as one tile of ROWS rows, SLOTS = next power of two of V a sample, since tensor
cores take at least 16: of few fields several samples share a product, whose other blocks nobody reads.

Bytes decide: forward reads V · D and writes D + P numbers a sample, backward reads both and writes V · D; the
FLOP are below a tenth of that time. At V = 27, D = 64 in bf16 that is 4.3 and 7.7 KB a sample. A sample is
the work of two warps there, and dozens of such programs a multiprocessor keep enough loads under way.

The triangle leaves the product's layout through ``tl.gather``, so that it is stored in its own order, 32
neighbours an instruction; stored from where tensor cores leave it, neighbours would be in pairs. Backward
gathers it the other way, straight from the gradient, as the symmetric G + Gᵀ: each entry once, so that
nothing is added.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.kernels.interaction_operator import check_shapes
from neuroexapt.kernels.ragged_triton import input_precision
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd
from neuroexapt.kernels.sizes import ceil_div

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_VECTORS = 128  # whose products, 128 x 128 in fp32, still fit in the registers of a program


@triton.jit
def _vectors(x_ptr, x_b, e_ptr, e_b, e_f, sample, vector, column, batch, V: tl.constexpr, D: tl.constexpr):
    """T's rows ``vector`` of ``sample``, zero outside: [ROWS, BLOCK_D]."""
    inside = (sample < batch)[:, None] & (column < D)[None, :]
    is_x = (vector == 0)[:, None]
    x = tl.load(x_ptr + sample[:, None] * x_b + column[None, :], mask=inside & is_x, other=0.0)
    fields = e_ptr + sample[:, None] * e_b + (vector - 1).to(tl.int64)[:, None] * e_f + column[None, :]
    e = tl.load(fields, mask=inside & (vector > 0)[:, None] & (vector < V)[:, None], other=0.0)
    return tl.where(is_x, x, e)


@triton.jit
def interaction_operator_fwd_kernel(
    x_ptr, x_b, e_ptr, e_b, e_f, r_ptr, batch,
    V: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """R [B, D + P] of the program's samples."""
    P: tl.constexpr = V * (V - 1) // 2
    MEMBERS: tl.constexpr = ROWS // SLOTS
    first_sample = tl.program_id(0).to(tl.int64) * MEMBERS
    row = tl.arange(0, ROWS)
    member = tl.arange(0, MEMBERS)
    products = tl.zeros([ROWS, ROWS], tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        vectors = _vectors(
            x_ptr, x_b, e_ptr, e_b, e_f, first_sample + row // SLOTS, row % SLOTS, column, batch, V, D
        )
        products = tl.dot(vectors, tl.trans(vectors), products, input_precision=PRECISION)
        sample = first_sample + member
        inside = (sample < batch)[:, None] & (column < D)[None, :]  # [MEMBERS, BLOCK_D]
        x = tl.load(x_ptr + sample[:, None] * x_b + column[None, :], mask=inside)
        tl.store(r_ptr + sample[:, None] * (D + P) + column[None, :], x, mask=inside)

    BLOCK_P: tl.constexpr = SLOTS * SLOTS // 2  # at least P, since V ≤ SLOTS
    slot = tl.arange(0, MEMBERS * BLOCK_P)
    pair = slot % BLOCK_P
    # Pair i · (i − 1) / 2 + j is (i, j). Its root is rounded correctly, and exact where i changes.
    i = ((tl.sqrt_rn((8 * pair + 1).to(tl.float32)) + 1) * 0.5).to(tl.int32)
    j = pair - i * (i - 1) // 2
    corner = slot // BLOCK_P * SLOTS
    place = tl.where(pair < P, (corner + i) * ROWS + corner + j, 0)
    chosen = tl.gather(tl.reshape(products, [ROWS * ROWS]), place, 0)  # [MEMBERS · BLOCK_P]
    sample = first_sample + slot // BLOCK_P
    tl.store(r_ptr + sample * (D + P) + D + pair, chosen, mask=(pair < P) & (sample < batch))


@triton.jit
def interaction_operator_bwd_kernel(
    dr_ptr, x_ptr, x_b, e_ptr, e_b, e_f, dx_ptr, dx_b, de_ptr, de_b, batch,
    V: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``dT = (G + Gᵀ) T``, and what R's copy of x passes back, into dx [B, D] and de [B, F, D]."""
    P: tl.constexpr = V * (V - 1) // 2
    MEMBERS: tl.constexpr = ROWS // SLOTS
    first_sample = tl.program_id(0).to(tl.int64) * MEMBERS
    row = tl.arange(0, ROWS)
    sample = first_sample + row // SLOTS  # [ROWS]
    vector = row % SLOTS
    i = tl.maximum(vector[:, None], vector[None, :])
    j = tl.minimum(vector[:, None], vector[None, :])
    is_pair = (i > j) & (i < V) & (row[:, None] // SLOTS == row[None, :] // SLOTS)
    pair = dr_ptr + sample[:, None] * (D + P) + D + i * (i - 1) // 2 + j
    g = tl.load(pair, mask=is_pair & (sample < batch)[:, None], other=0.0)  # [ROWS, ROWS]
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        vectors = _vectors(x_ptr, x_b, e_ptr, e_b, e_f, sample, vector, column, batch, V, D)
        grad = tl.dot(g, vectors, input_precision=PRECISION)  # [ROWS, BLOCK_D]
        # Once a sample, then spread over its rows: loaded for every row it would be most of all loads.
        owner = first_sample + tl.arange(0, MEMBERS)
        copied = tl.load(
            dr_ptr + owner[:, None] * (D + P) + column[None, :],
            mask=(owner < batch)[:, None] & (column < D)[None, :],
            other=0.0,
        ).to(tl.float32)  # [MEMBERS, BLOCK_D]
        copied = tl.broadcast_to(copied[:, None, :], [MEMBERS, SLOTS, BLOCK_D]).reshape(ROWS, BLOCK_D)
        inside = (sample < batch)[:, None] & (column < D)[None, :]
        is_x = inside & (vector == 0)[:, None]
        is_e = inside & (vector > 0)[:, None] & (vector < V)[:, None]
        tl.store(dx_ptr + sample[:, None] * dx_b + column[None, :], grad + copied, mask=is_x)
        field = (vector - 1)[:, None] * D + column[None, :]
        tl.store(de_ptr + sample[:, None] * de_b + field, grad, mask=is_e)


class _Vectors(NamedTuple):
    """x [B, D] and e [B, F, D], of one tensor or two, D without gaps."""

    x: Tensor
    e: Tensor

    @classmethod
    def of(cls, dense: Tensor, fields: Tensor | None) -> "_Vectors":
        if fields is None:
            dense = _without_gaps(dense)
            return cls(dense[:, 0], dense[:, 1:])
        return cls(_without_gaps(dense), _without_gaps(fields))

    def plan(self) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and constants of both kernels."""
        batch, fields, width = self.e.shape
        blocks = _blocks(fields + 1, width, self.e.dtype)
        members = blocks["ROWS"] // blocks["SLOTS"]
        return (ceil_div(batch, members),), blocks | {"PRECISION": input_precision()}


@functools.cache
def _blocks(vectors: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """A tile of T has at most 16 KB. One warp alone would gather by 514 shuffles, most of them in vain."""
    slots = max(2, triton.next_power_of_2(vectors))
    rows = max(slots, 16)
    block_d = min(max(16, triton.next_power_of_2(width)), 128, 16384 // (rows * dtype.itemsize))
    num_warps = min(max(2, rows * max(rows, block_d) * dtype.itemsize // 4096), 8)
    return {
        "V": vectors,
        "D": width,
        "SLOTS": slots,
        "ROWS": rows,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
        "num_stages": 2,
    }


def _without_gaps(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_result(dense: Tensor, fields: Tensor | None) -> Tensor:
    vectors = dense.shape[1] if fields is None else 1 + fields.shape[1]
    return dense.new_empty(dense.shape[0], dense.shape[-1] + vectors * (vectors - 1) // 2)


def _run(dense: Tensor, fields: Tensor | None) -> Tensor:
    result = _empty_result(dense, fields)
    x, e = vectors = _Vectors.of(dense, fields)
    grid, blocks = vectors.plan()
    with torch.cuda.device_of(result):
        interaction_operator_fwd_kernel[grid](
            x, x.stride(0), e, e.stride(0), e.stride(1), result, len(x), **blocks
        )
    return result


def _empty_grads(grad: Tensor, dense: Tensor, fields: Tensor | None) -> tuple[Tensor, Tensor]:
    return dense.new_empty(dense.shape), dense.new_empty(0 if fields is None else fields.shape)


def _run_backward(grad: Tensor, dense: Tensor, fields: Tensor | None) -> tuple[Tensor, Tensor]:
    dense_grad, fields_grad = _empty_grads(grad, dense, fields)
    x, e = vectors = _Vectors.of(dense, fields)
    dx, de = _Vectors.of(dense_grad, None if fields is None else fields_grad)
    grid, blocks = vectors.plan()
    with torch.cuda.device_of(dense_grad):
        interaction_operator_bwd_kernel[grid](
            grad.contiguous(), x, x.stride(0), e, e.stride(0), e.stride(1),
            dx, dx.stride(0), de, de.stride(0), len(x), **blocks,
        )  # fmt: skip
    return dense_grad, fields_grad


def _save(ctx, arguments: tuple[Tensor, Tensor | None], _result: Tensor) -> None:
    ctx.save_for_backward(*arguments)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward_op(grad, *ctx.saved_tensors)
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


_op = define("interaction_operator(Tensor dense, Tensor? fields) -> Tensor", _run, _empty_result)
_backward_op = define(
    "interaction_operator_backward(Tensor grad, Tensor dense, Tensor? fields) -> (Tensor, Tensor)",
    _run_backward,
    _empty_grads,
)
set_autograd(_op, differentiable_once(_op, _save, _backward))


def interaction_operator(dense: Tensor, fields: Tensor | None = None) -> Tensor:
    """What ``neuroexapt.functional`` defines; products are summed in fp32. Differentiable once."""
    check_shapes(dense, fields)
    return _op(dense, fields)


def supports(dense: Tensor, fields: Tensor | None = None) -> Support:
    """Whether the kernels take these arguments."""
    check_shapes(dense, fields)
    if dense.dtype not in _DTYPES:
        return Support(False, f"dtype {dense.dtype}")
    if fields is not None and (fields.dtype, fields.device) != (dense.dtype, dense.device):
        return Support(False, "dense and fields of several dtypes or devices")
    if dense.numel() == 0:
        return Support(False, "empty operands")
    if (dense.shape[1] if fields is None else 1 + fields.shape[1]) > _MOST_VECTORS:
        return Support(False, f"more than {_MOST_VECTORS} vectors a sample")
    return Support(True)


register_impl("interaction_operator", "triton", interaction_operator, supports)
