"""How well the next item is ranked among the whole catalogue.

These are full-ranking figures; those that rank the target among 100 sampled items are far higher and
cannot be compared (Krichene, Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020).
Shape legend: P predictions, V items, D width.
"""

import torch
from torch import Tensor

CHUNK = 2**16
"""Items whose scores are held at a time."""


@torch.no_grad()
def target_ranks(queries: Tensor, items: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """How many items score at least as high as each target, besides itself: [P] int64, 0 at best.

    So a tie counts against the target, as does a score that is not a number, and a model that cannot tell
    items apart ranks it last.

    Args:
        queries: [P, D]; the score of item v is ``⟨queries[p], items[v]⟩``.
        items: [V + 1, D], of which row 0, the padding, is no item.
        targets: [P], 1 to V.
    """
    # The product that the target is compared by is one of those that it is compared with: other kernels round
    # differently.
    own = torch.full(targets.shape, -torch.inf, device=queries.device)
    for start, scores in _scores(queries, items, chunk):
        inside = (targets >= start) & (targets < start + scores.shape[1])
        column = (targets - start).clamp(0, scores.shape[1] - 1)
        own = torch.where(inside, scores.gather(1, column[:, None])[:, 0].float(), own)
    ranks = torch.full(targets.shape, -1, device=queries.device)
    for _, scores in _scores(queries, items, chunk):
        ranks += (~(scores.float() < own[:, None])).sum(dim=1)
    return ranks


def _scores(queries: Tensor, items: Tensor, chunk: int):
    """(first item, scores [P, chunk]) of one chunk of the catalogue after the other."""
    for start in range(1, len(items), chunk):
        yield start, queries @ items[start : start + chunk].T


def hits(ranks: Tensor, k: int = 10) -> Tensor:
    """1 where the target is among the k best, else 0; the mean is HR@k."""
    return (ranks < k).float()


def gains(ranks: Tensor, k: int = 10) -> Tensor:
    """``1 / log2(rank + 2)`` where the target is among the k best, else 0; the mean is NDCG@k."""
    return hits(ranks, k) / torch.log2(ranks.float() + 2)
