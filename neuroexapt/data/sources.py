"""The data sets by name, and how each is read."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.data.arrays import read_npz
from neuroexapt.data.augment import Augmentation
from neuroexapt.data.dataset import ImageDataset, channel_statistics
from neuroexapt.data.folders import decode_images, read_folder
from neuroexapt.data.idx import find_idx_files, read_idx_part
from neuroexapt.data.parts import ImagePart, ResidentImages, Splits
from neuroexapt.data.sequences import SequenceDataset, load_sequences
from neuroexapt.errors import UserError

AnyDataset = ImageDataset | SequenceDataset

DEFAULT_ROOT = Path("data")
DEBIAN_ROOT = Path("/usr/share/datasets")  # where Debian's packages dataset-* install
STATISTICS_SAMPLE = 4096  # pictures of a streamed data set that its mean and deviation are taken from

DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class DatasetSpec:
    """A data set known by name. read(root, download) returns its splits or raises UserError."""

    read: Callable[[Path, bool], Splits[ResidentImages]]
    augmentation: Augmentation


def load_dataset(
    name: str,
    *,
    root: Path | str | None = None,
    download: bool = False,
    image_size: int | None = None,
    max_length: int = 50,
    max_resident_bytes: int | None = None,
    quiet: bool = False,
) -> AnyDataset:
    """Load a data set by name: one of DATASETS, `npz:PATH` (see read_npz), `folder:PATH` (see read_folder) or
    `seq:PATH`, histories of items (see read_histories).

    root: the folder to look in, and to download to if `download` is set (default: data).
    image_size: bring the images to this height and width (default: as they are; see read_folder).
    max_length: the newest items of each history to keep.
    max_resident_bytes: a folder whose pictures take more than this, decoded, is streamed (default: a quarter
    of the memory of the machine or of its GPU, whichever is less). quiet: no progress bar.
    Raises UserError if the name is unknown or the data is missing, damaged or not usable for classification.

    Mean and deviation come from the training images; for a streamed folder from at most 4,096, evenly
    spaced. Pictures of the user's own are cropped with an eighth of their side as padding, and flipped if
    they are in colour: grey ones are often characters, which do not survive a flip.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"the image size is {image_size}; choose at least 1")
    kind, _, path = name.partition(":")
    if kind == "seq" and path:
        return load_sequences(Path(path).expanduser(), max_length)
    splits: Splits
    if name in DATASETS:
        splits = _resize(DATASETS[name].read(Path(root or DEFAULT_ROOT), download), image_size)
    elif kind == "npz" and path:
        splits = _resize(read_npz(Path(path).expanduser()), image_size)
    elif kind == "folder" and path:
        limit = _quarter_of_memory() if max_resident_bytes is None else max_resident_bytes
        splits = read_folder(Path(path).expanduser(), image_size, limit, quiet)
    else:
        raise UserError(
            f"unknown data set {name!r}; choose {', '.join(DATASETS)}, npz:PATH, folder:PATH or seq:PATH"
        )
    mean, std = channel_statistics(_images_for_statistics(splits.train, quiet))
    augmentation = DATASETS[name].augmentation if name in DATASETS else _default_augmentation(splits.train)
    return ImageDataset(name, splits.train, splits.test, splits.classes, mean, std, augmentation)


