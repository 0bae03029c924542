"""Labelled pictures in memory or in files, as sources read them and loaders take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from neuroexapt.errors import UserError

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True, eq=False)
class ResidentImages:
    """Decoded images in memory: `images` uint8 [N, C, H, W] and `labels` int64 [N], on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at `indices`: uint8 [B, C, H, W]."""
        return self.images[list(indices)]


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Image files decoded when they are read, for data larger than memory; `labels` int64 [N]."""

    paths: Sequence[Path]
    labels: Tensor
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode the images at `indices` to uint8 [B, C, H, W]."""
        return torch.stack([decode_image(self.paths[i], self.shape) for i in indices])


ImagePart = ResidentImages | StreamedImages
Part = TypeVar("Part", bound=ImagePart, covariant=True)


@dataclass(frozen=True, eq=False)
class Splits(Generic[Part]):
    """What a source reads."""

    train: Part
    test: Part
    classes: tuple[str, ...]


def decode_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One image file as uint8 [C, H, W]: upright, on white where it is transparent, scaled to cover H x W,
    the overhang cropped evenly.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            # A JPEG decodes at 1/2, 1/4 or 1/8 scale for a fraction of the time; twice the target is spared
            # for the resampling.
            image.draft(None, (2 * width, 2 * height))
            upright = _on_white(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise anything on bad bytes
        raise unreadable(path, error) from error
    pixels = np.array(fitted).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _on_white(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Converting alone would show the hidden colour of transparent parts, black as a rule."""
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))


def unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path} is not a readable picture ({reason}); repair or remove it")
