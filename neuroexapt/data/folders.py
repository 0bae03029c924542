"""The user's own pictures: `folder:PATH` with PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from neuroexapt.data.parts import ResidentImages, Splits, StreamedImages, decode_image, unreadable
from neuroexapt.errors import UserError

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LARGEST_KEPT_SIZE = 64  # pictures up to this size keep it; larger or mixed ones are brought to it
GREY_MODES = {"1", "L", "LA"}
DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "F"}


def read_folder(path: Path, image_size: int | None, max_resident_bytes: int, quiet: bool) -> Splits:
    """Read a folder of pictures; the names of the class folders, sorted, are the classes.

    A picture is turned upright (EXIF), put on white where it is transparent, scaled to cover the target size
    and cropped about its centre. The target is image_size × image_size; without it, the pictures' common size
    if they share one of at most 64 × 64, else 64 × 64. Grey if every picture is, else RGB. Decoded to memory
    if that takes at most max_resident_bytes, else streamed. Raises UserError if a folder or class is missing
    or empty, and naming the file if a picture cannot be read.
    """
    classes = _class_names(path / "train")
    test_classes = _class_names(path / "test")
    if unknown := sorted(set(test_classes) - set(classes)):
        raise UserError(
            f"{path / 'test' / unknown[0]} has no counterpart in {path / 'train'}; add or remove it"
        )
    if len(classes) < 2:
        raise UserError(
            f"{path / 'train'} has one class only ({classes[0]}); a classifier needs at least two"
        )
    train_files, train_labels = _list_files(path / "train", classes, classes)
    test_files, test_labels = _list_files(path / "test", test_classes, classes)
    files = train_files + test_files
    shape = _common_shape(files, image_size, quiet)
    if len(files) * shape[0] * shape[1] * shape[2] > max_resident_bytes:
        train = StreamedImages(train_files, train_labels, shape)
        return Splits(train, StreamedImages(test_files, test_labels, shape), tuple(classes))
    images = decode_images(files, shape, quiet)
    return Splits(
        ResidentImages(images[: len(train_files)], train_labels),
        ResidentImages(images[len(train_files) :], test_labels),
        tuple(classes),
    )


def decode_images(files: Sequence[Path], shape: tuple[int, int, int], quiet: bool) -> torch.Tensor:
    """uint8 [N, C, H, W]."""
    decoded = _map_in_threads(lambda path: decode_image(path, shape), files, "decoding pictures", quiet)
    return torch.stack(decoded)


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist; folder:PATH needs PATH/train and PATH/test, one folder a class"
        )
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise UserError(f"{folder} has no folders; put the pictures of each class in a folder of its name")
    return names


def _list_files(folder: Path, names: list[str], classes: list[str]) -> tuple[list[Path], torch.Tensor]:
    """The pictures in the class folders `names` of `folder`, and their labels: positions in `classes`."""
    files: list[Path] = []
    labels: list[int] = []
    for name in names:
        members = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in EXTENSIONS)
        if not members:
            raise UserError(f"{folder / name} has no pictures; add some or remove the folder")
        files += members
        labels += [classes.index(name)] * len(members)
    return files, torch.tensor(labels)


def _common_shape(files: Sequence[Path], image_size: int | None, quiet: bool) -> tuple[int, int, int]:
    """(C, H, W) that all pictures are brought to, from their headers."""
    headers = set(_map_in_threads(_read_header, files, "looking at pictures", quiet))
    channels = 1 if {mode for mode, _ in headers} <= GREY_MODES else 3
    sizes = {size for _, size in headers}
    if image_size is None and len(sizes) == 1:
        width, height = sizes.pop()
        if max(width, height) <= LARGEST_KEPT_SIZE:
            return channels, height, width
    side = image_size or LARGEST_KEPT_SIZE
    return channels, side, side


def _read_header(path: Path) -> tuple[str, tuple[int, int]]:
    """The mode and the (width, height) of a picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, size = image.mode, image.size
    except Exception as error:  # decoders raise anything on bad bytes
        raise unreadable(path, error) from error
    if mode in DEEP_MODES:
        raise UserError(f"{path} has more than 8 bits a channel; convert the pictures to 8 bits")
    return mode, size


Result = TypeVar("Result")


def _map_in_threads(
    function: Callable[[Path], Result], files: Sequence[Path], description: str, quiet: bool
) -> list[Result]:
    """The results in the order of the files, with a progress bar in a terminal."""
    from rich.console import Console
    from rich.progress import track

    silent = quiet or not sys.stderr.isatty()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(function, files)
        console = Console(stderr=True)
        return list(track(results, description, len(files), console=console, transient=True, disable=silent))
