"""The user's own arrays: `npz:PATH`, checked and brought to uint8."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from neuroexapt.data.dataset import ResidentImages, Splits
from neuroexapt.errors import UserError

KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> Splits[ResidentImages]:
    """Read x_train, y_train, x_test, y_test and, if present, `classes` from an .npz file.

    x: [N, H, W] (grey) or [N, H, W, C] with 1 to 4 channels; integers in 0..255, or floats in 0..1, which
    are multiplied by 255 and rounded. y: integers [N] in 0..K-1, every class occurring in y_train.
    classes: K strings (else the labels' numbers are the names). Raises UserError for anything else.
    """
    arrays = _load(path)
    try:
        x_train, y_train, x_test, y_test = (arrays[key] for key in KEYS)
    except KeyError as error:
        raise UserError(f"{path} has no array {error}; it needs {', '.join(KEYS)}") from None
    train_labels, test_labels = _labels("y_train", y_train), _labels("y_test", y_test)
    if "classes" in arrays:
        classes = tuple(str(name) for name in arrays["classes"])
    else:
        classes = tuple(str(label) for label in range(train_labels.max() + 1))
    splits = Splits(
        ResidentImages(_images("x_train", x_train), train_labels),
        ResidentImages(_images("x_test", x_test), test_labels),
        classes,
    )
    _check(splits)
    return splits


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; npz:PATH names an .npz file with {', '.join(KEYS)}")
    try:
        with np.load(path) as file:
            return {key: file[key] for key in (*KEYS, "classes") if key in file}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); write it with numpy.savez") from error


def _labels(name: str, array: np.ndarray) -> torch.Tensor:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{name} is {array.dtype} {list(array.shape)}; it must hold one integer an image")
    if not len(array):
        raise UserError(f"{name} is empty; give at least one image")
    return torch.from_numpy(array.astype(np.int64))


def _images(name: str, array: np.ndarray) -> torch.Tensor:
    """uint8 [N, C, H, W]."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not 1 <= array.shape[3] <= 4:
        raise UserError(
            f"{name} has the shape {list(array.shape)}; give [N, H, W] or [N, H, W, C], C at most 4"
        )
    return torch.from_numpy(_to_uint8(name, array)).permute(0, 3, 1, 2).contiguous()


def _to_uint8(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            raise UserError(
                f"{name}{bad[0].tolist()} is {array[tuple(bad[0])]}; remove or replace such values"
            )
        _check_range(name, array, 1)
        return np.rint(array * 255).astype(np.uint8)
    if array.dtype.kind in "iu":
        _check_range(name, array, 255)
        return array.astype(np.uint8)
    raise UserError(f"{name} is {array.dtype}; give integers in 0..255 or floats in 0..1")


def _check_range(name: str, array: np.ndarray, limit: int) -> None:
    low, high = array.min(), array.max()
    if low < 0 or high > limit:
        raise UserError(
            f"{name} ({array.dtype}) ranges from {low} to {high}; give integers in 0..255 or floats in 0..1"
        )


def _check(splits: Splits[ResidentImages]) -> None:
    """What only shows once images, labels and classes are seen together."""
    if len(splits.classes) < 2:
        raise UserError(f"there is one class only ({splits.classes[0]}); a classifier needs at least two")
    for part, suffix in ((splits.train, "train"), (splits.test, "test")):
        if len(part.images) != len(part.labels):
            raise UserError(
                f"x_{suffix} has {len(part.images)} images, y_{suffix} {len(part.labels)} labels; pair them"
            )
        low, high, last = part.labels.min(), part.labels.max(), len(splits.classes) - 1
        if low < 0 or high > last:
            raise UserError(
                f"labels out of range: y_{suffix} holds {low} to {high}, the classes are 0 to {last}"
            )
    if splits.train.shape != splits.test.shape:
        raise UserError(
            f"the images of x_train are {splits.train.shape} and of x_test {splits.test.shape} "
            "(channels, height, width); bring them to one shape"
        )
    counts = torch.bincount(splits.train.labels, minlength=len(splits.classes))
    if not counts.all():
        missing = splits.classes[int(counts.argmin())]
        raise UserError(f"class {missing} has no image in x_train; number the classes 0..K-1 without gaps")
