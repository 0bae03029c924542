"""What the Triton and the CUDA version of ``sepconv`` share.

Checks, autocast, ``torch.library`` registration and autograd are written here once; a tier adds two
launchers. Legend: B batch, C channels in, O channels out, H x W picture in, OH x OW picture out, k kernel
size. Only the inputs are saved: backward recomputes what it needs of the forward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuroexapt.errors import UserError

KERNEL_SIZES = (3, 5, 7)
Grads = tuple[Tensor, Tensor, Tensor]
# (x, depthwise_weight, pointwise_weight, y, stride, dilation, relu) fills y.
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, int, int, bool], None]
# (dy, x, depthwise_weight, pointwise_weight, grads, needed, stride, dilation, relu) fills each of the three
# grads that is needed.
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Grads, tuple[bool, ...], int, int, bool], None]


def define_op(tier: str, forward: Forward, backward: Backward) -> tuple[Callable[..., Tensor], Any]:
    """Register ``neuroexapt::sepconv_<tier>``; returns the function and autograd's formula for it."""
    name = f"neuroexapt::sepconv_{tier}"

    @torch.library.custom_op(name, mutates_args=())
    def op(
        x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, stride: int, dilation: int, relu: bool
    ) -> Tensor:
        y = empty_output(x, pointwise_weight, stride)
        if y.numel():
            forward(x, depthwise_weight, pointwise_weight, y, stride, dilation, relu)
        return y

    @op.register_fake
    def _(x, depthwise_weight, pointwise_weight, stride, dilation, relu):
        return empty_output(x, pointwise_weight, stride)

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def backward_op(
        dy: Tensor,
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        needed: list[bool],
        stride: int,
        dilation: int,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dW_dw, dW_pw; one that is not needed comes back empty."""
        grads = _empty_grads(x, depthwise_weight, pointwise_weight, needed)
        if dy.numel():
            backward(dy, x, depthwise_weight, pointwise_weight, grads, tuple(needed), stride, dilation, relu)
        else:
            for grad in grads:
                grad.zero_()
        return grads

    @backward_op.register_fake
    def _(dy, x, depthwise_weight, pointwise_weight, needed, stride, dilation, relu):
        return _empty_grads(x, depthwise_weight, pointwise_weight, needed)

    def autograd_backward(ctx, dy: Tensor, *_stats_grads: Tensor):
        needed = ctx.needs_input_grad[:3]
        grads = backward_op(dy, *ctx.saved_tensors, list(needed), *ctx.arguments)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None, None

    def sepconv(
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        *,
        stride: int = 1,
        dilation: int = 1,
        relu: bool = True,
    ) -> Tensor:
        """relu → depthwise → pointwise convolution, no bias, padding ``dilation · (k // 2)``.

        ``y[b, o] = Σ_c W_pw[o, c] · (W_dw[c] ⋆ relu(x[b, c]))``, summed in fp32. Differentiable once, in
        each input; the gradients are deterministic. Under autocast all three inputs are cast, as for
        ``conv2d``.

        Args:
            x: [B, C, H, W].
            depthwise_weight: [C, 1, k, k] of the same dtype, k one of 3, 5, 7.
            pointwise_weight: [O, C, 1, 1] of the same dtype.
            stride: 1 or 2.
            dilation: 1 or 2.
            relu: whether the relu is applied.

        Returns:
            [B, O, ceil(H / stride), ceil(W / stride)], channels_last where x is.

        Raises:
            UserError: the shapes do not fit together, or a value is not among those above.

        Source: separable convolutions as in DARTS (Liu et al., ICLR 2019).
        """
        return op(*checked(x, depthwise_weight, pointwise_weight, stride, dilation), stride, dilation, relu)

    op.register_autograd(autograd_backward, setup_context=save_inputs)
    return sepconv, autograd_backward


def checked(
    x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, stride: int, dilation: int
) -> tuple[Tensor, ...]:
    """The three tensors in autocast's dtype, once their shapes are known to fit."""
    if x.dim() != 4:
        raise UserError(f"sepconv needs x of shape [B, C, H, W], got {list(x.shape)}")
    channels, kernel_size = x.shape[1], depthwise_weight.shape[-1]
    if kernel_size not in KERNEL_SIZES or stride not in (1, 2) or dilation not in (1, 2):
        raise UserError(
            "sepconv takes kernel sizes 3, 5, 7, strides 1, 2 and dilations 1, 2, got "
            f"kernel size {kernel_size}, stride {stride}, dilation {dilation}"
        )
    if depthwise_weight.shape != (channels, 1, kernel_size, kernel_size):
        raise UserError(
            f"depthwise_weight must be [{channels}, 1, k, k] for x with {channels} channels, "
            f"got {list(depthwise_weight.shape)}"
        )
    if pointwise_weight.dim() != 4 or pointwise_weight.shape[1:] != (channels, 1, 1):
        raise UserError(
            f"pointwise_weight must be [O, {channels}, 1, 1] for x with {channels} channels, "
            f"got {list(pointwise_weight.shape)}"
        )
    tensors = autocast(x, depthwise_weight, pointwise_weight)
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        raise UserError(f"x is {x.dtype}, so both weights must be; cast them or use torch.autocast")
    return tensors


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is enabled."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def save_inputs(ctx, inputs, output) -> None:
    """Autograd's set-up of an op whose first three inputs are tensors and the rest its arguments."""
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else autograd would fill gradients of the statistics with zeros


def empty_output(x: Tensor, pointwise_weight: Tensor, stride: int) -> Tensor:
    """y, not yet computed: [B, O, OH, OW], channels_last where x is."""
    batch, _, height, width = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        (batch, pointwise_weight.shape[0], (height - 1) // stride + 1, (width - 1) // stride + 1),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _empty_grads(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, needed: list[bool]) -> Grads:
    dx = torch.empty_like(x) if needed[0] else x.new_empty(0)
    depthwise_grad, pointwise_grad = (
        weight.new_empty(weight.shape if need else 0)
        for weight, need in zip((depthwise_weight, pointwise_weight), needed[1:], strict=True)
    )
    return dx, depthwise_grad, pointwise_grad
