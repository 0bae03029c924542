"""Search, derive, inherit, train: a whole run on a data set of your choice, in four modes.

    python examples/basic_classification.py --mode exapt       search, then train with the inherited weights
    python examples/basic_classification.py --mode fixed       train a given genotype from scratch
    python examples/basic_classification.py --mode cached      exapt, through the fastest path measured here
    python examples/basic_classification.py --mode benchmark   all of them, one table

Every option of ``neuroexapt search`` works, ``--genotype`` names the one to train in mode fixed.
"""

import enum
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from neuroexapt import EvaluateConfig, SearchConfig, evaluate, search
from neuroexapt.cli.app import first_order, run_command
from neuroexapt.cli.options import dashes, with_settings
from neuroexapt.engine.config import make_config

app = typer.Typer(
    rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"token_normalize_func": dashes}
)


class Mode(str, enum.Enum):
    EXAPT = "exapt"
    FIXED = "fixed"
    CACHED = "cached"
    BENCHMARK = "benchmark"


@app.command()
@with_settings(SearchConfig)
def main(
    settings: dict[str, Any],
    mode: Annotated[Mode, typer.Option(help="what to do")] = Mode.EXAPT,
    genotype: Annotated[
        str, typer.Option(help="genotype of mode fixed: name, file or run folder")
    ] = "DARTS_V2",
    use_first_order: Annotated[bool, typer.Option("--use-first-order", hidden=True)] = False,
) -> None:
    """Search an architecture and train it, or compare ways of doing so."""
    if use_first_order:
        settings = first_order(settings)
    settings.setdefault("out", Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{mode.value}")
    if mode is Mode.BENCHMARK:
        benchmark(settings, genotype)
    elif mode is Mode.FIXED:
        evaluate(**make_config(SearchConfig, settings).settings_of_fixed(genotype))
    elif mode is Mode.CACHED:
        search(**{**settings, "execution": "fastest"})
    else:
        search(**settings)


def benchmark(settings: dict[str, Any], genotype: str) -> None:
    """Each mode in a process of its own, so that its time and peak memory are its own."""
    fixed = make_config(SearchConfig, settings).settings_of_fixed(genotype)
    make_config(EvaluateConfig, fixed)  # refused now, not after the search
    out = settings.pop("out")
    rows = {
        mode: run_mode(mode, settings, genotype, out / mode.value)
        for mode in (Mode.EXAPT, Mode.FIXED, Mode.CACHED)
    }

    table = Table(title=f"{settings.get('dataset', 'digits')}: the modes side by side")
    for column in ("mode", "test accuracy", "from scratch", "seconds", "parameters", "peak memory"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, result in rows.items():
        scratch = result.get("scratch_test_accuracy")
        table.add_row(
            mode.value,
            f"{result['test_accuracy']:.2%}",
            "" if scratch is None else f"{scratch:.2%}",
            f"{result['seconds']:.1f}",
            f"{result['parameters']:,}",
            f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB",
        )
    Console().print(table)
    (out / "benchmark.json").write_text(json.dumps({m.value: r for m, r in rows.items()}, indent=2) + "\n")


def run_mode(mode: Mode, settings: dict[str, Any], genotype: str, out: Path) -> dict[str, Any]:
    arguments = ["--mode", mode.value, "--genotype", genotype, "--out", str(out)]
    for name, value in settings.items():
        option = name.replace("_", "-")
        arguments += (
            [f"--{'' if value else 'no-'}{option}"]
            if isinstance(value, bool)
            else [f"--{option}", str(value)]
        )
    code = subprocess.run([sys.executable, __file__, *arguments]).returncode
    if code:
        raise typer.Exit(code)
    return json.loads((out / "result.json").read_text())


if __name__ == "__main__":
    sys.exit(run_command(app))
