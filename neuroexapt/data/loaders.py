"""Batches for searching, training and evaluating.

Which examples make up batch number t, and how they are augmented, are functions of (seed, t) alone, t counted
over all epochs. So nothing needs saving: a run resumed at step t sees the very batches it would have seen.
"""

import functools
import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from neuroexapt.data.augment import Augmentation, augment, normalise
from neuroexapt.data.parts import ImagePart, ResidentImages, StreamedImages
from neuroexapt.errors import UserError

Batch = tuple[Tensor, Tensor]
EVALUATED = 4
"""So many training batches of pictures in memory are evaluated at a time."""


def split_indices(
    labels: Tensor, train_fraction: float, seed: int, classes: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Split each class at random in the ratio train_fraction : 1 - train_fraction.

    labels: int64 [N]; classes: their names, for the error. Returns two int64 tensors in ascending order,
    disjoint, together 0..N-1, each with at least one image of every class. Raises UserError if a class has a
    single image.
    """
    if not 0 < train_fraction < 1:
        raise UserError(f"the training fraction is {train_fraction}; choose one between 0 and 1")
    generator = torch.Generator().manual_seed(_derive_seed(seed, "split"))
    train, valid = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            name = classes[label] if classes else label
            raise UserError(
                f"class {name} has one training image; add more, a search splits each class in two"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        cut = min(max(round(len(members) * train_fraction), 1), len(members) - 1)
        train.append(members[:cut])
        valid.append(members[cut:])
    return torch.cat(train).sort().values, torch.cat(valid).sort().values


def make_loader(
    part: ImagePart,
    indices: Tensor | None = None,
    *,
    batch_size: int,
    device: torch.device | str,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation | None = None,
    workers: int | None = None,
    drop_last: bool = True,
) -> "ImageLoader":
    """The loader for this part: on the device if the part is in memory, else streaming.

    indices: int64 [M], the images to use (None: all). mean, std: one float a channel, see ImageDataset.
    seed: give each loader of a run its own. workers: decoding processes of a streaming loader (None: one a
    core, at most 8; 0: decode in this process). drop_last: leave out the incomplete batch of an epoch.
    Raises UserError if that leaves no batch.
    """
    indices = torch.arange(len(part)) if indices is None else indices
    if drop_last and len(indices) < batch_size:
        raise UserError(f"{len(indices)} images do not fill a batch of {batch_size}; lower the batch size")
    settings = {
        "batch_size": batch_size,
        "device": torch.device(device),
        "seed": seed,
        "mean": mean,
        "std": std,
        "augmentation": augmentation,
        "drop_last": drop_last,
    }
    if isinstance(part, ResidentImages):
        return ResidentLoader(part, indices, **settings)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), 8)
    return StreamingLoader(part, indices, workers, **settings)


class Loader(ABC):
    """Batches (inputs, labels [B, …] int64) on the device, of whatever the data set holds."""

    def __init__(self, count: int, batch_size: int, device: torch.device, seed: int, drop_last: bool) -> None:
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self._order = _Order(count, batch_size, seed, drop_last)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The shuffled, augmented batches of one epoch, from its step `start_step` on."""
        first = epoch * self.steps_per_epoch
        return self._made_ahead(range(first + start_step, first + self.steps_per_epoch))

    def forever(self, start: int = 0) -> Iterator[Batch]:
        """epoch(0), epoch(1), … without end, from step `start` on, counted over all epochs."""
        return self._made_ahead(range(start, sys.maxsize))

    def _made_ahead(self, steps: range) -> Iterator[Batch]:
        """On a GPU each batch is made on a stream of its own, beside the step that takes the one before:
        dozens of small kernels that leave most of the GPU free."""
        batches = self._training_batches(steps)
        return batches if self._stream is None else _one_ahead(batches, self._stream)

    @abstractmethod
    def evaluation(self) -> Iterator[Batch]:
        """Everything once, not augmented, in the same order every time; the last batch may be smaller.

        Pictures come in a random order: they often lie class by class, and where a network goes by the
        statistics of a batch, such as when a selection compares paths, a batch of one class loses what makes
        the class.
        """

    @abstractmethod
    def _training_batches(self, steps: range) -> Iterator[Batch]:
        """The batches of these steps, counted over all epochs."""


def _one_ahead(batches: Iterator[Batch], stream: torch.cuda.Stream) -> Iterator[Batch]:
    def launch_next() -> Batch | None:
        with torch.cuda.stream(stream):
            return next(batches, None)

    stream.wait_stream(torch.cuda.current_stream(stream.device))  # which may still fill what batches are of
    batch = launch_next()
    while batch is not None:
        taker = torch.cuda.current_stream(stream.device)
        taker.wait_stream(stream)
        following = launch_next()
        for tensor in batch:
            tensor.record_stream(taker)  # its memory is not free before the taker has read it
        yield batch
        batch = following


class ImageLoader(Loader):
    """Batches (images float32 [B, C, H, W] normalised, labels int64 [B])."""

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None,
        drop_last: bool,
    ):
        super().__init__(len(indices), batch_size, device, seed, drop_last)
        self.augmentation = augmentation
        self._mean = torch.tensor(mean, device=device)
        self._std = torch.tensor(std, device=device)
        self._generator = torch.Generator(device)

    def evaluation(self) -> Iterator[Batch]:
        for images, labels in self._read_once():
            yield normalise(images, self._mean, self._std), labels

    def _training_batches(self, steps: range) -> Iterator[Batch]:
        for step, (images, labels) in zip(steps, self._read_shuffled(steps), strict=True):
            if self.augmentation is None:
                yield normalise(images, self._mean, self._std), labels
            else:
                self._generator.manual_seed(_derive_seed(self.seed, "augmentation", step))
                yield augment(images, self._mean, self._std, self.augmentation, self._generator), labels

    @abstractmethod
    def _read_shuffled(self, steps: range) -> Iterator[Batch]:
        """Images uint8 [B, C, H, W] and labels on the device, for these steps."""

    @abstractmethod
    def _read_once(self) -> Iterator[Batch]:
        """Images uint8 [B, C, H, W] and labels on the device, for the evaluation pass."""


