"""The folder of a run: what is in it, and how its records survive a crash and a resumption."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuroexapt.engine.checkpoint import cannot_write, write_atomically
from neuroexapt.errors import UserError
from neuroexapt.spaces import BUILT_IN

OWN_FILES = frozenset(
    {
        "checkpoints",
        "config.json",
        "control_epochs.json",
        "data.json",
        "genotype.json",
        "metrics.jsonl",
        "model.onnx",
        "model.pt2",
        "report.html",
        "result.json",
        "space.json",
        "split.json",
        "tensorboard",
        "timing.jsonl",
    }
)
"""What a run, and the export of its network, write into its folder."""


class RunFolder:
    """``config.json, data.json, space.json, split.json, metrics.jsonl, timing.jsonl, genotype.json,
    control_epochs.json, result.json, checkpoints/, tensorboard/, report.html`` under ``path``.

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
        path = path.resolve()
        run = cls(path)
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                run._check_replaceable(overwrite)
                shutil.rmtree(path)
            run.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return run

    def _check_replaceable(self, overwrite: bool) -> None:
        files = self.path.iterdir() if self.path.is_dir() else ()
        # A process that was killed while it wrote leaves `.NAME.tmp`.
        names = {file.name.removeprefix(".").removesuffix(".tmp") for file in files}
        if not {"checkpoints", "config.json"} <= names <= OWN_FILES:
            raise UserError(f"{self.path} exists and is no run's folder; choose another with --out")
        if not overwrite:
            raise UserError(
                f"{self.path} already holds a run: continue it with --resume {shlex.quote(str(self.path))}, "
                "replace it with --overwrite, or choose another folder with --out"
            )

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A folder that holds a run."""
        run = cls(path)
        if not (path / "config.json").is_file() or "dataset" not in run.read_json("config.json"):
            raise UserError(
                f"{path} holds no run: there is no config.json of one in it; name the folder that a search "
                "or an evaluation wrote"
            )
        return run

    @property
    def command(self) -> str:
        """What made the run: ``search`` or ``evaluate``."""
        return "search" if "strategy" in self.read_json("config.json") else "evaluate"

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
            for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
                if line.endswith("\n"):
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise UserError(
                            f"{path}, line {number}, is damaged: {error}; delete the line"
                        ) from error

    def rewind(self, phase: str, epoch: int) -> None:
        """Forget the records of ``phase`` from ``epoch`` on, to be made again; the others must exist."""
        for path in (self.metrics, self.timing):
            records = list(self.records(path))
            kept = [r for r in records if r["phase"] != phase or r["epoch"] < epoch]
            if [r["epoch"] for r in kept if r["phase"] == phase] != list(range(epoch)):
                raise UserError(f"{path} lacks records of phase {phase}, epochs 0 to {epoch - 1}; start anew")
            if kept != records:
                write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def command_line(*words: object) -> str:
    """``neuroexapt`` with these words, as a shell takes it."""
    return "neuroexapt " + shlex.join(map(str, words))


def how_to_resume(command: str, run: Path, space: str) -> str:
    """What goes on with the run of ``command``; a shell knows only the spaces that are built in."""
    if space in BUILT_IN:
        return command_line(command, "--resume", run)
    return f"neuroexapt.{command}(resume={str(run)!r}), from Python where {space!r} is registered"
