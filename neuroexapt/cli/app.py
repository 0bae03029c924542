"""The command line: ``neuroexapt search | derive | evaluate | export | report | backend | …``."""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from neuroexapt.cli.backend import backend_app
from neuroexapt.cli.options import dashes, with_settings
from neuroexapt.cli.recommender import serve_recommender
from neuroexapt.engine.config import EvaluateConfig, SearchConfig
from neuroexapt.engine.interrupt import Interrupted
from neuroexapt.errors import UserError
from neuroexapt.version import __version__

app = typer.Typer(
    help="Neural architecture search by gradient descent: labelled data in, a trained architecture out.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": dashes, "help_option_names": ["-h", "--help"]},
)

# The base of all usage errors; it has a public name in the newest versions of typer only.
UsageProblem: Any = typer.BadParameter.__mro__[2]

Resume = Annotated[Path | None, typer.Option("--resume", help="continue the run in this folder")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="JSON file with settings")]


@app.command()
@with_settings(SearchConfig)
def search(
    settings: dict[str, Any],
    resume: Resume = None,
    config: ConfigFile = None,
    use_first_order: Annotated[bool, typer.Option("--use-first-order", hidden=True)] = False,
) -> None:
    """Search an architecture, train it with the inherited weights, write a run folder and a report."""
    from neuroexapt.engine.search import search

    if use_first_order:
        settings = first_order(settings)
    search(resume=resume, config=config, **settings)


@app.command()
def derive(
    run: Annotated[Path, typer.Argument(help="folder of a search, finished or not")],
    out: Annotated[Path | None, typer.Option("--out", help="write the genotype to this JSON file")] = None,
) -> None:
    """Print the genotype that a search stands at."""
    from neuroexapt.engine.checkpoint import write_atomically
    from neuroexapt.engine.search import derive

    genotype = derive(run)
    if out:
        write_atomically(out, json.dumps(genotype.to_dict(), indent=2) + "\n")
    print(genotype)


@app.command()
@with_settings(EvaluateConfig)
def evaluate(settings: dict[str, Any], resume: Resume = None, config: ConfigFile = None) -> None:
    """Train a genotype from scratch and test it."""
    from neuroexapt.engine.evaluate import evaluate

    evaluate(resume=resume, config=config, **settings)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a search or an evaluation")],
    format: Annotated[
        str | None, typer.Option("--format", help="onnx or pt2 (default: by the ending of --out, else onnx)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="file to write (default: RUN/model.FORMAT)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file if it exists")] = False,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="folder in which the run's data set is now")
    ] = None,
) -> None:
    """Write the trained network of a run to a file that needs no neuroexapt, and compare it with PyTorch."""
    from neuroexapt.exporting.export import export

    print(export(run, format=format, out=out, overwrite=overwrite, data_root=data_root))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    out: Annotated[
        Path | None, typer.Option("--out", help="file to write (default: RUN/report.html)")
    ] = None,
) -> None:
    """Write the HTML page of a run: cells, α over time, curves, numbers."""
    from neuroexapt.report.html import write_report

    print(write_report(run, out))


app.command(name="serve-recommender")(serve_recommender)
app.add_typer(backend_app, name="backend")


def first_order(settings: dict[str, Any]) -> dict[str, Any]:
    """``--use_first_order`` of the original example: DARTS without the second-order term."""
    if settings.get("strategy", "darts") != "darts":
        raise UserError(
            f"--use_first_order is DARTS' first order; leave it out with --strategy {settings['strategy']}"
        )
    return {**settings, "strategy": "darts"}


@app.callback(invoke_without_command=True)
def _no_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())
    else:
        return
    raise typer.Exit


def run_command(command: Callable[..., Any], arguments: list[str] | None = None) -> int:
    """Run a typer app; the exit code. Whatever a user can mend is one line on standard error and code 2."""
    threading.excepthook = _writer_failed
    try:
        return command(arguments, standalone_mode=False) or 0
    except typer.Exit as finished:
        return finished.exit_code
    except UsageProblem as error:
        return _fail(error.format_message())
    except UserError as error:
        return _fail(str(error))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    except (KeyboardInterrupt, typer.Abort):
        print("stopped at once; the last checkpoint stands", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("out of memory; lower --batch-size, --init-channels or --layers")


def _writer_failed(failure: threading.ExceptHookArgs) -> None:
    """The thread that writes TensorBoard's events repeats errors that its caller gets as well."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _fail(message: str) -> int:
    if os.environ.get("NEUROEXAPT_LOG_LEVEL", "").lower() == "debug":
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def main() -> None:
    sys.exit(run_command(app))
