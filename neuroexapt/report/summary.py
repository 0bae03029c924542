"""What a run comes to, in a few sentences: how good, what it was worth, what next."""

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from neuroexapt.core.derived import auxiliary_fits
from neuroexapt.engine.config import RunConfig
from neuroexapt.engine.run import command_line, how_to_resume
from neuroexapt.report.text import percent, points
from neuroexapt.spaces import BUILT_IN

Z = 1.96
"""Standard deviations on both sides of a normal distribution's mean that hold 95 % of it."""
NOT_TRAINED = (
    " The network was not trained after the search: its weights come from a search network that had all "
    "candidates, so these figures say nothing of the architecture."
)


def interval(share: float, count: int) -> tuple[float, float]:
    """Where 95 of 100 such tests would have the true share, of which ``count`` examples show ``share``.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    shrink = 1 / (1 + Z**2 / count)
    centre = shrink * (share + Z**2 / (2 * count))
    half = shrink * Z * sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return centre - half, centre + half


def chance_difference(first: float, second: float, count: int) -> float:
    """Difference that two shares of ``count`` examples exceed by chance in 5 of 100 tests."""
    return Z * sqrt((first * (1 - first) + second * (1 - second)) / count)


def how_good(result: Mapping[str, Any], *, is_trained: bool = True) -> str:
    """With the uncertainty that a test of so many examples has, and what takes no network."""
    count, accuracy = result["test_examples"], result["test_accuracy"]
    low, high = interval(accuracy, count)
    hit = ", which means that the next item is among the ten best" if "test_ndcg" in result else ""
    return (
        f"{percent(accuracy)} of {count:,} test examples are right{hit}. With a certainty of 95 %, of all "
        f"such examples {percent(low)} to {percent(high)} would be. To answer {result['baseline']} every "
        f"time would be right for {percent(result['baseline_accuracy'])}."
        f"{'' if is_trained else NOT_TRAINED}"
    )


def worth_of_inheriting(inherited: float, scratch: float, count: int) -> str:
    """Whether the difference to a training from scratch, on ``count`` examples, says anything."""
    least = chance_difference(inherited, scratch, count)
    verdict = "can be chance" if abs(inherited - scratch) < least else "is more than chance explains"
    return f"With {count:,} test examples, {points(inherited - scratch)} points {verdict}."


def next_command(
    command: str, config: Mapping[str, Any], result: Mapping[str, Any], run: Path
) -> tuple[str, str] | None:
    """What to do after ``command`` made ``run``, and the command for that; None where the space is one that
    only the user's own code knows. Without a ``result`` the run is not finished.
    """
    if config.get("space") not in BUILT_IN:
        return None
    if not result:
        return "Go on from the last checkpoint", how_to_resume(command, run, config["space"])
    if command == "evaluate":
        return "Take the network to where it is used", command_line("export", run)
    return "Train the genotype from scratch at full size, next to others", command_line(
        "evaluate", "--genotype", run, *_data_options(config), *_comparison(config, result)
    )


def _comparison(config: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    if config["dataset"].startswith("seq:"):
        return ["--seeds", "3", "--controls", "random"]
    too_small = "input_size" in result and not auxiliary_fits(result["input_size"])
    head = ["--no-auxiliary"] if too_small else []
    return ["--recipe", "fast", *head, "--seeds", "3", "--controls", "random,resnet18"]


def _data_options(config: Mapping[str, Any]) -> list[str]:
    """What another run on the same data must be told."""
    options = ["--dataset", config["dataset"]]
    for name in ("space", "data_root", "image_size", "max_length"):
        default = RunConfig.__dataclass_fields__[name].default
        value = config.get(name, default)
        if str(value) != str(default):
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options
