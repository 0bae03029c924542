"""How kernels become operators ``torch.ops.neuroexapt.<name>`` that autograd and torch.compile know.

By hand with ``torch.library.Library``: what ``torch.library.custom_op`` wraps around an operator took 230 of
the 320 µs that Python spent on a forward and backward of a sum of eight operands.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_library = torch.library.Library("neuroexapt", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Register an operator that allocates its results, changes nothing and has no derivative yet.

    Args:
        schema: ``name(Tensor x, …) -> Tensor``.
        run: computes it on the tensors' own device.
        fake: allocates its results only; of fake tensors ``torch.compile`` learns their shapes from it.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.neuroexapt, name).default
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(op, fake, lib=_library)
    return op


def set_autograd(op: OpOverload, function: Callable[..., Any]) -> None:
    """Let autograd run ``function``, made by ``differentiable_once``, wherever ``op`` is called."""
    _library.impl(op, function, "Autograd")


def differentiable_once(
    forward: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    differentiable: int = 1,
) -> Callable[..., Any]:
    """``forward`` as a function that autograd can differentiate, but not twice.

    Args:
        forward: calls an operator.
        save: ``save(ctx, arguments, results)`` keeps what ``backward`` needs.
        backward: ``backward(ctx, *gradients)`` gives the gradient of each argument or None. Of several
            results, the gradient of one that was not used is None.
        differentiable: how many of several results have a gradient, the first ones.
    """

    class DifferentiableOnce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                results = forward(*arguments)
            if isinstance(results, tuple):
                ctx.mark_non_differentiable(*results[differentiable:])
                ctx.set_materialize_grads(False)  # else autograd fills gradients of those with zeros
            save(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx, *gradients: Tensor | None) -> Any:
            if torch.is_grad_enabled():  # which create_graph=True does
                raise RuntimeError(
                    "the kernels can be differentiated once; use PyTorch (cuda:torch) for more"
                )
            return backward(ctx, *gradients[:differentiable])

    return DifferentiableOnce.apply
