"""The definition of HSTU's attention against its formula, one score at a time, and what it promises."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from neuroexapt.errors import UserError
from neuroexapt.functional import hstu_hierarchical_attention
from neuroexapt.kernels.hstu_hierarchical_attention import time_bucket_starts

BUCKETS = 6
LENGTHS = torch.tensor([5, 0, 3])


def fp64(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def inputs(batch: int = 3, length: int = 5, heads: int = 2) -> dict[str, Tensor]:
    shape = (batch, length, heads)
    return {
        "query": fp64(*shape, 3),
        "key": fp64(*shape, 3, seed=1),
        "value": fp64(*shape, 4, seed=2),
        "position_bias": fp64(2 * length - 1, seed=3),
        "time_bias": fp64(BUCKETS, seed=4),
        "timestamps": torch.randint(0, 9, shape[:2], generator=torch.Generator().manual_seed(5)),
    }


def by_the_formula(arguments: dict[str, Tensor], lengths: list[int], windows: list[int]) -> Tensor:
    query, key, value, position_bias, time_bias, times = arguments.values()
    batch, length, heads = query.shape[:3]
    y = torch.zeros_like(value)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        for i in range(lengths[b]):
            for j in range(max(0, i - windows[h] + 1), i + 1):
                gap = max(1, abs(int(times[b, i] - times[b, j])))
                bucket = min(math.floor(math.log(gap) / 0.301), BUCKETS - 1)
                score = query[b, i, h] @ key[b, j, h] / 3**0.5
                score = score + position_bias[length - 1 + j - i] + time_bias[bucket]
                y[b, i, h] += score * torch.sigmoid(score) / length * value[b, j, h]
    return y


@torch.no_grad()
def test_each_score_is_the_formulas() -> None:
    arguments = inputs()
    y = hstu_hierarchical_attention(**arguments, windows=(None, 2), lengths=LENGTHS)
    torch.testing.assert_close(y, by_the_formula(arguments, LENGTHS.tolist(), [5, 2]))


@pytest.mark.parametrize("windows", [(None,), (2, 4)])
def test_gradients(windows: tuple) -> None:
    *tensors, timestamps = inputs().values()

    def attend(query, key, value, position_bias, time_bias):
        return hstu_hierarchical_attention(
            query, key, value, position_bias=position_bias, time_bias=time_bias, timestamps=timestamps,
            windows=windows, lengths=LENGTHS,
        )  # fmt: skip

    assert gradcheck(attend, tensors)


def test_jagged_input_gives_the_numbers_of_padded_input() -> None:
    arguments = inputs()
    valid = torch.arange(5) < LENGTHS[:, None]
    rows = {name: x[valid] if x.dim() > 1 else x for name, x in arguments.items()}
    padded = hstu_hierarchical_attention(**arguments, lengths=LENGTHS)
    jagged = hstu_hierarchical_attention(**rows, offsets=torch.tensor([0, 5, 5, 8]), max_length=5)
    assert padded[~valid].abs().sum() == 0
    torch.testing.assert_close(jagged, padded[valid])


def test_what_lies_in_padding_is_neither_read_nor_given_a_gradient() -> None:
    arguments = inputs()
    padding = torch.arange(5) >= LENGTHS[:, None]
    clean = hstu_hierarchical_attention(**arguments, lengths=LENGTHS)
    names = ("query", "key", "value")
    with torch.no_grad():
        for name in names:
            arguments[name][padding] = float("nan")
        arguments["timestamps"][padding] = -(2**40)
    y = hstu_hierarchical_attention(**arguments, lengths=LENGTHS)
    assert torch.equal(y, clean)
    for grad in torch.autograd.grad(y.sum(), [arguments[name] for name in names]):
        assert grad[padding].abs().sum() == 0
        assert grad.isfinite().all()


def test_a_later_position_changes_nothing_before_it() -> None:
    arguments = {name: x.detach() for name, x in inputs().items()}
    before = hstu_hierarchical_attention(**arguments)
    for name in ("query", "key", "value", "timestamps"):
        arguments[name][:, 3] += 7
    after = hstu_hierarchical_attention(**arguments)
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.equal(after[:, 3:], before[:, 3:])


def test_a_larger_position_table_is_centred_on_the_same_entry() -> None:
    arguments = inputs()
    expected = hstu_hierarchical_attention(**arguments)
    arguments["position_bias"] = torch.nn.functional.pad(arguments["position_bias"], (2, 2), value=9.0)
    assert torch.equal(hstu_hierarchical_attention(**arguments), expected)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1)])
def test_the_smallest_inputs(shape: tuple[int, int]) -> None:
    query = fp64(*shape, 2, 3)
    y = hstu_hierarchical_attention(query, query, query, lengths=torch.zeros(shape[0]))
    assert y.shape == query.shape
    assert y.abs().sum() == 0


def test_buckets_are_those_of_the_logarithm() -> None:
    starts = time_bucket_starts(60, torch.device("cpu")).tolist()
    assert starts[:7] == [1, 2, 2, 3, 4, 5, 7]
    for bucket, start in enumerate(starts[1:], 1):
        assert math.log(start) / 0.301 >= bucket > math.log(start - 1) / 0.301


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"key": fp64(3, 5, 2, 4)}, "query and key"),
        ({"value": fp64(3, 5, 1, 4)}, "value must be"),
        ({"value": fp64(3, 5, 2, 4).float()}, "one dtype"),
        (dict.fromkeys(("query", "key", "value"), torch.ones(3, 5, 2, 3).long()), "floating-point"),
        ({"position_bias": fp64(7)}, "L ≥ 5"),
        ({"time_bias": None}, "come together"),
        ({"timestamps": torch.zeros(3, 5)}, "integers"),
        ({"windows": (None, 2, 2)}, "2 heads"),
        ({"windows": (0,)}, "at least 1"),
        ({"offsets": torch.tensor([0, 3]), "max_length": 3}, r"\[T, H, d\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        hstu_hierarchical_attention(**(inputs() | changes))
