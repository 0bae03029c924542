"""MNIST-like data in IDX files, the format of http://yann.lecun.com/exdb/mnist, gzipped or not."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from neuroexapt.data.parts import ResidentImages
from neuroexapt.errors import UserError

STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def find_idx_files(folders: list[Path]) -> list[Path] | None:
    """The four files of the first folder that has them all, in the order of STEMS."""
    for folder in folders:
        found = {
            stem: path
            for stem in STEMS
            for path in (folder / f"{stem}.gz", folder / stem)  # torchvision keeps both
            if path.is_file()
        }
        if len(found) == len(STEMS):
            return list(found.values())
    return None


def read_idx_part(images_path: Path, labels_path: Path) -> ResidentImages:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise UserError(f"{images_path} and {labels_path.name} do not belong together; fetch them again")
    return ResidentImages(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of unsigned bytes.

    The file: 0, 0, 8, the number of axes (one byte each), their lengths (big-endian uint32), the values.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from error
    axes = content[3] if content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not axes or len(content) - start != math.prod(shape):
        raise UserError(f"{path} is not an IDX file of bytes or is cut short; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
