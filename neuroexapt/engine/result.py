"""What a finished run gives back, in Python and in its folder."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.engine.run import RunFolder
from neuroexapt.engine.session import OpenRun


@dataclass(frozen=True)
class RunResult:
    """What a search found, or what came of training a genotype.

    ``model``: the trained network of the genotype, after a search the one that inherited its weights, with
    ``ema`` the average; of several seeds the first one's;
    ``curves[phase][name]``: a value for every epoch that recorded it; ``result``: what is in result.json.
    """

    genotype: AnyGenotype
    model: nn.Module
    curves: dict[str, dict[str, list[Any]]]
    result: dict[str, Any]
    run_dir: Path


def read_curves(folder: RunFolder) -> dict[str, dict[str, list[Any]]]:
    """``curves[phase][name]``: what metrics.jsonl holds, a value an epoch."""
    curves: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for record in folder.records(folder.metrics):
        for name, value in record.items():
            curves[record["phase"]][name].append(value)
    return {phase: dict(values) for phase, values in curves.items()}


def finish(run: OpenRun[Any], result: dict[str, Any]) -> None:
    """Write result.json and the report, and say what came out."""
    from neuroexapt.report.html import write_report

    run.folder.write_json("result.json", result)
    report = write_report(run.folder.path)
    scratch = result.get("scratch_test_accuracy")
    compared = f" (from scratch {scratch:.2%})" if scratch is not None else ""
    others = [name for name in run.space.task.figures if name != "accuracy"]
    is_trained = getattr(run.config, "train_epochs", None) != 0
    for name, control in result.get("controls", {}).items():
        shown = f"{_outcome(control)}{_shares(control, others)}"
        run.session.progress.say(f"{name}: {shown}, {control['parameters']:,} parameters")
    run.session.progress.say(
        f"{'' if is_trained else 'not trained after the search: '}{_outcome(result)}{compared}"
        f"{_shares(result, others)}, {result['parameters']:,} parameters, {result['seconds']:.0f} s; "
        f"report: {report}"
    )


def _outcome(result: dict[str, Any]) -> str:
    """Test accuracy, with its standard deviation where it is a mean over seeds."""
    mean, deviation = result["test_accuracy"], result.get("test_accuracy_deviation")
    spread = "" if deviation is None else f" ± {deviation:.2%} over {len(result['test_accuracies'])} seeds"
    return f"test accuracy {mean:.2%}{spread}"


def _shares(result: dict[str, Any], figures: Sequence[str]) -> str:
    return "".join(f", {name} {result[f'test_{name}']:.2%}" for name in figures)
