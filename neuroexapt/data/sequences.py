"""Sequences of items, one a user: how they are read, split for training and testing, and fed to the device.

Shape legend: U users, N positions of a history, C what is known of each (the item, and perhaps when).
"""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from neuroexapt.data.loaders import Batch, Loader
from neuroexapt.errors import UserError

LEAST_EVENTS = 5
"""A user or an item with fewer is left out ("5-core"), as in the published comparisons."""


class Event(NamedTuple):
    """``time``: in seconds, or None where the file has none and lists events in order."""

    user: str
    item: str
    time: float | None


@dataclass(frozen=True, eq=False)
class Histories:
    """What each user did, in order: items are numbered from 1 and named by ``items[number - 1]``."""

    users: tuple[str, ...]
    items: tuple[str, ...]
    sequences: list[np.ndarray]
    times: list[np.ndarray] | None

    @property
    def events(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)


@dataclass(frozen=True, eq=False)
class SequencePart:
    """What is to be predicted from what, on the CPU.

    ``inputs``: int64 [U, C, N], items from 1 on, 0 after a history's end; then perhaps times, in s.
    ``labels``: int64 [U, N], the item that follows each position, 0 where none is to be predicted.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """Histories split by leaving one out: the last item of each is for the test, the one before it for
    validation (and α), and what precedes them for training.
    """

    name: str
    histories: Histories
    max_length: int
    train: SequencePart
    valid: SequencePart
    test: SequencePart
    kind = "histories"

    @property
    def facts(self) -> dict[str, Any]:
        """What a network must know of the data."""
        return {
            "num_items": len(self.histories.items),
            "max_length": self.max_length,
            "has_times": self.histories.times is not None,
        }

    @property
    def description(self) -> dict[str, Any]:
        """What whoever uses a trained network must know of the data, as JSON; items by their number."""
        return {
            "kind": self.kind,
            "facts": self.facts,
            "items": ["", *self.histories.items],
            "item_counts": self.item_counts.tolist(),
        }

    def loader(
        self, part: str, *, training: bool, batch_size: int, device: torch.device, seed: int
    ) -> "SequenceLoader":
        """Batches of ``part``, ``"train"``, ``"valid"`` or ``"test"``; in training full ones only."""
        return SequenceLoader(
            getattr(self, part), batch_size=batch_size, device=device, seed=seed, drop_last=training
        )

    @property
    def item_counts(self) -> Tensor:
        """How often each item occurs in what is trained on: [V + 1] int64, 0 for the padding."""
        items = np.concatenate([sequence[:-2] for sequence in self.histories.sequences])
        return torch.from_numpy(np.bincount(items, minlength=len(self.histories.items) + 1))

    @property
    def baseline(self) -> tuple[str, float]:
        """An answer that takes no network, and its HR@10 on the test: the commonest items in training."""
        commonest = self.item_counts.argsort(descending=True, stable=True)[:10]
        share = torch.isin(self.test.labels.amax(dim=1), commonest).double().mean().item()
        return "the ten commonest items", share

    @property
    def input_size(self) -> tuple[int]:
        return (self.max_length,)

    @property
    def identity(self) -> list[Any]:
        """Besides labels, what another data set would differ in."""
        return [self.name, self.facts, len(self.train), len(self.test)]


def load_sequences(
    path: Path | str, max_length: int = 50, *, least_events: int = LEAST_EVENTS
) -> SequenceDataset:
    """Read a file of events (see ``read_histories``) and split it; histories keep their newest ``max_length``
    items.
    """
    histories = read_histories(path, least_events=least_events)
    train, valid, test = leave_one_out(histories, max_length)
    return SequenceDataset(f"seq:{path}", histories, max_length, train, valid, test)


def read_histories(path: Path | str, *, least_events: int = LEAST_EVENTS) -> Histories:
    """Read who chose which item when; the file may be gzipped.

    =====================  =================================================================
    ``*.inter``            RecBole: tabs, a header such as ``user_id:token  item_id:token``
    ``*.dat``              MovieLens-1M: ``user::item::rating::time``
    ``*.csv``              MovieLens-20M and Amazon: ``user,item,rating,time``, or a header ``userId,…``
    ``*.json``             Amazon reviews: ``reviewerID``, ``asin``, ``unixReviewTime`` a line
    ``*.data``, ``*.tsv``  MovieLens-100K's ``u.data``: ``user  item  rating  time``
    anything else          ``user item`` a line, or ``user item item …``, in order of time
    =====================  =================================================================

    Events are sorted by time, equal times by their order in the file. Users and items with fewer than
    ``least_events`` events are left out until none remains.

    Raises:
        UserError: the file is missing, a line does not fit the format, or too little is left.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file of events in it")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; MovieLens is at grouplens.org/datasets/movielens, Amazon reviews at "
            "jmcauley.ucsd.edu/data/amazon"
        )
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    events = _core(_read_events(path, READERS.get(suffix, _read_plain)), least_events)
    by_user: dict[str, list[Event]] = {}
    for event in events:
        by_user.setdefault(event.user, []).append(event)
    if len(by_user) < 2:
        raise UserError(
            f"{path} leaves {len(by_user)} users with at least {least_events} events of items with as many; "
            "give more of the data"
        )
    times = None
    if all(event.time is not None for event in events):
        for history in by_user.values():
            history.sort(key=lambda event: event.time or 0.0)
        times = [np.array([event.time for event in h]).astype(np.int64) for h in by_user.values()]
    numbers: dict[str, int] = {}
    sequences = [
        np.array([numbers.setdefault(event.item, len(numbers) + 1) for event in history])
        for history in by_user.values()
    ]
    return Histories(tuple(by_user), tuple(numbers), sequences, times)


