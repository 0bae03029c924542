import numpy as np
import pytest
import torch
from PIL import Image

from neuroexapt.data.folders import read_folder
from neuroexapt.data.parts import ResidentImages, StreamedImages
from neuroexapt.errors import UserError


def read(path, image_size=None, max_resident_bytes=10**9):
    return read_folder(path, image_size, max_resident_bytes, quiet=True)


@pytest.fixture
def make_picture(tmp_path):
    def make(name, size=(8, 6), mode="RGB", level=0):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, level if mode in ("L", "I;16") else (level,) * 3).save(path)
        return path

    return make


@pytest.fixture
def pictures(tmp_path, make_picture):
    """Two classes; a picture's grey level is its place in the list."""
    for level, name in enumerate(["train/cat/0.png", "train/cat/1.PNG", "train/dog/0.png", "test/dog/0.png"]):
        make_picture(name, level=level)
    return tmp_path


def test_reads_classes_labels_and_pixels(pictures):
    (pictures / "train" / "cat" / "Thumbs.db").touch()
    (pictures / "train" / ".cache").mkdir()
    splits = read(pictures)
    assert splits.classes == ("cat", "dog")
    assert isinstance(splits.train, ResidentImages)
    assert splits.train.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert splits.train.labels.tolist() == [0, 0, 1]
    assert splits.test.images.unique().tolist() == [3]
    assert splits.test.labels.tolist() == [1]


def test_a_small_common_size_is_kept(pictures):
    assert read(pictures).train.shape == (3, 6, 8)


@pytest.mark.parametrize("size", [(9, 6), (400, 300)])
def test_mixed_or_large_sizes_become_64(pictures, make_picture, size):
    make_picture("test/dog/1.png", size)
    assert read(pictures).train.shape == (3, 64, 64)


def test_the_size_can_be_chosen(pictures):
    splits = read(pictures, image_size=10)
    assert splits.train.images.shape == (3, 3, 10, 10)


def test_pictures_are_grey_only_if_all_are(tmp_path, make_picture):
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        make_picture(name, mode="L")
    assert read(tmp_path).train.shape[0] == 1
    make_picture("test/b/0.png", mode="RGB")
    assert read(tmp_path).train.shape[0] == 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, make_picture, mode):
    """Its hidden colour is mostly black, as a drawing before it may be."""
    drawing = Image.new("RGBA", (4, 4))
    drawing.putpixel((1, 2), (0, 0, 0, 255))
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        make_picture(name)
        drawing.convert(mode).save(tmp_path / name)
    images = read(tmp_path).train.images
    assert images[:, :, 2, 1].unique().tolist() == [0]
    assert images.sum() == 255 * (images.numel() - images[:, :, 2, 1].numel())


def test_what_exceeds_the_memory_is_streamed(pictures):
    needed = 4 * 3 * 6 * 8
    resident, streamed = (
        read(pictures, max_resident_bytes=needed),
        read(pictures, max_resident_bytes=needed - 1),
    )
    assert isinstance(streamed.train, StreamedImages)
    assert torch.equal(streamed.train.read([0, 1, 2]), resident.train.images)
    assert torch.equal(streamed.test.labels, resident.test.labels)


def test_missing_folders(tmp_path, pictures):
    with pytest.raises(
        UserError, match="nowhere/train does not exist; folder:PATH needs PATH/train and PATH/test"
    ):
        read(tmp_path / "nowhere")
    (pictures / "test").rename(pictures / "elsewhere")
    with pytest.raises(UserError, match="test does not exist"):
        read(pictures)


def test_empty_folder(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train has no folders; put the pictures of each class in a folder"):
        read(tmp_path)


def test_a_class_without_pictures(pictures):
    (pictures / "train" / "ant").mkdir()
    with pytest.raises(UserError, match="train/ant has no pictures; add some or remove the folder"):
        read(pictures)


def test_a_class_that_is_only_tested(pictures, make_picture):
    make_picture("test/cow/0.png")
    with pytest.raises(UserError, match=r"test/cow has no counterpart in .*train"):
        read(pictures)


def test_one_class_only(tmp_path, make_picture):
    make_picture("train/cat/0.png")
    make_picture("test/cat/0.png")
    with pytest.raises(UserError, match=r"one class only \(cat\)"):
        read(tmp_path)


def test_a_corrupt_picture(pictures):
    broken = pictures / "train" / "cat" / "2.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"cat/2\.jpg is not a readable picture") as caught:
        read(pictures)
    assert "\n" not in str(caught.value)


def test_a_picture_cut_short(pictures):
    path = pictures / "train" / "cat" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(UserError, match=r"cat/2\.png is not a readable picture"):
        read(pictures)


def test_deep_pictures_are_refused(pictures, make_picture):
    make_picture("train/cat/2.png", mode="I;16")
    with pytest.raises(UserError, match=r"cat/2\.png has more than 8 bits a channel"):
        read(pictures)
