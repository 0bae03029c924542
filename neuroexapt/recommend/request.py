"""What is asked of a recommender, checked and in one form; several such requests as tensors."""

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroexapt.errors import UserError


@dataclass(frozen=True)
class Request:
    """One user's history, oldest item first, and how many items to recommend after it.

    ``timestamps`` (seconds) has one entry for each item, or is None where the caller knows none.
    """

    items: tuple[int, ...]
    timestamps: tuple[int, ...] | None
    num_recommendations: int
    exclude_seen: bool


def make_request(
    items: Sequence[Any],
    timestamps: Sequence[Any] | None,
    num_recommendations: int,
    exclude_seen: bool,
    num_items: int,
) -> Request:
    """The request for a history of item ids in 1..``num_items`` and their times.

    Raises:
        UserError: an id is out of range, the timestamps decrease or are not as many as the items, or less
            than one recommendation is asked for.
    """
    (count,) = _integers(
        [num_recommendations], range(1, 2**62), "num_recommendations must be an integer from 1 on"
    )
    ids = _integers(items, range(1, num_items + 1), f"item ids are integers from 1 to {num_items}")
    if timestamps is not None:
        timestamps = _integers(timestamps, range(2**62), "timestamps are seconds, integers from 0 on")
        _check_timestamps(timestamps, len(ids))
    return Request(ids, timestamps, count, exclude_seen)


def split_behaviors(behaviors: Sequence[Any]) -> tuple[list[Any], list[Any] | None]:
    """Items and timestamps of a history of ids or of mappings with ``item_id`` and perhaps ``timestamp``.

    Raises:
        UserError: some have a timestamp and some have none, or one is neither an id nor has one.
    """
    if isinstance(behaviors, Mapping) or not isinstance(behaviors, Iterable):
        raise UserError(f"user_behaviors must be a sequence, not {behaviors!r}")
    records = [entry if isinstance(entry, Mapping) else {"item_id": entry} for entry in behaviors]
    for entry in records:
        if "item_id" not in entry:
            raise UserError(f"a behavior is an item id or a mapping with item_id, not {entry!r}")
    timestamps = [entry["timestamp"] for entry in records if "timestamp" in entry]
    if timestamps and len(timestamps) < len(records):
        raise UserError("give a timestamp with every item of a history or with none")
    return [entry["item_id"] for entry in records], timestamps or None


def to_tensors(requests: Sequence[Request], rows: int, length: int, has_times: bool) -> tuple[Tensor, ...]:
    """items [``rows``, ``length``] padded with 0 on the right, lengths [``rows``], and timestamps like items.

    The latest ``length`` items of a longer history count. Rows beyond the requests are empty sequences.
    Unknown timestamps are 0, as if everything had happened at once; without ``has_times`` there are none.
    """
    items = torch.zeros(rows, length, dtype=torch.int64)
    timestamps = torch.zeros(rows, length, dtype=torch.int64)
    lengths = torch.zeros(rows, dtype=torch.int64)
    for row, request in enumerate(requests):
        latest = request.items[-length:]
        items[row, : len(latest)] = torch.tensor(latest, dtype=torch.int64)
        if request.timestamps:
            timestamps[row, : len(latest)] = torch.tensor(request.timestamps[-length:])
        lengths[row] = len(latest)
    return (items, lengths, timestamps) if has_times else (items, lengths)


def _check_timestamps(timestamps: Sequence[int], items: int) -> None:
    if len(timestamps) != items:
        raise UserError(f"a history of {items} items has as many timestamps, not {len(timestamps)}")
    if any(later < earlier for earlier, later in itertools.pairwise(timestamps)):
        raise UserError("timestamps decrease; give the history in order of time, the oldest item first")


def _integers(values: Iterable[Any], allowed: range, expectation: str) -> tuple[int, ...]:
    """``values``, which may be NumPy's or of tensors, as Python's integers."""
    return tuple(_integer(value, allowed, expectation) for value in values)


def _integer(value: Any, allowed: range, expectation: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:  # no integer
        number = -1
    if number not in allowed or isinstance(value, bool):
        raise UserError(f"{expectation}, not {value!r}")
    return number