class ResidentLoader(ImageLoader):
    """Keeps its images on the device as uint8: a batch costs one gather there and no transfer."""

    def __init__(self, part: ResidentImages, indices: Tensor, **settings):
        super().__init__(indices, **settings)
        self._images = part.images[indices].to(self.device)
        self._labels = part.labels[indices].to(self.device)

    def _read_shuffled(self, steps: range) -> Iterator[Batch]:
        for step in steps:
            positions = self._order.positions(step, self.device)
            yield self._images[positions], self._labels[positions]

    def _read_once(self) -> Iterator[Batch]:
        """More at a time than in training, which keeps what all layers computed: small networks wait for
        launches more than for the GPU's arithmetic."""
        for positions in self._order.of_evaluation(self.device).split(EVALUATED * self.batch_size):
            yield self._images[positions], self._labels[positions]


class StreamingLoader(ImageLoader):
    """Decodes images in worker processes, which live as long as the loader, and transfers them as uint8.

    One training iteration (`epoch` or `forever`) and one `evaluation` can be under way at a time; starting
    another of the same kind ends the earlier one.
    """

    def __init__(self, part: StreamedImages, indices: Tensor, workers: int, **settings):
        super().__init__(indices, **settings)
        self._indices = indices
        pin_memory = self.device.type == "cuda"
        self._training_stream = _Stream(part, workers, pin_memory)
        self._evaluation_stream = _Stream(part, workers, pin_memory)

    def _read_shuffled(self, steps: range) -> Iterator[Batch]:
        order, indices = self._order, self._indices
        # Bound to locals: a reference to self would make a cycle, and workers collected in one die slowly.
        chosen = (indices[order.positions(step, "cpu")] for step in steps)
        return self._transfer(self._training_stream.read(chosen))

    def _read_once(self) -> Iterator[Batch]:
        indices = self._indices[self._order.of_evaluation("cpu")]
        return self._transfer(self._evaluation_stream.read(indices.split(self.batch_size)))

    def _transfer(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for images, labels in batches:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Stream:
    """A DataLoader that is told anew, before each iteration, which batches to read; its workers stay."""

    def __init__(self, part: StreamedImages, workers: int, pin_memory: bool):
        self._chosen = _ChosenBatches()
        self._loader = DataLoader(
            _DecodedBatches(part),
            batch_size=None,
            sampler=self._chosen,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # Its own generator: a DataLoader draws a seed at each start, which would shift the global state.
            generator=torch.Generator(),
        )

    def read(self, chosen: Iterable[Tensor]) -> Iterator[Batch]:
        """Images uint8 [B, C, H, W] and labels int64 [B] for each tensor of indices, on the CPU."""
        self._chosen.batches = chosen
        for batch in self._loader:
            assert self._chosen.batches is chosen, "a later iteration has taken over this loader's workers"
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _ChosenBatches(Sampler[list[int]]):
    def __init__(self) -> None:
        self.batches: Iterable[Tensor] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)


class _DecodedBatches(Dataset):
    """Indexed by the indices of a whole batch; runs in the workers."""

    def __init__(self, part: StreamedImages):
        self._part = part

    def __getitem__(self, indices: list[int]) -> Batch | UserError:
        try:
            return self._part.read(indices), self._part.labels[indices]
        except UserError as error:
            return error  # raised in the main process, where DataLoader would add the worker's traceback


@dataclass(frozen=True)
class _Order:
    """Which of `count` images, by position, make up the batch of each step, steps counted over all epochs."""

    count: int
    batch_size: int
    seed: int
    drop_last: bool

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def positions(self, step: int, device: torch.device | str) -> Tensor:
        """int64 [B]."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.batch_size
        return _permutation(self.count, self.seed, epoch, device)[first : first + self.batch_size]

    def of_evaluation(self, device: torch.device | str) -> Tensor:
        """int64 [count]."""
        return _permutation(self.count, self.seed, "evaluation", device)


@functools.lru_cache(maxsize=8)
def _permutation(count: int, seed: int, of: int | str, device: torch.device | str) -> Tensor:
    """The order of an epoch or of an evaluation; drawn on the CPU, so that it is the same on every device."""
    generator = torch.Generator().manual_seed(_derive_seed(seed, "order", of))
    return torch.randperm(count, generator=generator).to(device, non_blocking=True)


def _derive_seed(*parts: int | str) -> int:
    """A 64-bit seed, unrelated to the seeds of all other parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")
