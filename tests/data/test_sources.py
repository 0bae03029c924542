import gzip
import hashlib
import pickle
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from neuroexapt.data import sources
from neuroexapt.data.augment import Augmentation
from neuroexapt.data.idx import STEMS
from neuroexapt.data.sources import DATASETS, load_dataset
from neuroexapt.errors import UserError


@pytest.fixture(autouse=True)
def no_system_data(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "DEBIAN_ROOT", tmp_path / "debian")


def write_idx(folder, level=0, suffix=""):
    """Ten training and five test images of one grey level."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem in STEMS:
        count = 10 if stem.startswith("train") else 5
        array = (
            np.full((count, 28, 28), level, np.uint8)
            if "images" in stem
            else np.arange(count, dtype=np.uint8)
        )
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        content = header + array.tobytes()
        (folder / f"{stem}{suffix}").write_bytes(gzip.compress(content) if suffix else content)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_digits():
    dataset = load_dataset("digits")
    assert (len(dataset.train), len(dataset.test)) == (1442, 355)
    assert dataset.train.images.shape[1:] == (1, 8, 8)
    assert dataset.train.images.max() == 255
    counts, test_counts = (torch.bincount(part.labels) for part in (dataset.train, dataset.test))
    assert ((test_counts / (counts + test_counts) - 0.2).abs() < 0.005).all()
    assert not dataset.augmentation.flip


def test_digits_are_all_there_and_split_the_same_way_each_time():
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits")
    again = load_dataset("digits")
    assert torch.equal(dataset.test.images, again.test.images)
    images = torch.cat([dataset.train.images, dataset.test.images]).flatten(1)
    original = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(images.tolist()) == sorted(original.tolist())


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "fashion-mnist", "."])
def test_fashion_mnist_in_each_layout(tmp_path, folder, suffix):
    write_idx(tmp_path / folder, suffix=suffix)
    dataset = load_dataset("fashion-mnist", root=tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (10, 5)
    assert dataset.train.shape == (1, 28, 28)
    assert dataset.train.labels.tolist() == list(range(10))
    assert dataset.classes[9] == "Ankle boot"


def test_fashion_mnist_of_the_debian_package(tmp_path):
    write_idx(tmp_path / "debian" / "fashion-mnist", suffix=".gz")
    assert len(load_dataset("fashion-mnist", root=tmp_path / "data").train) == 10


def test_a_folder_with_the_name_goes_before_loose_files(tmp_path):
    write_idx(tmp_path, level=1)
    write_idx(tmp_path / "MNIST" / "raw", level=2)
    assert load_dataset("mnist", root=tmp_path).train.images.unique().tolist() == [2]


@pytest.mark.parametrize(
    ("name", "label_key", "classes"), [("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)]
)
def test_cifar(tmp_path, monkeypatch, name, label_key, classes):
    datasets = pytest.importorskip("torchvision.datasets")
    builder = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = tmp_path / builder.base_folder
    folder.mkdir()

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, md5(folder / file)]

    pixels = np.random.default_rng(0).integers(0, 256, (classes, 3072), np.uint8)
    batch = {"data": pixels, label_key: list(range(classes))}
    names = [f"class {index}" for index in range(classes)]
    monkeypatch.setattr(builder, "train_list", [write("train", batch)])
    monkeypatch.setattr(builder, "test_list", [write("test", batch)])
    file, checksum = write("meta", {builder.meta["key"]: names})
    monkeypatch.setattr(builder, "meta", {**builder.meta, "filename": file, "md5": checksum})
    dataset = load_dataset(name, root=tmp_path)
    assert torch.equal(dataset.train.images, torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert dataset.test.labels.tolist() == list(range(classes))
    assert dataset.classes == tuple(names)


def test_svhn(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    from scipy.io import savemat

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), np.uint8)
    labels = np.arange(1, 11, dtype=np.uint8)[:, None]  # SVHN writes a 0 as 10
    split_list = {}
    for split in ("train", "test"):
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": pixels, "y": labels})
        split_list[split] = ["", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    dataset = load_dataset("svhn", root=tmp_path)
    assert torch.equal(dataset.train.images, torch.from_numpy(pixels).permute(3, 2, 0, 1))
    assert dataset.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"digits"}))
def test_absent_data_says_where_it_was_sought(tmp_path, name):
    pytest.importorskip("torchvision")
    with pytest.raises(
        UserError, match=f"{name} was not found in {tmp_path}.*--data-root FOLDER or --download"
    ):
        load_dataset(name, root=tmp_path)


@pytest.mark.parametrize(("name", "builder"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, name, builder):
    datasets = pytest.importorskip("torchvision.datasets")

    def fail(*args, **kwargs):
        raise URLError("no\nroute")

    monkeypatch.setattr(datasets, builder, fail)
    with pytest.raises(UserError, match=f"{name} could not be downloaded .*no route.*--data-root") as caught:
        load_dataset(name, root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_a_download_is_found(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets, "MNIST", lambda root, download: write_idx(root / "MNIST" / "raw"))
    assert len(load_dataset("mnist", root=tmp_path, download=True).train) == 10


def test_idx_files_are_read_without_torchvision(tmp_path, monkeypatch):
    write_idx(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(load_dataset("mnist", root=tmp_path).train) == 10
    with pytest.raises(UserError, match="pip install torchvision"):
        load_dataset("cifar10", root=tmp_path)


def test_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), np.uint8)
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    dataset = load_dataset(f"npz:{tmp_path / 'a.npz'}")
    assert dataset.input_size == (16, 24)
    assert dataset.augmentation == Augmentation(crop_padding=2, flip=True)
    assert dataset.mean == pytest.approx((images / 255).mean((0, 1, 2)).tolist())
    assert load_dataset(f"npz:{tmp_path / 'a.npz'}", image_size=8).train.images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("max_resident_bytes", [None, 0])
def test_folder(tmp_path, max_resident_bytes):
    for part in ("train", "test"):
        for level, name in enumerate(["a", "b"]):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (32, 32), level * 255).save(tmp_path / part / name / "0.png")
    dataset = load_dataset(f"folder:{tmp_path}", max_resident_bytes=max_resident_bytes)
    assert dataset.classes == ("a", "b")
    assert dataset.mean == (0.5,)
    assert dataset.augmentation == Augmentation(crop_padding=4, flip=False)


def test_resizing_covers_and_crops_about_the_centre():
    dataset = load_dataset("digits", image_size=16)
    assert dataset.train.images.shape == (1442, 1, 16, 16)
    columns = torch.arange(12, dtype=torch.uint8).expand(1, 1, 4, 12) * 20
    assert torch.equal(sources._cover(columns, 4), columns[..., 4:8])


@pytest.mark.parametrize("name", ["imagenet", "npz", "folder:", "digits:"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(
        UserError, match=r"unknown data set .*; choose digits, mnist, .*npz:PATH, folder:PATH or seq:PATH"
    ):
        load_dataset(name)


def test_an_impossible_image_size():
    with pytest.raises(UserError, match="image size is 0"):
        load_dataset("digits", image_size=0)


def test_importing_is_light():
    heavy = ["sklearn", "torchvision", "PIL", "rich", "matplotlib"]
    code = f"import sys, neuroexapt.data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
