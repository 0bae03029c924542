"""Pools and decayed self-similarity: their definition and, interpreted at tiny sizes, their kernels."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from neuroexapt import functional
from neuroexapt.errors import UserError
from neuroexapt.kernels import sequence_recommendation_interaction as definition
from tests.kernels.held_to_reference import DEVICE, largest_error, random_tensors, runs_kernels

# Triton's interpreter warns of what kernels mask.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
LENGTHS = torch.tensor([6, 0, 4], device=DEVICE)
# Unix seconds: single precision alone could not tell neighbours apart.
TIMES = torch.tensor([[0, 0, 2, 5, 5, 9], [0, 1, 2, 3, 4, 5], [1, 3, 3, 4, 4, 4]], device=DEVICE)
TIMES += 1_700_000_000


def inputs(batch: int = 3, length: int = 6, width: int = 4, dtype=torch.float64) -> list[Tensor]:
    items, target = random_tensors((batch, length, width), (batch, width), dtype=dtype)
    return [items, target, torch.tensor(0.3, dtype=dtype, device=DEVICE)]


def jagged(items: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The same sequences as rows with offsets."""
    lengths = arguments["lengths"]
    valid = torch.arange(items.shape[1], device=items.device) < lengths[:, None]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    times = arguments.get("timestamps")
    times = times if times is None else times[valid]
    other = {name: arguments[name] for name in arguments if name not in ("lengths", "timestamps")}
    return items[valid], other | {"offsets": offsets, "max_length": items.shape[1], "timestamps": times}


def by_hand(items: Tensor, target: Tensor, decay: float, times: list[int], window: int) -> list[Tensor]:
    """The four formulas for one sequence without padding."""
    scores = [float(e @ target) / len(target) ** 0.5 for e in items]
    attention = sum(math.exp(s) * e for s, e in zip(scores, items, strict=True)) / sum(map(math.exp, scores))
    aged = [math.exp(-decay * (times[-1] - time)) for time in times]
    long_term = sum(w * e for w, e in zip(aged, items, strict=True)) / sum(aged)
    unit = [e / (e @ e + 1e-6).sqrt() for e in items]
    similarity = [
        sum(math.exp(-decay * (times[t] - times[j])) * float(unit[t] @ unit[j]) for j in range(t))
        for t in range(len(times))
    ]
    pools = torch.stack([attention, items[-window:].mean(0), long_term])
    return [pools, torch.tensor(similarity, dtype=items.dtype, device=DEVICE)]


def test_the_formulas():
    items, target, decay = inputs()
    pools, similarity = functional.sequence_recommendation_interaction(
        items, target, decay, timestamps=TIMES, window=3, lengths=LENGTHS
    )
    for b in (0, 2):
        n = int(LENGTHS[b])
        times = TIMES[b, :n].tolist()
        expected = by_hand(items[b, :n], target[b], float(decay), times, window=3)
        torch.testing.assert_close([pools[b], similarity[b, :n]], expected)
    assert not pools[1].any()
    assert not similarity[1].any()
    assert not similarity[2, 4:].any()


@pytest.mark.parametrize("arguments", [{}, {"timestamps": TIMES, "lengths": LENGTHS, "window": 2}])
def test_gradients(arguments):
    leaves = [x.requires_grad_() for x in inputs()]
    assert gradcheck(
        lambda *tensors: functional.sequence_recommendation_interaction(*tensors, **arguments), leaves
    )


def test_jagged_gives_what_padded_gives():
    items, target, decay = inputs()
    arguments = {"timestamps": TIMES, "lengths": LENGTHS}
    pools, similarity = functional.sequence_recommendation_interaction(items, target, decay, **arguments)
    rows, places = jagged(items, arguments)
    of_rows = functional.sequence_recommendation_interaction(rows, target, decay, **places)
    valid = torch.arange(6, device=DEVICE) < LENGTHS[:, None]
    torch.testing.assert_close(of_rows, (pools, similarity[valid]), rtol=0, atol=0)


def check_padding_and_causality(op, dtype: torch.dtype) -> None:
    """What is behind a sequence has no influence, and an item none on the similarity of those before."""
    items, target, decay = inputs(dtype=dtype)
    arguments = {"timestamps": TIMES, "lengths": LENGTHS, "window": 2}
    pools, similarity = op(items, target, decay, **arguments)
    dirty, dirty_times = items.clone(), arguments["timestamps"].clone()
    for b, n in enumerate(LENGTHS.tolist()):
        dirty[b, n:], dirty_times[b, n:] = float("nan"), 7
    dirty.requires_grad_()
    again = op(dirty, target, decay, **arguments | {"timestamps": dirty_times})
    assert torch.equal(again[0], pools)
    assert torch.equal(again[1], similarity)
    (gradient,) = torch.autograd.grad(again[0].sum() + again[1].sum(), dirty)
    assert all(not gradient[b, n:].any() for b, n in enumerate(LENGTHS.tolist()))
    assert gradient.isfinite().all()
    for t in range(1, 6):
        changed = items.clone()
        changed[:, t] += 1
        assert torch.equal(op(changed, target, decay, **arguments)[1][:, :t], similarity[:, :t])


def test_padding_and_causality():
    check_padding_and_causality(functional.sequence_recommendation_interaction, torch.float64)