def _default_augmentation(part: ImagePart) -> Augmentation:
    channels, height, width = part.shape
    return Augmentation(crop_padding=min(height, width) // 8, flip=channels >= 3)


def _quarter_of_memory() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        memory = min(memory, torch.cuda.get_device_properties().total_memory)
    return memory // 4


def _images_for_statistics(part: ImagePart, quiet: bool) -> Tensor:
    """uint8 [N, C, H, W]."""
    if isinstance(part, ResidentImages):
        return part.images
    stride = -(-len(part) // STATISTICS_SAMPLE)
    return decode_images(part.paths[::stride], part.shape, quiet)


def _resize(splits: Splits[ResidentImages], side: int | None) -> Splits[ResidentImages]:
    """Scale each image to cover side × side and crop it about its centre."""
    if side is None or splits.train.shape[1:] == (side, side):
        return splits
    train, test = (
        ResidentImages(_cover(part.images, side), part.labels) for part in (splits.train, splits.test)
    )
    return Splits(train, test, splits.classes)


def _cover(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[2:]
    scale = side / min(height, width)
    size = (round(height * scale), round(width * scale))
    scaled = F.interpolate(images, size, mode="bilinear", antialias=True)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return scaled[:, :, top : top + side, left : left + side].contiguous()


def _read_digits(root: Path, download: bool) -> Splits[ResidentImages]:
    """scikit-learn's 1,797 digits of 8 × 8 pixels, part of its installation.

    Their 17 grey levels 0..16 become 0..255 (times 255/16, rounded). Every fifth image of each class is for
    testing: 355 images, the same ones on every machine and for every seed.
    """
    from sklearn.datasets import load_digits

    levels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(levels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(targets).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero().flatten()[4::5]] = True
    train, test = (ResidentImages(images[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return Splits(train, test, DIGITS)


def _read_mnist_like(
    root: Path, download: bool, *, name: str, builder: str, classes: tuple[str, ...]
) -> Splits[ResidentImages]:
    """IDX files as torchvision lays them out, in a folder named after the data set, or in `root` itself."""
    folders = [root / builder / "raw", root / name, root, DEBIAN_ROOT / name]
    files = find_idx_files(folders)
    if files is None and download:
        _from_torchvision(name, builder, root, download)
        files = find_idx_files(folders)
    if files is None:
        raise _not_found(name, folders)
    train_images, train_labels, test_images, test_labels = files
    return Splits(read_idx_part(train_images, train_labels), read_idx_part(test_images, test_labels), classes)


def _read_cifar(root: Path, download: bool, *, name: str, builder: str) -> Splits[ResidentImages]:
    sets = [_from_torchvision(name, builder, root, download, train=train) for train in (True, False)]
    train, test = (
        ResidentImages(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for part in sets
    )
    return Splits(train, test, tuple(sets[0].classes))


def _read_svhn(root: Path, download: bool) -> Splits[ResidentImages]:
    train, test = (
        ResidentImages(torch.from_numpy(part.data), torch.from_numpy(part.labels).long())
        for part in (_from_torchvision("svhn", "SVHN", root, download, split=s) for s in ("train", "test"))
    )
    return Splits(train, test, DIGITS)


def _from_torchvision(name: str, builder: str, root: Path, download: bool, **choice: Any) -> Any:
    """torchvision.datasets.<builder>, its failures as one clear line."""
    try:
        from torchvision import datasets
    except ImportError:
        raise UserError(
            f"{name} is read by torchvision, which is missing; run pip install torchvision"
        ) from None
    try:
        return getattr(datasets, builder)(root, download=download, **choice)
    except (OSError, RuntimeError) as error:
        if not download:
            raise _not_found(name, [root]) from error
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} could not be downloaded ({reason}); fetch it and pass --data-root"
        ) from error


def _not_found(name: str, folders: list[Path]) -> UserError:
    looked_in = ", ".join(str(folder) for folder in folders)
    return UserError(f"{name} was not found in {looked_in}; pass --data-root FOLDER or --download")


DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(_read_digits, Augmentation(crop_padding=1)),
    "mnist": DatasetSpec(
        partial(_read_mnist_like, name="mnist", builder="MNIST", classes=DIGITS),
        Augmentation(crop_padding=2),
    ),
    "fashion-mnist": DatasetSpec(
        partial(_read_mnist_like, name="fashion-mnist", builder="FashionMNIST", classes=FASHION),
        Augmentation(crop_padding=2, flip=True),
    ),
    "cifar10": DatasetSpec(
        partial(_read_cifar, name="cifar10", builder="CIFAR10"),
        Augmentation(crop_padding=4, flip=True),
    ),
    "cifar100": DatasetSpec(
        partial(_read_cifar, name="cifar100", builder="CIFAR100"),
        Augmentation(crop_padding=4, flip=True),
    ),
    "svhn": DatasetSpec(_read_svhn, Augmentation(crop_padding=4)),
}
