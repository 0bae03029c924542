"""Ranks in the whole catalogue against a slow, exact count."""

import math

import pytest
import torch

from neuroexapt.recommend.metrics import gains, hits, target_ranks


def slow_rank(query: list[float], items: list[list[float]], target: int) -> int:
    scores = [sum(q * e for q, e in zip(query, item, strict=True)) for item in items]
    return sum(score >= scores[target] for number, score in enumerate(scores) if number not in (0, target))


@pytest.mark.parametrize("chunk", [1, 7, 29, 30, 31, 1000])
def test_ranks_are_those_of_a_slow_count_whatever_the_chunks(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Small integers: products are exact and often tie.
    items = torch.randint(-2, 3, (31, 3), generator=generator).double()
    queries = torch.randint(-2, 3, (40, 3), generator=generator).double()
    targets = torch.randint(1, 31, (40,), generator=generator)
    expected = [
        slow_rank(query, items.tolist(), target)
        for query, target in zip(queries.tolist(), targets.tolist(), strict=True)
    ]
    assert target_ranks(queries, items, targets, chunk).tolist() == expected


def test_figures_of_ranks() -> None:
    ranks = torch.tensor([0, 1, 9, 10, 500])
    assert hits(ranks).tolist() == [1, 1, 1, 0, 0]
    assert gains(ranks).tolist() == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(11), 0, 0])
    assert hits(ranks, k=1).tolist() == [1, 0, 0, 0, 0]


def test_a_model_that_tells_no_items_apart_hits_nothing() -> None:
    ranks = target_ranks(torch.zeros(3, 2), torch.randn(50, 2), torch.tensor([1, 2, 49]))
    assert ranks.tolist() == [48, 48, 48]


def test_a_model_that_diverged_hits_nothing() -> None:
    queries, items = torch.randn(3, 2), torch.randn(50, 2)
    queries[0], items[7] = math.nan, math.nan
    ranks = target_ranks(queries, items, torch.tensor([1, 7, 2]))
    assert ranks[:2].tolist() == [48, 48]
    assert ranks[2] > 0  # whatever item 7 is to score


def test_the_padding_is_no_item() -> None:
    items = torch.tensor([[9.0], [1.0], [2.0]])
    assert target_ranks(torch.ones(1, 1), items, torch.tensor([2])).tolist() == [0]
