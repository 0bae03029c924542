"""The report of a run: one HTML page that needs nothing but itself."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from neuroexapt.engine.checkpoint import write_atomically
from neuroexapt.engine.run import RunFolder
from neuroexapt.report.content import Report
from neuroexapt.report.style import THEME
from neuroexapt.report.text import FILTERS


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of the run in `run_dir` to `out` (default: report.html in it) and return its path.

    A run that has not finished gets a page of what there is, which says so. Raises UserError where there is
    no run or the page cannot be written.
    """
    run = RunFolder.open(Path(run_dir))
    path = Path(out) if out else run.path / "report.html"
    environment = Environment(
        loader=PackageLoader("neuroexapt", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    write_atomically(path, environment.get_template("report.html").render(report=Report(run), theme=THEME))
    return path
