"""Ruling out the weaker candidates in the course of a search."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from neuroexapt.core.supernet import Supernet


def keep_strongest(supernet: Supernet, weights: Mapping[str, Tensor], count_of: Callable[[int], int]) -> bool:
    """Rule out all but the candidates with the largest ``weights`` [E, K] on every edge, ``count_of(K)`` of
    them.

    Returns whether there were more.
    """
    counts = {cell: count_of(of_candidates.shape[-1]) for cell, of_candidates in weights.items()}
    if all(supernet.kept(cell).sum(dim=-1).max() <= count for cell, count in counts.items()):
        return False
    for cell, of_candidates in weights.items():
        strongest = of_candidates.topk(counts[cell], dim=-1).indices
        supernet.keep(cell, torch.zeros_like(supernet.kept(cell)).scatter_(-1, strongest, True))
    return True
