"""Data and settings so small that whole runs fit into a test, and what to compare of two runs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from neuroexapt.engine.checkpoint import load_checkpoint


def write_tiny_npz(path: Path) -> Path:
    """48 training and 12 test pictures of 6x6 in 3 classes that differ in brightness."""
    rng = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        noise = rng.integers(0, 60, (count, 6, 6, 1))
        return (noise + 80 * labels[:, None, None, None]).astype(np.uint8), labels

    x_train, y_train = part(48)
    x_test, y_test = part(12)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def tiny_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a search of 2 epochs of 3 steps on the tiny data, in ``folder / "run"``."""
    data = folder / "tiny.npz"
    if not data.exists():
        write_tiny_npz(data)
    return {
        "dataset": f"npz:{data}",
        "epochs": 2,
        "train_epochs": 1,
        "batch_size": 8,
        "layers": 3,
        "init_channels": 2,
        "arch_learning_rate": 0.01,
        "out": folder / "run",
        "backend": "cpu",
        "quiet": True,
        **changes,
    }


class Killed(Exception):
    """Stands for the end of the process."""


@contextmanager
def killed_at(phase: type, epoch: int, step: int, name: str | None = None) -> Iterator[None]:
    """The first phase of this kind, and of that name, dies right before ``step`` of ``epoch``."""
    steps = phase.steps

    def dying_steps(self: Any, at_epoch: int, start: int) -> Iterator[torch.Tensor]:
        for i, metrics in enumerate(steps(self, at_epoch, start), start):
            if name in (None, self.name) and (at_epoch, i) == (epoch, step):
                raise Killed
            yield metrics

    with patch.object(phase, "steps", dying_steps), pytest.raises(Killed):
        yield


def weights_of(run: Path, phase: str) -> dict[str, torch.Tensor]:
    state = load_checkpoint(run / "checkpoints" / f"{phase}.safetensors")["phase"]
    return state["supernet" if phase == "search" else "network"]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: every weight and α of every phase, every metric, the genotype."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert (a / "genotype.json").read_bytes() == (b / "genotype.json").read_bytes()
    for phase in ("search", "inherit", "scratch"):
        x, y = weights_of(a, phase), weights_of(b, phase)
        assert list(x) == list(y)
        assert all(torch.equal(x[name], y[name]) for name in x), phase


def dataset_of(run: Path) -> str:
    """The data set of a run, to be used again."""
    return json.loads((run / "config.json").read_text())["dataset"]