def test_no_items_and_one_item():
    items, target, decay = inputs(length=0)
    pools, similarity = functional.sequence_recommendation_interaction(items, target, decay)
    assert pools.shape == (3, 3, 4)
    assert not pools.any()
    assert similarity.shape == (3, 0)
    items, target, decay = inputs(length=1)
    pools, similarity = functional.sequence_recommendation_interaction(items, target, decay)
    torch.testing.assert_close(pools, items.expand(3, 3, 4))
    assert not similarity.any()


def test_an_item_of_zeros_has_a_finite_gradient():
    items, target, decay = inputs()
    items[:, 2] = 0
    _, similarity = functional.sequence_recommendation_interaction(items.requires_grad_(), target, decay)
    assert torch.autograd.grad(similarity.sum(), items)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"items": torch.zeros(3, 6)}, r"items must be \[B, N, D\]"),
        ({"items": torch.zeros(3, 6, 4, dtype=torch.int64)}, "floating-point numbers, not .* of torch.int64"),
        ({"target": torch.zeros(2, 4)}, r"target must be \[3, 4\]"),
        ({"decay": torch.zeros(1)}, "decay is one rate"),
        ({"timestamps": torch.zeros(3, 5)}, r"timestamps must be \[3, 6\]"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, complaint):
    items, target, decay = inputs()
    with pytest.raises(UserError, match=complaint):
        functional.sequence_recommendation_interaction(
            **{"items": items, "target": target, "decay": decay} | change
        )


def calls() -> dict[str, tuple[list[Tensor], dict[str, Any]]]:
    """One and several chunks of 64 items, more than 16 of 16 items, with and without times and lengths."""
    lengths = torch.tensor([70, 0, 64], device=DEVICE)
    times = torch.arange(210, device=DEVICE).reshape(3, 70) // 3 + 1_700_000_000
    one, several = inputs(3, 7, 5, torch.float32), inputs(3, 70, 20, torch.float32)
    rows, places = jagged(several[0], {"timestamps": times.double() / 3, "lengths": lengths, "window": 9})
    return {
        "one chunk": (one, {"window": 3}),
        "lengths": (one, {"lengths": torch.tensor([7, 0, 1], device=DEVICE)}),
        "several chunks": (several, {}),
        "times": (several, {"timestamps": times, "lengths": lengths}),
        "jagged": ([rows, *several[1:]], places),
    }


@runs_kernels
@pytest.mark.parametrize("name", calls())
def test_kernels_match_the_definition(name, nan_filled_empty):
    from neuroexapt.kernels import sequence_recommendation_interaction_triton as triton

    tensors, arguments = calls()[name]
    error = largest_error(
        lambda *leaves: definition.sequence_recommendation_interaction(*leaves, **arguments),
        lambda *leaves: triton.sequence_recommendation_interaction(*leaves, **arguments),
        tensors,
    )
    assert error < 2e-5


@runs_kernels
def test_kernels_join_more_chunks_than_a_program_reads_at_once(monkeypatch):
    from neuroexapt.kernels import sequence_recommendation_interaction_triton as triton

    monkeypatch.setattr(triton, "_CHUNK_LENGTH", 16)
    arguments = {"lengths": torch.tensor([275], device=DEVICE)}
    tensors = [*inputs(1, 290, 3, torch.float32)[:2], torch.tensor(0.01, device=DEVICE)]
    error = largest_error(
        lambda *leaves: definition.sequence_recommendation_interaction(*leaves, **arguments),
        lambda *leaves: triton.sequence_recommendation_interaction(*leaves, **arguments),
        tensors,
    )
    assert error < 2e-5


@runs_kernels
def test_kernels_keep_to_padding_and_causality():
    from neuroexapt.kernels import sequence_recommendation_interaction_triton as triton

    check_padding_and_causality(triton.sequence_recommendation_interaction, torch.float32)


@runs_kernels
@pytest.mark.parametrize("used", [0, 1])
def test_kernels_pass_back_what_is_used(used):
    from neuroexapt.kernels import sequence_recommendation_interaction_triton as triton

    items, target, decay = inputs(3, 70, 5, torch.float32)
    error = largest_error(
        lambda *leaves: definition.sequence_recommendation_interaction(leaves[0], target, leaves[1])[used],
        lambda *leaves: triton.sequence_recommendation_interaction(leaves[0], target, leaves[1])[used],
        [items, decay],
    )
    assert error < 2e-5


@runs_kernels
def test_kernels_pass_opcheck():
    from neuroexapt.kernels import sequence_recommendation_interaction_triton  # noqa: F401

    leaves = [x.requires_grad_() for x in inputs(dtype=torch.float32)]
    op = torch.ops.neuroexapt.sequence_recommendation_interaction.default
    torch.library.opcheck(op, (*leaves, TIMES, 2, LENGTHS, None, 6))


def test_calls_that_the_kernels_cannot_take_are_named():
    from neuroexapt.kernels.sequence_recommendation_interaction_triton import supports

    tensors = inputs(dtype=torch.float32)
    assert supports(*tensors).ok
    assert "float64" in supports(*inputs()).reason
    assert "empty" in supports(*inputs(length=0, dtype=torch.float32)).reason
    assert "devices" in supports(*tensors, timestamps=TIMES.to("meta")).reason
    assert supports(*tensors, lengths=LENGTHS.to("meta")).ok
