"""Are the cells that searches find better than random ones? Strategies over seeds, each cell trained alike.

``python benchmarks/darts_cells.py [--dataset cifar10 --data-root DIR] --runs FOLDER`` searches in the space
``darts`` with every strategy and seed, trains the network of every genotype from scratch by the fast recipe,
and by the same recipe as many random genotypes, and torchvision's ResNet-18 from every seed; ``--jobs`` runs
at a time, shared out over the GPUs. That takes hours. It takes a fraction with smaller networks, as with
``--training-options layers=8 init-channels=24 epochs=20``. What the ``--limit`` cuts short goes on when the
script is started again with the same folder, so it can be done in pieces; figures are recorded when all is
there. The runs also serve a call with one more strategy after the others.

``accuracy`` is that of the test pictures after the last epoch, ``search_s`` and ``train_s`` are the seconds
of the phases over all pieces, of a GPU that as many as ``runs_per_device`` shared. The case's name tells the
data, the size of the trained networks, their epochs and the options of the searches; all options are kept
beside the genotypes. ``--draw`` only draws what the results hold, a panel a case.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _harness import RESULTS, Results, Spread, open_results, results_parser
from _processes import Run, carry_out_all, read_records

from neuroexapt.spaces import get_space
from neuroexapt.strategies import STRATEGIES

STRATEGIES_COMPARED = ("darts", "drnas", "beta-darts", "p-darts")
RANDOM, RESNET = "random", "resnet18"
FIGURE = RESULTS.parent.parent / "docs" / "images" / "darts_cells.png"
LAYERS = 20
"""Of the networks that random genotypes are drawn for; what is drawn does not depend on it."""


def search_runs(arguments: argparse.Namespace) -> Iterator[Run]:
    for seed in range(arguments.seeds):
        for strategy in arguments.strategies:
            own = f"--strategy={strategy}", f"--seed={seed}", "--train-epochs=0", "--no-control"
            more = more_options(arguments, arguments.search_options)
            yield Run("search", arguments.runs / f"search-{strategy}-{seed}", (*own, *more))


def training_runs(arguments: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """By the name under which figures are recorded; the first strategy's train the ResNet beside theirs."""
    for name, seed, genotype in genotypes(arguments):
        controls = [f"--controls={RESNET}"] if name == arguments.strategies[0] else []
        own = "--recipe=fast", f"--genotype={genotype}", f"--seed={seed}", *controls
        more = more_options(arguments, arguments.training_options)
        yield name, Run("evaluate", arguments.runs / f"train-{name}-{seed}", (*own, *more))


def genotypes(arguments: argparse.Namespace) -> Iterator[tuple[str, int, Path]]:
    """Those that were found, then random ones, as many as the seeds of all strategies."""
    for seed in range(arguments.seeds):
        for strategy in arguments.strategies:
            yield strategy, seed, arguments.runs / f"search-{strategy}-{seed}" / "genotype.json"
    for number in range(arguments.seeds * len(arguments.strategies)):
        path = arguments.runs / f"random-{number}.json"
        drawn = get_space("darts").random_genotype(torch.Generator().manual_seed(number), LAYERS)
        path.write_text(json.dumps(drawn.to_dict()))
        yield RANDOM, number, path


def more_options(arguments: argparse.Namespace, chosen: Sequence[str]) -> list[str]:
    given = {"dataset": arguments.dataset, "data-root": arguments.data_root}
    data = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return data + [f"--{option}" for option in chosen]


def describe(run: Run) -> str:
    return f"test accuracy {result_of(run)['test_accuracy']:.2%}" if run.is_done else "goes on next time"


def result_of(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "result.json").read_text())


def case_of(arguments: argparse.Namespace, training: Run) -> str:
    """Not the same for trainings of another size or length, nor for searches of other options."""
    config = json.loads((training.folder / "config.json").read_text())
    size = f"l{config['layers']}-c{config['init_channels']}-{config['epochs']}epochs"
    of_search = (f"search-{option}" for option in arguments.search_options)
    return "-".join([Path(arguments.dataset).stem, size, *of_search])


def record(
    results: Results,
    arguments: argparse.Namespace,
    searches: Sequence[Run],
    trainings: Sequence[tuple[str, Run]],
) -> None:
    case = case_of(arguments, trainings[0][1])
    options = {"search_options": arguments.search_options, "training_options": arguments.training_options}
    found: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, list[Run]] = {}
    for name, run in trainings:
        found.setdefault(name, []).append(result_of(run))
        runs.setdefault(name, []).append(run)
    runs[RESNET] = runs[trainings[0][0]]
    found[RESNET] = [result["controls"][RESNET] for result in found[trainings[0][0]]]
    for name, of_name in found.items():
        metrics = {"accuracy": "test_accuracy", "parameters": "parameters", "train_s": "training_seconds"}
        for metric, key in metrics.items():
            add(results, case, name, metric, [result[key] for result in of_name], runs[name])
        made = [result.get("genotype") for result in of_name]
        commits = [run.commits for run in runs[name]]
        results.record(case, name, "as shipped", "genotypes", values=made, commits=commits, **options)
    for run in searches:
        strategy = json.loads((run.folder / "config.json").read_text())["strategy"]
        add(results, case, strategy, "search_s", [result_of(run)["seconds_by_phase"]["search"]], [run])
    print(verdict(found))


