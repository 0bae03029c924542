"""What a run shows while it works: a live line in a terminal, a line an epoch elsewhere, nothing when
quiet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TextColumn, TimeRemainingColumn
from rich.table import Column

SHOWN = {
    "train_loss": "loss",
    "train_accuracy": "acc",
    "arch_loss": "α loss",
    "valid_accuracy": "valid acc",
    "test_accuracy": "test acc",
    "test_ndcg": "test ndcg",
    "table_cifar10_test": "table acc",
}


class Progress:
    """Progress on standard error, so that standard output stays free for results."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.live: RichProgress | None = None

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def phase(self, name: str, epochs: int, steps: int) -> Iterator[None]:
        """Show the live line while the block runs."""
        self._name, self._epochs, self._steps = name, epochs, steps
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        # In a narrow terminal the numbers at the end are cut, not the time left.
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len(name) + 20)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("left  {task.fields[numbers]}", table_column=Column(no_wrap=True)),
        )
        with RichProgress(
            *columns, console=self.console, transient=True, speed_estimate_period=60
        ) as self.live:
            self._task = self.live.add_task(name, total=epochs * steps, numbers="")
            yield
        self.live = None

    def step(self, epoch: int, step: int, values: dict[str, float]) -> None:
        if self.live is None:
            return
        speed = self.live.tasks[0].speed
        rate = f"  {_rate(speed)}" if speed else ""
        self.live.update(
            self._task,
            completed=epoch * self._steps + step,
            description=f"{self._name} {epoch + 1}/{self._epochs} step {step}/{self._steps}",
            numbers=_numbers(values, digits=3) + rate,
        )

    def end_epoch(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        line = f"{self._name} epoch {record['epoch'] + 1}/{self._epochs}  {_numbers(record)}"
        self.say(f"{line}  {_rate(timing['steps_per_second'])}")


def _rate(speed: float) -> str:
    return f"{1 / speed:.1f} s a step" if 0 < speed < 1 else f"{speed:.1f} steps/s"


def _numbers(values: dict[str, Any], digits: int = 4) -> str:
    shown = ((label, values[name]) for name, label in SHOWN.items() if name in values)
    return "  ".join(f"{label} {value:.{digits}f}" for label, value in shown)
