"""Run folders as the engine writes them, made up and small."""

import json
from pathlib import Path
from typing import Any

PRIMITIVES = ["none", "skip_connect", "sep_conv_3x3"]
EDGES = [[0, 2], [1, 2], [0, 3], [1, 3], [2, 3]]
GENOTYPE = {
    "normal": [["sep_conv_3x3", 1], ["skip_connect", 0], ["sep_conv_3x3", 2], ["sep_conv_3x3", 0]],
    "normal_concat": [2, 3],
    "reduce": [["skip_connect", 0], ["skip_connect", 1], ["sep_conv_3x3", 2], ["skip_connect", 1]],
    "reduce_concat": [2, 3],
}
CONFIG = {
    "dataset": "digits",
    "strategy": "darts",
    "epochs": 3,
    "train_epochs": 2,
    "control": True,
    "space": "darts",
    "selection": "argmax",
    "cutout": None,
    "learning_rate": 0.025,
}
RESULT = {
    "genotype": GENOTYPE,
    "valid_accuracy": 0.75,
    "test_accuracy": 0.9876,
    "scratch_test_accuracy": 0.9,
    "test_examples": 400,
    "commonest_class": "seven",
    "commonest_class_accuracy": 0.125,
    "seconds": 75.0,
    "steps_per_second": 12.5,
    "parameters": 123456,
    "peak_memory_bytes": 3 * 2**30,
    "versions": {"neuroexapt": "0.1.0", "torch": "2.11.0", "cuda": None},
    "device": "Some GPU",
}


def search_record(epoch: int) -> dict:
    chosen = 0.4 + 0.1 * epoch
    rest = (1 - chosen) / 2
    return {
        "phase": "search",
        "epoch": epoch,
        "train_loss": 1.0 / (epoch + 1),
        "train_accuracy": 0.5 + 0.1 * epoch,
        "valid_loss": 1.2 / (epoch + 1),
        "valid_accuracy": 0.45 + 0.1 * epoch,
        "alpha": {cell: [[rest, rest, chosen]] * len(EDGES) for cell in ("normal", "reduce")},
        "alpha_entropy": {cell: [1.0 - 0.1 * epoch] * len(EDGES) for cell in ("normal", "reduce")},
        "preference": 3 * chosen,
        "genotype": GENOTYPE,
    }


def training_record(phase: str, epoch: int, accuracy: float) -> dict:
    return {
        "phase": phase,
        "epoch": epoch,
        "train_loss": 0.5,
        "train_accuracy": accuracy,
        "test_loss": 0.6,
        "test_accuracy": accuracy,
    }


class MadeUpRun:
    """A run folder of which each part is written by a call of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.write("config.json", CONFIG)
        self.write("space.json", space())

    def write(self, name: str, value: Any) -> None:
        (self.path / name).write_text(json.dumps(value))

    def append(self, name: str, record: dict) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps(record) + "\n")

    def record(self, record: dict) -> None:
        self.append("metrics.jsonl", record)
        timing = {"seconds": 20.0, "steps_per_second": 12.5, "peak_memory_bytes": 2**30}
        self.append("timing.jsonl", {"phase": record["phase"], "epoch": record["epoch"], **timing})

    def search(self, epochs: int) -> None:
        for epoch in range(epochs):
            self.record(search_record(epoch))

    def train(self, phase: str, accuracies: list[float]) -> None:
        for epoch, accuracy in enumerate(accuracies):
            self.record(training_record(phase, epoch, accuracy))

    def finish(self) -> None:
        self.write("genotype.json", GENOTYPE)
        self.write("result.json", RESULT)


def space() -> dict:
    return {
        "name": "small",
        "primitives": PRIMITIVES,
        "edges": {"normal": EDGES, "reduce": EDGES},
        "nodes": ["c_{k-2}", "c_{k-1}", "0", "1"],
    }
