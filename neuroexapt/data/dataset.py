"""What a data set of pictures is to the rest of the package: two labelled parts, the facts a network needs,
and batches.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroexapt.data.augment import Augmentation
from neuroexapt.data.loaders import ImageLoader, make_loader
from neuroexapt.data.parts import ImagePart


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images, split into a training and a test part.

    mean, std: per channel, over the training images, in units of the full scale (0..1).
    augmentation: what suits these images in training, without cutout.
    """

    name: str
    train: ImagePart
    test: ImagePart
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    kind = "pictures"
    valid = None
    """Nothing is set apart from training: a search splits it."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a network must know of the data."""
        return {"in_channels": self.in_channels, "num_classes": self.num_classes}

    @property
    def identity(self) -> list[Any]:
        """Besides labels, what another data set would differ in."""
        return [
            self.name,
            self.classes,
            self.train.shape,
            len(self.train),
            len(self.test),
            self.mean,
            self.std,
        ]

    @property
    def baseline(self) -> tuple[str, float]:
        """An answer that takes no network, and its accuracy on the test: the commonest class in training."""
        commonest = int(self.train.labels.bincount().argmax())
        share = (self.test.labels == commonest).double().mean().item()
        return f"“{self.classes[commonest]}”", share

    @property
    def description(self) -> dict[str, Any]:
        """What whoever uses a trained network must know of the data, as JSON."""
        return {
            "kind": self.kind,
            "facts": self.facts,
            "shape": list(self.train.shape),
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def loader(
        self,
        part: str,
        *,
        training: bool,
        batch_size: int,
        device: torch.device,
        seed: int,
        indices: Tensor | None = None,
        workers: int | None = None,
        **augmentation: Any,
    ) -> ImageLoader:
        """Batches of ``part``, ``"train"`` or ``"test"``; see ``make_loader``.

        training: full batches only, and augmented; ``augmentation`` changes what suits these images.
        """
        return make_loader(
            getattr(self, part),
            indices,
            batch_size=batch_size,
            device=device,
            seed=seed,
            mean=self.mean,
            std=self.std,
            augmentation=dataclasses.replace(self.augmentation, **augmentation) if training else None,
            workers=workers,
            drop_last=training,
        )

    @property
    def in_channels(self) -> int:
        return self.train.shape[0]

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.train.shape[1:]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [N, C, H, W], in units of the full scale.

    Counted in integers, hence the same on every machine. A constant channel gets one grey level as its
    deviation, which keeps the normalised images finite.
    """
    means, deviations = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * levels).sum()
        deviation = (share * (levels - mean).square()).sum().sqrt()
        means.append(mean.item())
        deviations.append(max(deviation.item(), 1 / 255))
    return tuple(means), tuple(deviations)
