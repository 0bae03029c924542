"""The loss of the next item, against its definition position by position."""

import math

import pytest
import torch

from neuroexapt.core.sequence_network import Queries
from neuroexapt.recommend.next_item import NextItem


def make_output() -> tuple[Queries, torch.Tensor]:
    """Two rows of three positions over four items; the second row asks for two."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    items = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 2, 0], [1, 4, 0]])
    return Queries(queries, items), labels


ASKED = ((0, 1), (1, 0), (1, 1))


def test_the_loss_is_the_mean_cross_entropy_of_what_is_asked() -> None:
    output, labels = make_output()
    losses = []
    for row, position in ASKED:
        scores = (output.items[1:] @ output.queries[row, position]).tolist()
        own = scores[labels[row, position] - 1]
        losses.append(math.log(sum(map(math.exp, scores))) - own)
    assert NextItem().loss(output, labels).item() == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_positions_that_ask_nothing_and_the_padding_get_no_gradient() -> None:
    output, labels = make_output()
    leaves = [tensor.requires_grad_() for tensor in output]
    queries, items = torch.autograd.grad(NextItem().loss(output, labels), leaves)
    assert not queries[labels == 0].any()
    assert not items[0].any()
    assert queries[labels > 0].all()


def test_the_sampled_loss_compares_with_what_is_drawn() -> None:
    output, labels = make_output()
    torch.manual_seed(3)
    drawn = torch.randint(1, 5, (6,)).tolist()
    torch.manual_seed(3)
    found = NextItem(negatives=6).loss(output, labels).item()
    losses = []
    for row, position in ASKED:
        scores = (output.items @ output.queries[row, position]).tolist()
        target = labels[row, position].item()
        others = sum(math.exp(scores[item]) for item in drawn if item != target)
        losses.append(math.log(math.exp(scores[target]) + others) - scores[target])
    assert found == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_positions_limit_how_many_count() -> None:
    output, labels = make_output()
    # Two rows of one: the first two that ask.
    alone = labels.clone()
    alone[1, 1] = 0
    assert NextItem(positions=1).loss(output, labels) == NextItem().loss(output, alone)
    assert NextItem(positions=2).loss(output, labels) == NextItem().loss(output, labels)


def test_scores_are_of_the_last_item_asked_for() -> None:
    items = torch.cat([torch.zeros(1, 12), torch.eye(12)])
    queries = torch.zeros(2, 3, 12)
    queries[0, 1, 4] = 1  # item 5 first
    queries[1, 1, :11] = torch.arange(11.0).flip(0) + 1  # item 11 eleventh: no hit
    labels = torch.tensor([[0, 5, 0], [7, 11, 0]])
    task, output = NextItem(), Queries(queries, items)
    loss, hit, gain = task.score(output, labels).tolist()
    assert (hit, gain) == (1, 1)
    assert task.accuracy(output, labels).item() == 0.5
    expected = -queries[[0, 1], [1, 1]].log_softmax(dim=1)[[0, 1], [4, 10]].sum()
    assert loss == pytest.approx(expected.item())
