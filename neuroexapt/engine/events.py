"""TensorBoard event files of one phase."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroexapt.engine.checkpoint import cannot_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FIGURE_DPI = 160


class Events:
    """Scalars by step and by epoch, figures by epoch; one writer a phase, so that phases overlay as runs.

    An epoch's events are filed under its last step, so that resuming at the epoch after it keeps them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, step: int) -> None:
        """Open the writer; events from ``step`` on that an earlier, killed process wrote are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        with self._writing():
            self._writer = SummaryWriter(str(self._folder), purge_step=step)

    def step(self, values: dict[str, float], step: int) -> None:
        with self._writing():
            for name, value in values.items():
                self._writer.add_scalar(f"step/{name}", value, step)

    def epoch(self, record: dict[str, Any], timing: dict[str, float], figures: dict[str, "Figure"]) -> None:
        """The epoch's numbers under ``epoch/``, the entropy of α edge by edge, and its figures."""
        step = record["step"] - 1
        with self._writing():
            for name, value in (record | timing).items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"epoch/{name}", value, step)
            for cell, entropies in record.get("alpha_entropy", {}).items():
                for edge, value in enumerate(entropies):
                    self._writer.add_scalar(f"alpha_entropy_{cell}/edge_{edge:02}", value, step)
            for name, figure in figures.items():
                figure.set_dpi(FIGURE_DPI)
                self._writer.add_figure(name, figure, step, close=False)
            self._writer.flush()

    def close(self) -> None:
        with self._writing():
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self._folder, error) from error
