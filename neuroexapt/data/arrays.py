"""The user's own arrays: `npz:PATH`, checked and brought to uint8."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from neuroexapt.data.parts import ResidentImages, Splits
from neuroexapt.errors import UserError

KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> Splits[ResidentImages]:
    """Read x_train, y_train, x_test, y_test and, if present, `classes` from an .npz file.

    x: [N, H, W] (grey) or [N, H, W, C] with 1 to 4 channels; integers in 0..255, or floats in 0..1, which
    are multiplied by 255 and rounded. y: integers [N] in 0..K-1, every class occurring in y_train.
    classes: K strings (else the labels' numbers are the names). Raises UserError for anything else.
    """
    arrays = _load(path)
    train = _part("train", arrays)
    test = _part("test", arrays)
    if train.shape != test.shape:
        raise UserError(
            f"the images of x_train are {train.shape} and of x_test {test.shape} "
            "(channels, height, width); bring them to one shape"
        )
    names = arrays.get("classes", range(len(train.labels.unique())))
    if np.ndim(names) != 1:
        raise UserError(f"classes in {path} is no list of names; give one string a class or leave it out")
    splits = Splits(train, test, tuple(str(name) for name in names))
    _check_labels(splits)
    return splits


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"there is no file {path}; npz:PATH names an .npz file with {', '.join(KEYS)}")
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in (*KEYS, "classes") if key in file}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); write it with numpy.savez") from error
    if missing := [key for key in KEYS if key not in arrays]:
        raise UserError(f"{path} has no array {missing[0]}; it needs {', '.join(KEYS)}")
    return arrays


def _part(suffix: str, arrays: dict[str, np.ndarray]) -> ResidentImages:
    images, labels = arrays[f"x_{suffix}"], arrays[f"y_{suffix}"]
    if images.ndim and labels.ndim and len(images) != len(labels):
        raise UserError(f"x_{suffix} has {len(images)} images, y_{suffix} {len(labels)} labels; pair them")
    return ResidentImages(_images(f"x_{suffix}", images), _labels(f"y_{suffix}", labels))


def _labels(name: str, array: np.ndarray) -> torch.Tensor:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{name} is {array.dtype} {list(array.shape)}; it must hold one integer an image")
    return torch.from_numpy(array.astype(np.int64))


def _images(name: str, array: np.ndarray) -> torch.Tensor:
    """uint8 [N, C, H, W]."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not 1 <= array.shape[3] <= 4:
        raise UserError(
            f"{name} has the shape {list(array.shape)}; give [N, H, W] or [N, H, W, C], C at most 4"
        )
    if not array.size:
        raise UserError(f"{name} is empty; give at least one image")
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


def _check_labels(splits: Splits[ResidentImages]) -> None:
    last = len(splits.classes) - 1
    if last < 1:
        raise UserError("y_train has one class only; a classifier needs at least two")
    for name, part in (("y_train", splits.train), ("y_test", splits.test)):
        low, high = part.labels.min(), part.labels.max()
        if low < 0 or high > last:
            raise UserError(
                f"labels out of range: {name} holds {low} to {high}; "
                f"number the {last + 1} classes 0 to {last}"
            )
    counts = torch.bincount(splits.train.labels, minlength=len(splits.classes))
    if not counts.all():
        raise UserError(f"class {splits.classes[int(counts.argmin())]} has no image in x_train; add some")
