"""What the Triton and the CUDA version of ``sepconv`` share.

Checks, autocast, registration and autograd are written here once; a tier adds two launchers and a check of
what it takes. Legend: B batch, C channels in, O channels out, H x W picture in, OH x OW picture out, k kernel
size. Only the inputs are saved: backward recomputes what it needs of the forward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from neuroexapt.backend import Support
from neuroexapt.errors import UserError
from neuroexapt.kernels.autocast import autocast_dtype
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd

KERNEL_SIZES = (3, 5, 7)
# What an operator takes; the fields of ``Call``.
ARGUMENTS = "Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, int stride, int dilation, bool relu"


class Call(NamedTuple):
    """The arguments of one call: x [B, C, H, W], weights [C, 1, k, k] and [O, C, 1, 1]."""

    x: Tensor
    depthwise_weight: Tensor
    pointwise_weight: Tensor
    stride: int
    dilation: int
    relu: bool

    @property
    def kernel_size(self) -> int:
        return self.depthwise_weight.shape[-1]

    def empty_output(self) -> Tensor:
        """y, not yet computed: [B, O, OH, OW], channels_last where x is."""
        batch, _, height, width = self.x.shape
        channels_last = self.x.is_contiguous(memory_format=torch.channels_last) and not self.x.is_contiguous()
        out_height, out_width = ((size - 1) // self.stride + 1 for size in (height, width))
        return torch.empty(
            (batch, self.pointwise_weight.shape[0], out_height, out_width),
            dtype=self.x.dtype,
            device=self.x.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )

    def empty_grads(self, needed: list[bool]) -> "Grads":
        """dx, dW_dw and dW_pw, not yet computed; one that is not needed is empty."""
        dx = torch.empty_like(self.x) if needed[0] else self.x.new_empty(0)
        depthwise_grad, pointwise_grad = (
            weight.new_empty(weight.shape if need else 0)
            for weight, need in zip(self[1:3], needed[1:], strict=True)
        )
        return dx, depthwise_grad, pointwise_grad


Grads = tuple[Tensor, Tensor, Tensor]
# (call, y) fills y.
Forward = Callable[[Call, Tensor], None]
# (call, dy, grads, needed) fills each of the three grads that is needed.
Backward = Callable[[Call, Tensor, Grads, list[bool]], None]


def define_op(tier: str, forward: Forward, backward: Backward) -> tuple[Callable[..., Tensor], OpOverload]:
    """Register ``neuroexapt::sepconv_<tier>`` and its backward; returns a function and the latter."""

    def run(*arguments) -> Tensor:
        call = Call(*arguments)
        y = call.empty_output()
        if y.numel():
            forward(call, y)
        return y

    def run_backward(dy: Tensor, needed: list[bool], *arguments) -> Grads:
        call = Call(*arguments)
        grads = call.empty_grads(needed)
        if dy.numel():
            backward(call, dy, grads, needed)
        else:
            for grad in grads:
                grad.zero_()
        return grads

    def fake(*arguments) -> Tensor:
        return Call(*arguments).empty_output()

    def fake_backward(dy: Tensor, needed: list[bool], *arguments) -> Grads:
        return Call(*arguments).empty_grads(needed)

    name = f"sepconv_{tier}"
    op = define(f"{name}({ARGUMENTS}) -> Tensor", run, fake)
    backward_schema = f"{name}_backward(Tensor dy, bool[] needed, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
    backward_op = define(backward_schema, run_backward, fake_backward)
    differentiate(op, backward_op)

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

    return sepconv, backward_op


def differentiate(op: OpOverload, backward_op: OpOverload) -> None:
    """Let autograd differentiate ``op``, whose first result is y, by ``backward_op``."""

    def save(ctx, arguments: tuple, _results: Any) -> None:
        ctx.save_for_backward(*arguments[:3])
        ctx.options = arguments[3:]

    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        grads = backward_op(dy, needed, *ctx.saved_tensors, *ctx.options)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None, None

    set_autograd(op, differentiable_once(op, save, backward))


def supports_if(takes: Callable[[Call, set[torch.dtype]], Support]) -> Callable[..., Support]:
    """A check of ``sepconv``'s arguments from one of the call and its tensors' dtypes under autocast."""

    def supports(*tensors: Any, stride: int = 1, dilation: int = 1, relu: bool = True) -> Support:
        if any(tensor.device != tensors[0].device for tensor in tensors):
            return Support(False, "operands on several devices")
        dtype = autocast_dtype(tensors[0].device)
        dtypes = {tensor.dtype for tensor in tensors} if dtype is None else {dtype}
        return takes(Call._make((*tensors, stride, dilation, relu)), dtypes)

    return supports


def checked(
    x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, stride: int, dilation: int
) -> tuple[Tensor, ...]:
    """The three tensors, in autocast's dtype where it is enabled, once their shapes are known to fit."""
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
    tensors = x, depthwise_weight, pointwise_weight
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        return tuple(tensor.to(dtype) for tensor in tensors)
    if any(tensor.dtype != x.dtype for tensor in tensors):
        raise UserError(f"x is {x.dtype}, so both weights must be; cast them or use torch.autocast")
    return tensors
