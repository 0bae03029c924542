"""The dot interaction of DLRM in plain PyTorch: the definition that its kernel is held to.

Legend: B batch, F fields, V = F + 1 vectors a sample, D width, P = V · (V − 1) / 2 pairs.
"""

import torch
from torch import Tensor

from neuroexapt.errors import UserError
from neuroexapt.kernels.autocast import keeping_dtypes


@keeping_dtypes
def interaction_operator(dense: Tensor, fields: Tensor | None = None) -> Tensor:
    """``R = [x ; tril(T Tᵀ, −1)]`` with ``T = [x; e_1 … e_F]``; see ``neuroexapt.functional``."""
    check_shapes(dense, fields)
    vectors = dense if fields is None else torch.cat([dense[:, None], fields], dim=1)  # [B, V, D]
    first, second = torch.tril_indices(vectors.shape[1], vectors.shape[1], -1, device=vectors.device)
    products = vectors @ vectors.mT  # [B, V, V]
    return torch.cat([vectors[:, 0], products[:, first, second]], dim=1)


def check_shapes(dense: Tensor, fields: Tensor | None) -> None:
    """Raises a UserError unless ``functional.interaction_operator`` takes tensors of these shapes."""
    if fields is None:
        if dense.dim() != 3 or dense.shape[1] == 0:
            raise UserError(f"without fields, dense holds all vectors [B, F + 1, D], not {[*dense.shape]}")
    elif dense.dim() != 2 or fields.dim() != 3 or fields.shape[::2] != dense.shape:
        raise UserError(f"dense [B, D] and fields [B, F, D] differ: {[*dense.shape]}, {[*fields.shape]}")
