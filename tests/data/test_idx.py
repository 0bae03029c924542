import gzip

import numpy as np
import pytest

from neuroexapt.data.idx import STEMS, find_idx_files, read_idx, read_idx_part
from neuroexapt.errors import UserError


def idx_bytes(array):
    return b"".join([bytes([0, 0, 8, array.ndim]), np.array(array.shape, ">u4").tobytes(), array.tobytes()])


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_plain_and_gzipped(tmp_path, array, suffix):
    content = idx_bytes(array)
    path = tmp_path / f"file{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    np.testing.assert_array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1], id="cut short"),
        pytest.param(lambda content: content + b"\0", id="too long"),
        pytest.param(lambda content: content[:6], id="header cut short"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"\x89PNG" + content[4:], id="another format"),
        pytest.param(lambda content: content[:2] + b"\x0d" + content[3:], id="floats"),
    ],
)
def test_refuses_damaged_files(tmp_path, array, damage):
    (tmp_path / "file").write_bytes(damage(idx_bytes(array)))
    with pytest.raises(UserError, match="fetch it again"):
        read_idx(tmp_path / "file")


def test_refuses_a_damaged_gzip_file(tmp_path, array):
    (tmp_path / "file.gz").write_bytes(gzip.compress(idx_bytes(array))[:-9])
    with pytest.raises(UserError, match=r"file\.gz cannot be read"):
        read_idx(tmp_path / "file.gz")


def test_refuses_labels_of_other_images(tmp_path, array):
    (tmp_path / "images").write_bytes(idx_bytes(array))
    (tmp_path / "labels").write_bytes(idx_bytes(np.zeros(2, np.uint8)))
    with pytest.raises(UserError, match="do not belong together"):
        read_idx_part(tmp_path / "images", tmp_path / "labels")


def test_finds_the_first_complete_folder(tmp_path):
    incomplete, complete = tmp_path / "a", tmp_path / "b"
    incomplete.mkdir()
    complete.mkdir()
    (incomplete / STEMS[0]).touch()
    for stem in STEMS:
        (complete / f"{stem}.gz").touch()
    (complete / STEMS[2]).touch()  # unpacked beside the archive
    found = find_idx_files([incomplete, complete])
    assert [path.name for path in found] == [f"{STEMS[0]}.gz", f"{STEMS[1]}.gz", STEMS[2], f"{STEMS[3]}.gz"]
    assert find_idx_files([incomplete]) is None
