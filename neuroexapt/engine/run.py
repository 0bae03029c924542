"""The folder of a run: what is in it, and how its records survive a crash and a resumption."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuroexapt.engine.checkpoint import cannot_write, write_atomically
from neuroexapt.errors import UserError


class RunFolder:
    """``config.json, space.json, split.json, metrics.jsonl, timing.jsonl, genotype.json, result.json,
    checkpoints/, tensorboard/, report.html`` under ``path``.

    ``metrics.jsonl`` holds only what the seed determines; times and memory are in ``timing.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"

    @classmethod
    def create(cls, path: Path, *, overwrite: bool) -> "RunFolder":
        """An empty run folder. One that holds a run is replaced only with ``overwrite``, any other never."""
        run = cls(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if not (path / "config.json").is_file():
                raise UserError(f"{path} exists and holds no run; choose another folder with --out")
            if not overwrite:
                raise UserError(
                    f"{path} already holds a run: continue it with --resume {path}, replace it with "
                    "--overwrite, or choose another folder with --out"
                )
            shutil.rmtree(path)
        try:
            run.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A folder that holds a run."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no run: there is no config.json in it")
        return cls(path)

    def checkpoint(self, phase: str) -> Path:
        return self.checkpoints / f"{phase}.safetensors"

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error

    def append(self, path: Path, record: dict[str, Any]) -> None:
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def records(self, path: Path) -> Iterator[dict[str, Any]]:
        """The records of a .jsonl file; a last line that a crash cut short is left out."""
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    yield json.loads(line)

    def rewind(self, phase: str, epoch: int) -> None:
        """Forget the records of ``phase`` from ``epoch`` on: they will be made again."""
        for path in (self.metrics, self.timing):
            if path.exists():
                kept = [r for r in self.records(path) if r["phase"] != phase or r["epoch"] < epoch]
                write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
