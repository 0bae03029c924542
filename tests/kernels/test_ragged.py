"""Padded and jagged sequences are the same rows."""

import pytest
import torch

from neuroexapt.errors import UserError
from neuroexapt.kernels.ragged import is_valid, ragged, to_jagged, to_padded

LENGTHS = torch.tensor([3, 0, 5])
OFFSETS = torch.tensor([0, 3, 3, 8])


def test_rows_of_padded_input_are_where_the_layout_says() -> None:
    x = torch.arange(15).reshape(3, 5)
    layout = ragged(x, LENGTHS)
    rows = x.flatten()
    for b, length in enumerate(LENGTHS.tolist()):
        start = int(layout.starts[b])
        assert rows[start : start + length].tolist() == x[b, :length].tolist()


def test_jagged_and_padded_are_inverse_of_each_other() -> None:
    values = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    layout = ragged(values, offsets=OFFSETS, max_length=5)
    padded = to_padded(values, layout)
    assert layout.lengths.tolist() == LENGTHS.tolist()
    assert padded[~is_valid(layout, 5)].abs().sum() == 0
    assert torch.equal(to_jagged(padded, layout), values)
    assert torch.autograd.gradcheck(lambda v: to_padded(v, layout), values)
    assert torch.autograd.gradcheck(lambda p: to_jagged(p, layout), padded)


def test_a_graph_takes_jagged_input() -> None:
    """Whose number of valid positions it would otherwise have to read from the device."""

    def there_and_back(values: torch.Tensor) -> torch.Tensor:
        layout = ragged(values, offsets=OFFSETS, max_length=5)
        return to_jagged(to_padded(values, layout), layout)

    values = torch.randn(8, 2)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), values)


def test_without_lengths_all_positions_are_valid() -> None:
    layout = ragged(torch.zeros(2, 4, 3))
    assert layout.lengths.tolist() == [4, 4]
    assert layout.starts.tolist() == [0, 4]


def test_empty_batches_and_lengths_have_a_layout() -> None:
    assert ragged(torch.zeros(0, 4)).starts.shape == (0,)
    empty = ragged(torch.zeros(2, 0))
    assert empty.starts.tolist() == empty.lengths.tolist() == [0, 0]
    none = torch.zeros(0, 3)
    assert to_padded(none, ragged(none, offsets=torch.zeros(3), max_length=2)).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"lengths": LENGTHS, "offsets": OFFSETS, "max_length": 5}, "no lengths"),
        ({"offsets": OFFSETS}, "max_length"),
        ({"lengths": LENGTHS[:2]}, r"shape \[3\]"),
        ({"max_length": 7}, "5 positions"),
        ({"offsets": OFFSETS[None], "max_length": 5}, r"offsets must have shape \[B \+ 1\]"),
        ({"offsets": OFFSETS[:0], "max_length": 5}, r"offsets must have shape \[B \+ 1\]"),
    ],
)
def test_contradictions_are_refused(arguments: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ragged(torch.zeros(3, 5), **arguments)
