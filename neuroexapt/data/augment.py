"""Augmentation of whole batches on the device they live on.

Shape legend: B images, C channels, H rows, W columns.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, in this order: crop, flip, normalise, cutout.

    crop_padding: the image is padded with this many black pixels on each side and cropped back to its own
        size at a uniform offset (0: off).
    flip: mirrored left to right with probability 1/2.
    cutout: side of the square that is set to the mean, in pixels (0: off). Its centre is uniform over the
        image and the part beyond the border is lost (DeVries and Taylor 2017, arXiv:1708.04552).
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std, per channel.

    images: uint8 [B, C, H, W]; mean, std: float32 [C] in units of the full scale, on the images' device.
    Returns float32 [B, C, H, W].
    """
    scale = 1 / (255 * std)
    return (images * scale[:, None, None]).sub_((mean / std)[:, None, None])


def augment(
    images: Tensor, mean: Tensor, std: Tensor, policy: Augmentation, generator: torch.Generator
) -> Tensor:
    """Augment and normalise a batch; each image draws its own offset, flip and cutout.

    images: uint8 [B, C, H, W]; mean, std: float32 [C]; all of them and `generator` on one device.
    Returns float32 [B, C, H, W]. Nothing waits for the device.
    """
    if policy.crop_padding or policy.flip:
        images = _crop_and_flip(images, policy, generator)
    normalised = normalise(images, mean, std)
    if policy.cutout:
        normalised.masked_fill_(_cutout_mask(images, policy.cutout, generator), 0.0)
    return normalised


def _crop_and_flip(images: Tensor, policy: Augmentation, generator: torch.Generator) -> Tensor:
    batch, channels, height, width = images.shape
    device, padding = images.device, policy.crop_padding
    rows = torch.arange(height, device=device).expand(batch, height)  # [B, H]
    columns = torch.arange(width, device=device).expand(batch, width)  # [B, W]
    if policy.flip:
        flipped = torch.rand(batch, 1, device=device, generator=generator) < 0.5
        columns = torch.where(flipped, width - 1 - columns, columns)
    if padding:
        images = F.pad(images, (padding,) * 4)
        offsets = torch.randint(2 * padding + 1, (2, batch, 1), device=device, generator=generator)
        rows, columns = rows + offsets[0], columns + offsets[1]
    return images[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def _cutout_mask(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """True inside each image's square, [B, 1, H, W]."""
    inside_rows = _random_window(images, images.shape[2], side, generator)
    inside_columns = _random_window(images, images.shape[3], side, generator)
    return inside_rows[:, None, :, None] & inside_columns[:, None, None, :]


def _random_window(images: Tensor, length: int, side: int, generator: torch.Generator) -> Tensor:
    """True for the positions centre - side//2 <= i < centre - side//2 + side, [B, length]."""
    centre = torch.randint(length, (images.shape[0], 1), device=images.device, generator=generator)
    distance = torch.arange(length, device=images.device) - (centre - side // 2)
    return (distance >= 0) & (distance < side)
