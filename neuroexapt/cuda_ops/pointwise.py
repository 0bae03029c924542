"""1x1 convolutions of relu(x) in CUDA C++ (``csrc/pointwise.cu``).

Legend: x [B, C, H, W], weight [O, C, 1, 1]; z, g [B, O, H', W'], as large as x or half as large: at stride
2 a convolution reads the pixels (2i + corner, 2j + corner) of x, zeros past its last row. x, z, g and the
gradient of x are fp32 or bf16, all else is fp32. ``moments`` and ``coef`` as in ``cell_operands``. Only the
first dimension of x, z, g and ``moments`` may be strided.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from neuroexapt.backend import Support
from neuroexapt.cuda_ops.arguments import (
    addresses,
    current_stream,
    dense,
    dense_pictures,
    dtype_refusals,
    stored_in_bf16,
    strided,
)
from neuroexapt.cuda_ops.build import extension

_MAX_OUT_CHANNELS = 64


class Product(NamedTuple):
    """z = W · relu(x): what is read, and where z and its moments [parts, O, 3] go."""

    x: Tensor
    weight: Tensor
    z: Tensor
    moments: Tensor
    corner: int = 0


class Source(NamedTuple):
    """What the gradients of a ``Product`` start from, dz = A · g + B · z + D.

    The weight's gradient is the sum of ``partial`` [parts, O · C], where it is wanted, over the parts.
    """

    weight: Tensor
    z: Tensor
    g: Tensor
    coef: Tensor
    partial: Tensor | None


class Target(NamedTuple):
    """The gradient of x by all ``sources`` of one corner, and where it goes if it is wanted.

    At stride 2 it fills the rows that start at ``corner``.
    """

    x: Tensor
    dx: Tensor | None
    sources: Sequence[Source]
    corner: int = 0


def takes(x: Tensor, weight: Tensor, stride: int = 1) -> Support:
    """Whether the kernels take these operands."""
    out_channels, channels = weight.shape[:2]
    refusal = next(dtype_refusals([x], [weight]), "")
    if refusal:
        return Support(False, refusal)
    if not x[0].is_contiguous():
        return Support(False, "pictures are not contiguous")
    if channels % 16 or out_channels % 8 or out_channels > _MAX_OUT_CHANNELS:
        return Support(False, f"{channels} to {out_channels} channels")
    height, width = x.shape[2:]
    if width % 8 if stride == 2 else height * width % 4:
        return Support(False, f"pictures of {height} x {width} pixels")
    return Support(True)


def forward_parts(x: Tensor, weight: Tensor, stride: int = 1) -> int:
    """Of the moments."""
    return extension().pointwise_forward_parts(_shape(x, weight, stride, False))


def backward_parts(x: Tensor, weight: Tensor, stride: int = 1) -> int:
    """Of the weight's gradient."""
    return extension().pointwise_backward_parts(_shape(x, weight, stride, False))


def forward(products: Sequence[Product], stride: int, exact: bool) -> None:
    """Fill the results of products of one shape, together; ``exact``: of fp32 grade, else of TF32."""
    kernels = extension()
    operands = [(dense_pictures(product.x), dense(product.weight)) for product in products]
    jobs = [
        kernels.PointwiseJob(
            *strided(x),
            product.corner,
            *addresses(weight),
            *strided(product.z),
            *strided(product.moments),
        )
        for (x, weight), product in zip(operands, products, strict=True)
    ]
    kernels.pointwise_forward(_shape(*operands[0], stride, exact), jobs, current_stream())


def backward(targets: Sequence[Target], stride: int, exact: bool) -> None:
    """As ``forward``, the gradients that have a place."""
    kernels = extension()
    xs = [dense_pictures(target.x) for target in targets]
    operands = [[_dense_source(source) for source in target.sources] for target in targets]
    jobs = [
        kernels.PointwiseTarget(
            *strided(x), target.corner, *addresses(target.dx), list(map(_source_job, sources))
        )
        for target, x, sources in zip(targets, xs, operands, strict=True)
    ]
    shape = _shape(xs[0], targets[0].sources[0].weight, stride, exact)
    kernels.pointwise_backward(shape, jobs, current_stream())


def _dense_source(source: Source) -> Source:
    z, g = dense_pictures(source.z), dense_pictures(source.g)
    return Source(dense(source.weight), z, g, dense(source.coef), source.partial)


def _source_job(source: Source) -> Any:
    return extension().PointwiseSource(
        *strided(source.g), *strided(source.z), *addresses(source.coef, source.weight, source.partial)
    )


def _shape(x: Tensor, weight: Tensor, stride: int, exact: bool) -> Any:
    batch, channels, height, width = x.shape
    sizes = (batch, channels, weight.shape[0], height, width, stride)
    return extension().PointwiseShape(*sizes, stored_in_bf16(x), exact)