def leave_one_out(histories: Histories, max_length: int) -> tuple[SequencePart, SequencePart, SequencePart]:
    """Training, validation and test part; users with fewer than four events train nothing."""
    if max_length < 1:
        raise UserError(f"max_length={max_length}: choose at least 1")
    users = [user for user, sequence in enumerate(histories.sequences) if len(sequence) >= 3]
    trained = [user for user in users if len(histories.sequences[user]) >= 4]
    return (
        _part(histories, trained, max_length, held_out=2, last_only=False),
        _part(histories, users, max_length, held_out=1, last_only=True),
        _part(histories, users, max_length, held_out=0, last_only=True),
    )


def _part(
    histories: Histories, users: Sequence[int], max_length: int, *, held_out: int, last_only: bool
) -> SequencePart:
    """Without the last ``held_out`` items: each item is the label of the position before it."""
    channels = 1 if histories.times is None else 2
    inputs = np.zeros((len(users), channels, max_length), dtype=np.int64)
    labels = np.zeros((len(users), max_length), dtype=np.int64)
    for row, user in enumerate(users):
        sequence = histories.sequences[user]
        end = len(sequence) - 1 - held_out
        start = max(0, end - max_length)
        length = end - start
        inputs[row, 0, :length] = sequence[start:end]
        if histories.times is not None:
            inputs[row, 1, :length] = histories.times[user][start:end]
        first = length - 1 if last_only else 0
        labels[row, first:length] = sequence[start + 1 + first : end + 1]
    return SequencePart(torch.from_numpy(inputs), torch.from_numpy(labels))


class SequenceLoader(Loader):
    """Keeps its part on the device: a batch costs one gather there. Batches: (inputs [B, C, N], labels
    [B, N]).
    """

    def __init__(
        self, part: SequencePart, *, batch_size: int, device: torch.device, seed: int, drop_last: bool
    ) -> None:
        if drop_last and len(part) < batch_size:
            raise UserError(
                f"{len(part)} histories do not fill a batch of {batch_size}; lower the batch size"
            )
        super().__init__(len(part), batch_size, device, seed, drop_last)
        self._inputs, self._labels = part.inputs.to(device), part.labels.to(device)

    def evaluation(self) -> Iterator[Batch]:
        return zip(self._inputs.split(self.batch_size), self._labels.split(self.batch_size), strict=True)

    def _training_batches(self, steps: range) -> Iterator[Batch]:
        for step in steps:
            positions = self._order.positions(step, self.device)
            yield self._inputs[positions], self._labels[positions]


