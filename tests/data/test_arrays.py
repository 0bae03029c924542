import numpy as np
import pytest
import torch

from neuroexapt.data.arrays import read_npz
from neuroexapt.errors import UserError


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (6, 5, 4, 3), np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": rng.integers(0, 256, (3, 5, 4, 3), np.uint8),
        "y_test": np.array([2, 1, 1], np.uint8),
    }


@pytest.fixture
def read(tmp_path, arrays):
    """Write the arrays, some replaced, and read them."""

    def write_and_read(**replaced):
        np.savez(tmp_path / "data.npz", **{**arrays, **replaced})
        return read_npz(tmp_path / "data.npz")

    return write_and_read


def test_reads_channels_last(read, arrays):
    splits = read()
    assert torch.equal(splits.train.images, torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2))
    assert splits.train.shape == (3, 5, 4)
    assert splits.train.labels.dtype == torch.int64
    assert splits.test.labels.tolist() == [2, 1, 1]
    assert splits.classes == ("0", "1", "2")


def test_reads_grey_images_and_class_names(read, arrays):
    splits = read(x_train=arrays["x_train"][..., 0], x_test=arrays["x_test"][..., 0], classes=["a", "b", "c"])
    assert splits.train.shape == (1, 5, 4)
    assert splits.classes == ("a", "b", "c")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
def test_other_types_become_bytes(read, arrays, dtype):
    scale = 255 if dtype.startswith("float") else 1
    splits = read(x_train=(arrays["x_train"] / scale).astype(dtype))
    assert torch.equal(splits.train.images, torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2))


def with_value(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("x_train", lambda x: with_value(x / 255, (4, 1, 2, 0), np.nan), r"x_train\[4, 1, 2, 0\] is nan"),
        ("x_test", lambda x: with_value(x / 255, (1, 0, 0, 2), -np.inf), r"x_test\[1, 0, 0, 2\] is -inf"),
        ("x_train", lambda x: x.astype(float), "floats in 0..1"),
        ("x_train", lambda x: x.astype(int) * 2, "integers in 0..255"),
        ("x_train", lambda x: x > 7, "is bool"),
        ("x_train", lambda x: x.transpose(0, 3, 1, 2).repeat(9, 3), r"give \[N, H, W\] or \[N, H, W, C\]"),
        ("x_train", lambda x: x[:, 0, 0], r"give \[N, H, W\]"),
        ("x_train", lambda x: x[:-1], "x_train has 5 images, y_train 6 labels"),
        ("x_test", lambda x: x[:, 1:], "bring them to one shape"),
        ("y_train", lambda y: y / 2, "one integer an image"),
        ("y_train", lambda y: y[:, None], "one integer an image"),
        ("y_train", lambda y: y - 1, "labels out of range: y_train holds -1 to 1"),
        ("y_train", lambda y: y * 0 - 7, "one class only"),
        ("y_train", lambda y: y * 2, "y_train holds 0 to 4; number the 3 classes 0 to 2"),
        ("y_train", lambda y: y * 10**12, "number the 3 classes 0 to 2"),
        ("y_train", lambda y: y * 0, "one class only"),
        ("y_test", lambda y: y + 1, "labels out of range: y_test holds 2 to 3; number"),
        ("y_test", lambda y: y[:0], "x_test has 3 images, y_test 0 labels"),
        ("y_test", lambda y: y[0], "one integer an image"),
    ],
)
def test_refuses_unusable_arrays(read, arrays, key, change, message):
    with pytest.raises(UserError, match=message) as caught:
        read(**{key: change(arrays[key])})
    assert "\n" not in str(caught.value)


def test_labels_are_held_against_the_given_classes(read):
    with pytest.raises(
        UserError, match="labels out of range: y_train holds 0 to 2; number the 2 classes 0 to 1"
    ):
        read(classes=["a", "b"])
    with pytest.raises(UserError, match="class d has no image in x_train"):
        read(classes=["a", "b", "c", "d"])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_refuses_empty_arrays(read, arrays, dtype):
    with pytest.raises(UserError, match="x_train is empty; give at least one image"):
        read(x_train=arrays["x_train"][:0].astype(dtype), y_train=arrays["y_train"][:0])


def test_refuses_objects(read):
    with pytest.raises(UserError, match="cannot be read"):
        read(classes=np.array(["a", 1, None], dtype=object))


def test_names_the_missing_array(tmp_path, arrays):
    del arrays["y_test"]
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UserError, match="has no array y_test; it needs x_train, y_train, x_test, y_test"):
        read_npz(tmp_path / "data.npz")


def test_refuses_missing_and_damaged_files(tmp_path, read, arrays):
    with pytest.raises(UserError, match=r"there is no file .*none\.npz"):
        read_npz(tmp_path / "none.npz")
    read()
    whole = (tmp_path / "data.npz").read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:300] + b"\0\1\2\3" + whole[304:]):
        (tmp_path / "data.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"data\.npz cannot be read"):
            read_npz(tmp_path / "data.npz")
    np.save(tmp_path / "single.npy", arrays["x_train"])
    with pytest.raises(UserError, match=r"single\.npy cannot be read"):
        read_npz(tmp_path / "single.npy")
