"""1x1 convolutions of relu(x) in CUDA C++ (``csrc/pointwise.cu``), for fp32.

Legend: x [B, C, H, W], weight [O, C, 1, 1], z [B, O, H, W]; ``moments`` and ``coef`` as in ``cell_kernels``.
Only the first dimension of x, z, g and ``moments`` may be strided.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroexapt.backend import Support
from neuroexapt.cuda_ops.arguments import addresses, current_stream, dense, dense_pictures, strided
from neuroexapt.cuda_ops.build import extension

_MAX_OUT_CHANNELS = 64


class Product(NamedTuple):
    """z = W · relu(x): what is read, and where z and its moments [parts, O, 3] go."""

    x: Tensor
    weight: Tensor
    z: Tensor
    moments: Tensor


class ProductGrad(NamedTuple):
    """What the gradients of ``Product(x, weight, z)`` start from, dz = A · g + B · z + D, and where they go.

    The weight's gradient is the sum of ``partial`` [parts, O · C] over the parts.
    """

    x: Tensor
    weight: Tensor
    z: Tensor
    g: Tensor
    coef: Tensor
    dx: Tensor | None
    partial: Tensor | None


def takes(x: Tensor, weight: Tensor) -> Support:
    """Whether the kernels take these operands."""
    out_channels, channels = weight.shape[:2]
    if {x.dtype, weight.dtype} != {torch.float32}:
        return Support(False, "only fp32")
    if not x.is_contiguous():
        return Support(False, "x is not contiguous")
    if channels % 16 or out_channels % 8 or out_channels > _MAX_OUT_CHANNELS:
        return Support(False, f"{channels} to {out_channels} channels")
    if x[0, 0].numel() % 4:
        return Support(False, f"pictures of {x.shape[2]} x {x.shape[3]} pixels")
    return Support(True)


def forward_parts(x: Tensor, weight: Tensor) -> int:
    """Of the moments."""
    return extension().pointwise_forward_parts(_shape(x, weight, False))


def backward_parts(x: Tensor, weight: Tensor) -> int:
    """Of the weight's gradient."""
    return extension().pointwise_backward_parts(_shape(x, weight, False))


def forward(products: Sequence[Product], exact: bool) -> None:
    """Fill the results of products of one shape, together; ``exact``: of fp32 grade, else of TF32."""
    kernels = extension()
    jobs = []
    operands = [(dense_pictures(product.x), dense(product.weight)) for product in products]
    for (x, weight), product in zip(operands, products, strict=True):
        jobs.append(
            kernels.PointwiseJob(
                *strided(x), *addresses(weight), *strided(product.z), *strided(product.moments)
            )
        )
    kernels.pointwise_forward(_shape(*operands[0], exact), jobs, current_stream())


def backward(grads: Sequence[ProductGrad], exact: bool) -> None:
    """As ``forward``, the gradients that have a place."""
    kernels = extension()
    operands = [(*map(dense_pictures, (grad.g, grad.z, grad.x)), dense(grad.weight)) for grad in grads]
    jobs = [
        kernels.PointwiseGradJob(
            *(*strided(g), *strided(z)),
            *addresses(grad.coef),
            *strided(x),
            *addresses(weight, grad.dx, grad.partial),
        )
        for (g, z, x, weight), grad in zip(operands, grads, strict=True)
    ]
    kernels.pointwise_backward(_shape(grads[0].x, grads[0].weight, exact), jobs, current_stream())


def _shape(x: Tensor, weight: Tensor, exact: bool) -> Any:
    batch, channels, height, width = x.shape
    return extension().PointwiseShape(batch, channels, weight.shape[0], height * width, exact)
