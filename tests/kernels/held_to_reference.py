"""Kernels against their definitions in fp64, forward and in every gradient, on a GPU or interpreted."""

from collections.abc import Callable, Sequence

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of results and gradients, relative to the largest value of the definition's in fp64.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@triton.jit
def _count_kernel(out_ptr, n):
    total = 0
    for _ in range(n):
        total += 1
    tl.store(out_ptr, total)


def _interpreter_is_too_old() -> bool:
    """For the installed NumPy, as that of Triton 3.6 is with NumPy 2.4 and later."""
    if DEVICE == "cuda":
        return False
    try:
        _count_kernel[1,](torch.zeros(1, dtype=torch.int32), 2)
    except triton.runtime.errors.InterpreterError:
        return True
    return False


runs_kernels = pytest.mark.skipif(
    _interpreter_is_too_old(), reason="this Triton's interpreter cannot run loops with this NumPy"
)


def random_tensors(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """One tensor a shape, the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def results_and_gradients(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What ``op`` gives, and the gradient of each input for fixed random gradients, rounded to ``dtype``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = op(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    gradients = random_tensors(*(y.shape for y in results), dtype=dtype, seed=3)
    gradients = [g.to(y.dtype) for g, y in zip(gradients, results, strict=True)]
    return [*(y.detach() for y in results), *torch.autograd.grad(results, leaves, gradients)]


def largest_error(definition: Op, op: Op, inputs: Sequence[Tensor]) -> float:
    """Of the results and gradients of ``op``, each relative to the largest value of the exact one."""
    dtype = inputs[0].dtype
    actual = results_and_gradients(op, inputs, dtype)
    exact = results_and_gradients(definition, [x.double() for x in inputs], dtype)
    return max(relative_error(a, b) for a, b in zip(actual, exact, strict=True))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest exact value; 0 of empty tensors, NaN where there is one.

    Operands are of the order of 1: what is next to nothing beside them is a sum of terms that cancel, such as
    the attention's gradient where there is one item, and counts as a tenth.
    """
    assert actual.shape == exact.shape
    if not exact.numel():
        return 0.0
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(0.1)).item()
