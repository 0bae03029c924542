"""TensorBoard event files of one phase."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Events:
    """Scalars by step and by epoch, figures by epoch; one writer a phase, so that phases overlay as runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, step: int) -> None:
        """Open the writer; events from ``step`` on that an earlier, killed process wrote are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step)

    def step(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"step/{name}", value, step)

    def epoch(self, record: dict[str, Any], timing: dict[str, float], figures: dict[str, "Figure"]) -> None:
        """The epoch's numbers under ``epoch/``, lists of numbers as one curve an entry, and its figures."""
        step = record["step"]
        for name, value in (_scalars(record) | _scalars(timing)).items():
            self._writer.add_scalar(f"epoch/{name}", value, step)
        for name, figure in figures.items():
            self._writer.add_figure(name, figure, step, close=False)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _scalars(values: Any, name: str = "") -> dict[str, float]:
    """Every number inside nested dicts and lists by its path; α itself is left to the heat maps."""
    if isinstance(values, (int, float)):
        return {name: values}
    if not isinstance(values, (dict, list)):
        return {}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    prefix = f"{name}/" if name else ""
    return {k: v for key, value in items for k, v in _scalars(value, f"{prefix}{key}").items()}
