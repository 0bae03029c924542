import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from neuroexapt.engine import checkpoint
from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from neuroexapt.errors import UserError


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    shared = torch.randn(3, 4)
    return {
        "numbers": [1, 0.1, 1e-300, True, None, "text"],
        "empty": {},
        "by_integer": {0: {"step": torch.tensor(3.0)}, 1: torch.zeros(0, 2)},
        "tensors": [shared, shared.t(), shared.double(), shared.bfloat16(), torch.tensor([True, False])],
        "rng": torch.get_rng_state(),
    }


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_reads_back_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", state())
    assert_same(load_checkpoint(tmp_path / "c"), state())


def test_optimizer_states_read_back(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    save_checkpoint(tmp_path / "c", optimizer.state_dict())
    other = torch.optim.Adam([parameter], lr=1.0)
    other.load_state_dict(load_checkpoint(tmp_path / "c"))
    assert str(other.state_dict()) == str(optimizer.state_dict())


@pytest.mark.parametrize("position", [0.05, 0.3, 0.7, 0.999])
def test_a_flipped_byte_is_refused(tmp_path: Path, position: float) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, state())
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, state())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save({"x": Bomb()}, tmp_path / "c")
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_checkpoint(tmp_path / "c")
    assert not (tmp_path / "boom").exists()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "c")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, {"epoch": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; make room"):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "file", "text")


def test_tensors_of_a_kind_are_one_in_the_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {str(i): torch.full((i, 2), i) for i in range(100)})
    with safe_open(tmp_path / "c", "pt") as file:
        assert len(file.keys()) == 1


def test_what_is_read_does_not_keep_the_rest_in_memory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {"small": torch.ones(2), "large": torch.ones(1000)})
    assert load_checkpoint(tmp_path / "c")["small"].untyped_storage().nbytes() == 8


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    save_checkpoint(tmp_path / "c", {"epoch": 1})
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 1, this version reads 2; start anew"):
        load_checkpoint(tmp_path / "c")