Reader = Callable[[TextIO], Iterator[Event]]


def _read_events(path: Path, reader: Reader) -> list[Event]:
    try:
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            return list(reader(file))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _core(events: list[Event], least: int) -> list[Event]:
    while True:
        users = Counter(event.user for event in events)
        items = Counter(event.item for event in events)
        kept = [event for event in events if users[event.user] >= least and items[event.item] >= least]
        if len(kept) == len(events):
            return events
        events = kept


def _read_columns(lines: Iterable[list[str]], names: tuple[str, str, str] | None = None) -> Iterator[Event]:
    """``user, item, rating, time``, or columns that the first line names as ``names``."""
    user, item, time = 0, 1, 3
    for number, fields in enumerate(lines, 1):
        if number == 1 and names and set(names) <= set(fields):
            user, item, time = (fields.index(name) for name in names)
        elif any(fields):
            try:
                yield Event(fields[user], fields[item], _seconds(fields[time]))
            except (IndexError, ValueError) as error:
                header = f"; a header names {', '.join(names)}" if number == 1 and names else ""
                raise UserError(
                    f"line {number} is no `user, item, rating, time`: {','.join(fields)!r}{header}"
                ) from error


def _numbered(file: TextIO, first: int = 1) -> Iterator[tuple[int, str]]:
    """The lines that are not blank."""
    return ((number, line) for number, line in enumerate(file, first) if line.strip())


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not abs(seconds) < 2**62:
        raise ValueError(f"{value} is no time")
    return seconds


def _read_table(file: TextIO) -> Iterator[Event]:
    return _read_columns(line.split() for line in file)


def _read_inter(file: TextIO) -> Iterator[Event]:
    header = file.readline().strip().split("\t")
    columns = {name.partition(":")[0]: number for number, name in enumerate(header)}
    if not {"user_id", "item_id"} <= set(columns):
        raise UserError("the first line must name the columns, as user_id:token, item_id:token, …")
    time = columns.get("timestamp")
    for number, line in _numbered(file, 2):
        fields = line.rstrip("\n").split("\t")
        try:
            when = None if time is None else _seconds(fields[time])
            yield Event(fields[columns["user_id"]], fields[columns["item_id"]], when)
        except (IndexError, ValueError) as error:
            raise UserError(f"line {number} does not fit the header: {line.strip()!r}") from error


def _read_reviews(file: TextIO) -> Iterator[Event]:
    for number, line in _numbered(file):
        try:
            review = json.loads(line)
            user, item = (_identifier(review[name]) for name in ("reviewerID", "asin"))
            yield Event(user, item, _seconds(review["unixReviewTime"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"line {number} is no review with reviewerID, asin, unixReviewTime") from error


def _identifier(value: Any) -> str:
    if not isinstance(value, str | int):
        raise TypeError(f"{value} is no identifier")
    return str(value)


def _read_plain(file: TextIO) -> Iterator[Event]:
    for number, line in _numbered(file):
        user, *items = line.split()
        if not items:
            raise UserError(f"line {number} is no `user item …`: {line.strip()!r}")
        yield from (Event(user, item, None) for item in items)


READERS: dict[str, Reader] = {
    ".inter": _read_inter,
    ".dat": lambda file: _read_columns(line.strip().split("::") for line in file),
    ".csv": lambda file: _read_columns(
        csv.reader(file, skipinitialspace=True), ("userId", "movieId", "timestamp")
    ),
    ".data": _read_table,
    ".tsv": _read_table,
    ".json": _read_reviews,
}
