"""Ruling out the weaker candidates in the course of a search."""

from collections.abc import Mapping

import torch
from torch import Tensor

from neuroexapt.core.supernet import Supernet


def keep_strongest(supernet: Supernet, weights: Mapping[str, Tensor], count: int) -> bool:
    """Rule out all but the ``count`` candidates with the largest ``weights`` [E, K] on every edge.

    Returns whether there were more.
    """
    if all(supernet.kept(cell).sum(dim=-1).max() <= count for cell in weights):
        return False
    for cell, of_candidates in weights.items():
        strongest = of_candidates.topk(count, dim=-1).indices
        supernet.keep(cell, torch.zeros_like(supernet.kept(cell)).scatter_(-1, strongest, True))
    return True
