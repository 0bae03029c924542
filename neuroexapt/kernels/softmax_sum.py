"""What the Triton and the CUDA version of ``softmax_sum`` and ``weighted_sum`` share.

Memory layout, ``torch.library`` registration and autograd are written here once; a tier adds two
launchers. Legend: K operands ``xs`` of one shape and dtype; ``scores``: [K], the weights themselves
or, where ``is_logits``, the logits whose softmax the weights are.

The ops save ``scores`` and, only where ``scores`` need a gradient, ``xs``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neuroexapt.backend import Support
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd

MAX_OPERANDS = 48
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Sum = Callable[[Sequence[Tensor], Tensor], Tensor]
# (xs, scores, y, is_logits) fills y.
Forward = Callable[[list[Tensor], Tensor, Tensor, bool], None]
# (grad_y, xs, scores, grad_xs, grad_scores, is_logits) fills every gradient that is not None; xs is
# empty where grad_scores is None.
Backward = Callable[[Tensor, list[Tensor], Tensor, list[Tensor | None], Tensor | None, bool], None]


def define_ops(tier: str, forward: Forward, backward: Backward) -> tuple[Sum, Sum]:
    """Register ``neuroexapt::softmax_sum_<tier>`` and ``neuroexapt::weighted_sum_<tier>``."""
    softmax_sum = _define_op(f"softmax_sum_{tier}", True, forward, backward)
    weighted_sum = _define_op(f"weighted_sum_{tier}", False, forward, backward)
    return softmax_sum, weighted_sum


def supports(xs: Sequence[Tensor], scores: Tensor) -> Support:
    """Whether the kernels take these arguments."""
    first = xs[0]
    if len(xs) > MAX_OPERANDS:
        return Support(False, f"more than {MAX_OPERANDS} operands")
    if first.dtype not in DTYPES:
        return Support(False, f"dtype {first.dtype}")
    if any(x.dtype != first.dtype for x in xs):
        return Support(False, "operands of several dtypes")
    if any(tensor.device != first.device for tensor in (*xs, scores)):
        return Support(False, "operands on several devices")
    if first.numel() == 0:
        return Support(False, "empty operands")
    return Support(True)


def probe(weighted_sum: Sum) -> None:
    """Compile and run a tiny sum on the GPU; raises where that fails."""
    xs = [torch.full((8,), value, device="cuda") for value in (1.0, 2.0)]
    y = weighted_sum(xs, torch.tensor([3.0, 4.0], device="cuda"))
    if y.tolist() != [11.0] * 8:
        raise RuntimeError(f"the probe kernel gave {y.tolist()} instead of eleven")


def _define_op(name: str, is_logits: bool, forward: Forward, backward: Backward) -> Sum:
    def run(xs: list[Tensor], scores: Tensor) -> Tensor:
        y = torch.empty_like(xs[0])
        forward(_with_strides(xs, y.stride()), _fp32(scores), y, is_logits)
        return y

    def run_backward(
        grad_y: Tensor, xs: list[Tensor], scores: Tensor, wants_xs: list[bool], wants_scores: bool
    ) -> list[Tensor]:
        grad_xs, grad_scores = _empty_gradients(grad_y, xs, scores, wants_xs, wants_scores)
        strides = _dense_strides(xs[0] if xs else grad_y)
        (grad_y,) = _with_strides([grad_y], strides)
        backward(grad_y, _with_strides(xs, strides), _fp32(scores), grad_xs, grad_scores, is_logits)
        return _wanted(grad_xs, grad_scores, scores)

    def fake(xs: list[Tensor], scores: Tensor) -> Tensor:
        return torch.empty_like(xs[0])

    def fake_backward(
        grad_y: Tensor, xs: list[Tensor], scores: Tensor, wants_xs: list[bool], wants_scores: bool
    ) -> list[Tensor]:
        return _wanted(*_empty_gradients(grad_y, xs, scores, wants_xs, wants_scores), scores)

    def save(ctx, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        scores, *xs = arguments
        wants_scores, *ctx.wants_xs = ctx.needs_input_grad
        ctx.save_for_backward(scores, *(xs if wants_scores else ()))

    def differentiate(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        scores, *xs = ctx.saved_tensors
        grads = iter(backward_op(grad_y, xs, scores, ctx.wants_xs, bool(xs)))
        grad_xs = [next(grads) if wanted else None for wanted in ctx.wants_xs]
        return next(grads, None), *grad_xs

    op = define(f"{name}(Tensor[] xs, Tensor scores) -> Tensor", run, fake)
    backward_arguments = "Tensor grad_y, Tensor[] xs, Tensor scores, bool[] wants_xs, bool wants_scores"
    backward_op = define(f"{name}_backward({backward_arguments}) -> Tensor[]", run_backward, fake_backward)
    # Autograd looks for tensors among the arguments, not inside lists.
    of_tensors = differentiable_once(lambda scores, *xs: op(xs, scores), save, differentiate)
    set_autograd(op, lambda xs, scores: of_tensors(scores, *xs))
    return op


def _fp32(scores: Tensor) -> Tensor:
    return scores.float().contiguous()


def _empty_gradients(
    grad_y: Tensor, xs: list[Tensor], scores: Tensor, wants_xs: list[bool], wants_scores: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    like = xs[0] if xs else grad_y
    grad_xs = [torch.empty_like(like) if wanted else None for wanted in wants_xs]
    grad_scores = torch.empty_like(scores, dtype=torch.float32) if wants_scores else None
    return grad_xs, grad_scores


def _wanted(grad_xs: list[Tensor | None], grad_scores: Tensor | None, scores: Tensor) -> list[Tensor]:
    grads = [grad_x for grad_x in grad_xs if grad_x is not None]
    return grads if grad_scores is None else [*grads, grad_scores.to(scores.dtype)]


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of ``torch.empty_like(x)``: those of ``x`` itself where ``x`` is dense."""
    return torch.empty_like(x, device="meta").stride()


def _with_strides(xs: list[Tensor], strides: tuple[int, ...]) -> list[Tensor]:
    """``xs`` in one memory order, copied only where theirs is another."""
    return [
        x
        if x.stride() == strides
        else torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
        for x in xs
    ]
