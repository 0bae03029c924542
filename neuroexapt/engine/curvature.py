"""How sharp a minimum is: the largest eigenvalue of a Hessian, from gradients alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

RADIUS = 0.1
"""Norm of the step over which gradients are compared. Rounding to TF32 asks for a large one."""
PRODUCTS = 20
"""With the Hessian, each two gradients; the eigenvalue at the end of the spectrum is exact much earlier."""


@torch.no_grad()
def largest_eigenvalue(gradient: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> float:
    """The largest eigenvalue of the Hessian over ``parameters``, by Lanczos' method.

    ``gradient`` returns [P], the gradient with respect to all of them where they are now. A product with the
    Hessian is a central difference, ``H v ≈ (g(x + r v) − g(x − r v)) / 2r``, so that networks that can be
    differentiated once will do. The parameters are left as they were.
    """
    saved = [parameter.clone() for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]

    def gradient_at(offset: Tensor) -> Tensor:
        for parameter, start, part in zip(parameters, saved, offset.split(sizes), strict=True):
            parameter.copy_(start + part.view_as(start))
        return gradient()

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(sum(sizes), generator=generator, dtype=saved[0].dtype).to(saved[0].device)
    basis, products = v.new_zeros(0, len(v)), v.new_zeros(0, len(v))
    for _ in range(min(PRODUCTS, len(v))):
        for _ in range(2):  # once leaves what rounding does to nearly parallel vectors
            v = v - (basis @ v) @ basis
        v = v / v.norm()
        product = (gradient_at(RADIUS * v) - gradient_at(-RADIUS * v)) / (2 * RADIUS)
        basis, products = torch.vstack([basis, v]), torch.vstack([products, product])
        v = product
    for parameter, start in zip(parameters, saved, strict=True):
        parameter.copy_(start)
    projected = basis @ products.T
    return torch.linalg.eigvalsh((projected + projected.T) / 2)[-1].item()