def add(
    results: Results, case: str, name: str, metric: str, values: Sequence[float], runs: Sequence[Run]
) -> None:
    spread = Spread.of(values) if len(values) > 1 else Spread.exactly(values[0])
    figures = {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
        "runs_per_device": [run.per_device for run in runs],
    }
    results.record(case, name, "as shipped", metric, **asdict(spread), **figures)
    print(f"{case:28} {name:13} {metric:10} {figures['mean']:12.4f}  {values}", flush=True)


def verdict(found: dict[str, list[dict[str, Any]]]) -> str:
    """Which means lie above that of random genotypes by more than its deviation, and above the ResNet's."""
    accuracies = {name: [result["test_accuracy"] for result in of_name] for name, of_name in found.items()}
    of_random = accuracies.pop(RANDOM)
    bar = statistics.fmean(of_random) + (statistics.stdev(of_random) if len(of_random) > 1 else 0.0)
    of_resnet = statistics.fmean(accuracies.pop(RESNET))
    lines = [f"random genotypes' mean and deviation end at {bar:.2%}, the ResNet's mean is {of_resnet:.2%}"]
    for name, values in accuracies.items():
        mean = statistics.fmean(values)
        beaten = [rival for rival, other in ((RANDOM, bar), (RESNET, of_resnet)) if mean > other]
        lines.append(f"{name}: {mean:.2%}, above {' and '.join(beaten) or 'neither'}")
    return "\n".join(lines)


def draw(path: Path, figure_path: Path) -> None:
    """A panel a case: a dot a training, a line a mean, a strip of what random genotypes reach."""
    import matplotlib
    from matplotlib.figure import Figure

    from neuroexapt.report.style import RC_PARAMS

    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for line in read_records(path):
        if line["metric"] == "accuracy":
            cases.setdefault(line["case"], {})[line["implementation"]] = line
    if not cases:
        print("nothing to draw: the results hold no accuracies")
        return
    with matplotlib.rc_context(RC_PARAMS):
        figure = Figure(figsize=(7.5, 4 * len(cases)), layout="constrained")
        panels = figure.subplots(len(cases), squeeze=False)[:, 0]
        for axes, (case, latest) in zip(panels, cases.items(), strict=True):
            draw_case(axes, latest)
            axes.set_title(f"cells trained alike, by the strategy that found them\n{case}")
        figure.savefig(figure_path, dpi=160)


def draw_case(axes: Any, latest: dict[str, dict[str, Any]]) -> None:
    from matplotlib.ticker import PercentFormatter

    from neuroexapt.report.style import ACCENT, CONTRAST, MUTED

    for place, (name, line) in enumerate(latest.items()):
        colour = {RANDOM: MUTED, RESNET: CONTRAST}.get(name, ACCENT)
        axes.plot([place] * len(line["values"]), line["values"], "o", color=colour, alpha=0.7)
        axes.plot([place - 0.25, place + 0.25], [line["mean"]] * 2, color=colour, linewidth=2)
    if RANDOM in latest:
        mean, deviation = latest[RANDOM]["mean"], latest[RANDOM]["deviation"] or 0.0
        axes.axhspan(mean - deviation, mean + deviation, color=MUTED, alpha=0.15, linewidth=0)
    axes.set_xticks(range(len(latest)), list(latest))
    axes.set(ylabel="test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))


def arguments_from_command_line() -> argparse.Namespace:
    parser = results_parser("darts_cells", __doc__)
    parser.add_argument("--dataset", default="cifar10", help="of neuroexapt search and evaluate")
    parser.add_argument("--data-root", type=Path, help="of neuroexapt search and evaluate")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES_COMPARED, choices=STRATEGIES)
    parser.add_argument("--seeds", type=int, default=2, help="searches of each strategy")
    parser.add_argument("--search-options", nargs="+", default=[], help="of neuroexapt search, undashed")
    parser.add_argument("--training-options", nargs="+", default=[], help="of neuroexapt evaluate, undashed")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one for each GPU)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds until all are interrupted")
    parser.add_argument("--runs", type=Path, help="run folders, also those of a call before")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="file to draw to")
    parser.add_argument("--draw", action="store_true", help="only draw what the results hold")
    arguments = parser.parse_args()
    if arguments.runs is None and not arguments.draw:
        parser.error("give the folder of the --runs, or --draw what the results hold")
    return arguments


def measure(arguments: argparse.Namespace) -> bool:
    """Whether all runs came to their end and were recorded."""
    arguments.runs.mkdir(parents=True, exist_ok=True)
    gpus, deadline = torch.cuda.device_count(), time.monotonic() + arguments.limit
    results = open_results("darts_cells", arguments, "cuda" if gpus else "cpu")
    jobs = arguments.jobs or max(1, gpus)
    searches = list(search_runs(arguments))
    if not carry_out_all(searches, jobs, deadline, describe, results.commit):
        return False
    trainings = list(training_runs(arguments))
    if not carry_out_all([run for _, run in trainings], jobs, deadline, describe, results.commit):
        return False
    record(results, arguments, searches, trainings)
    return True


def main() -> int:
    arguments = arguments_from_command_line()
    if not arguments.draw and not measure(arguments):
        print("not all runs have ended: start again with the same --runs", file=sys.stderr)
        return 1
    draw(arguments.out, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
