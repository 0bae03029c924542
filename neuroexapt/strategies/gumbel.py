"""Samples of a categorical distribution that can be differentiated."""

import torch
from torch import Tensor


def gumbel_softmax(alpha: Tensor, temperature: Tensor) -> Tensor:
    """``softmax((log softmax(α) + g) / τ)`` over the last dimension, g of the Gumbel distribution.

    The largest element is k with probability softmax(α)_k; the sample comes close to a corner as τ falls.

    Source: Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017; Maddison, Mnih,
    Teh, "The Concrete Distribution", ICLR 2017.
    """
    noise = -torch.empty_like(alpha).exponential_().log()
    return ((alpha.log_softmax(dim=-1) + noise) / temperature).softmax(dim=-1)
