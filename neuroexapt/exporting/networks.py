"""What goes into a file: a trained network with all that stands between its users' data and its answers.

Shape legend: B batch, C channels, H rows, W columns, K classes, N positions of a history, V items.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neuroexapt.core.derived import DerivedNetwork
from neuroexapt.core.sequence_network import SequenceNetwork
from neuroexapt.data import AnyDataset
from neuroexapt.data.augment import normalise
from neuroexapt.data.dataset import ImageDataset
from neuroexapt.data.sequences import SequenceDataset
from neuroexapt.recommend.model import SequenceRecommender
from neuroexapt.recommend.strategies import Scorer

Inputs = tuple[Tensor, ...]


class ExportedNetwork(nn.Module, ABC):
    """Maps a batch of inputs, of any size, to one output.

    ``input_names``, ``output_name``: theirs in the file; ``task``: what it answers; ``names``: which part of
    ``contract`` has the names of what it answers with; ``call``: Python that makes such names of the output.
    """

    input_names: tuple[str, ...]
    output_name: ClassVar[str]
    task: ClassVar[str]
    names: ClassVar[str]
    call: ClassVar[str]

    @property
    @abstractmethod
    def contract(self) -> dict[str, Any]:
        """What users must know of inputs and outputs, as JSON."""

    @abstractmethod
    def examples(self, data: AnyDataset, count: int) -> Inputs:
        """Up to so many inputs of the test part, spread over it."""

    @abstractmethod
    def made_up(self, count: int) -> Inputs:
        """So many random inputs, the same ones each time."""


class Classifier(ExportedNetwork):
    """``images``: uint8 [B, C, H, W], as they are in files → logits [B, K]; normalised on the way."""

    input_names = ("images",)
    output_name = "logits"
    task = "classification"
    names = "classes"
    call = "labels = [classes[i] for i in logits.argmax(1)]"
    mean: Tensor
    std: Tensor

    def __init__(self, network: DerivedNetwork, data: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.shape, self.classes = tuple(data["shape"]), tuple(data["classes"])
        self.register_buffer("mean", torch.tensor(data["mean"]))
        self.register_buffer("std", torch.tensor(data["std"]))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images, self.mean, self.std))

    @property
    def contract(self) -> dict[str, Any]:
        channels, height, width = self.shape
        colours = {1: ", grey", 3: ", red, green, blue"}.get(channels, "")
        return {
            "inputs": {
                "images": f"uint8 [batch, {channels}, {height}, {width}], 0 to 255{colours}; of files "
                "as in training: upright (EXIF), on white where transparent, scaled to cover "
                f"{height} x {width} pixels (bilinear, as by PIL), what hangs over cut off evenly"
            },
            "outputs": {"logits": f"float32 [batch, {len(self.classes)}], a column for each of classes"},
            "classes": list(self.classes),
        }

    def examples(self, data: AnyDataset, count: int) -> Inputs:
        assert isinstance(data, ImageDataset)
        return (data.test.read(_spread(len(data.test), count).tolist()),)

    def made_up(self, count: int) -> Inputs:
        return (torch.randint(256, (count, *self.shape), dtype=torch.uint8, generator=_generator()),)


class Recommender(ExportedNetwork):
    """``items``: int64 [B, N], oldest first, padded with 0 at the end, and for networks that look at times
    ``timestamps`` like it, in seconds → scores [B, V + 1] of each item as the next one; −∞ for item 0, none.

    After an empty history an item scores its share of the training data.
    """

    output_name = "scores"
    task = "next item"
    names = "item_names"
    call = "best = [[item_names[i] for i in row] for row in (-scores).argsort(1)[:, :10]]"
    popularity: Tensor

    def __init__(self, network: DerivedNetwork, data: Mapping[str, Any]) -> None:
        super().__init__()
        assert isinstance(network, SequenceNetwork)
        counts = torch.tensor(data["item_counts"])
        self.scorer = Scorer(SequenceRecommender(network, counts).eval())
        self.num_items, self.max_length = network.num_items, network.size.max_length
        self.item_names = tuple(data["items"])
        self.input_names = ("items", "timestamps") if network.size.has_times else ("items",)
        popularity = counts / counts.sum()
        popularity[0] = -torch.inf
        self.register_buffer("popularity", popularity)

    def forward(self, items: Tensor, timestamps: Tensor | None = None) -> Tensor:
        lengths = (items > 0).sum(dim=1)
        scores = self.scorer(items, lengths, timestamps)
        return torch.where(lengths[:, None] > 0, scores, self.popularity)

    @property
    def contract(self) -> dict[str, Any]:
        size = f"int64 [batch, {self.max_length}]"
        inputs = {
            "items": f"{size}, the newest items of each history, oldest first, then 0; an item's number is "
            "its place in item_names, from 1 on",
            "timestamps": f"{size}, of these items, in seconds",
        }
        return {
            "inputs": {name: inputs[name] for name in self.input_names},
            "outputs": {
                "scores": f"float32 [batch, {self.num_items + 1}], of each item as the next one; "
                "-inf for item 0, which is none"
            },
            "item_names": list(self.item_names),
        }

    def examples(self, data: AnyDataset, count: int) -> Inputs:
        assert isinstance(data, SequenceDataset)
        chosen = data.test.inputs[_spread(len(data.test), count)]
        return tuple(chosen[:, channel] for channel in range(len(self.input_names)))

    def made_up(self, count: int) -> Inputs:
        generator = _generator()
        size = (count, self.max_length)
        lengths = torch.randint(self.max_length + 1, (count, 1), generator=generator)
        items = torch.randint(1, self.num_items + 1, size, generator=generator)
        times = torch.randint(2**30, size, generator=generator).sort().values
        is_item = torch.arange(self.max_length) < lengths
        return tuple(channel * is_item for channel in (items, times)[: len(self.input_names)])


KINDS = {"pictures": Classifier, "histories": Recommender}
"""By the kind of the data."""


def _spread(size: int, count: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, count)).long()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
