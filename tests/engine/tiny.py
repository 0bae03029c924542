"""A data set and a configuration so small that whole runs fit into a test."""

from pathlib import Path
from typing import Any

import numpy as np


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
