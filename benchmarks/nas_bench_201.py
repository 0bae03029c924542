"""What do searches on nas-bench-201 find, and how fast? Strategies over seeds, by a table of true accuracies.

``python benchmarks/nas_bench_201.py --table TABLE [--dataset cifar10 --data-root DIR]`` runs ``neuroexapt
search`` for every strategy and seed, each in a process of its own and ``--jobs`` at a time, shared out over
the GPUs; appends accuracies and seconds to the results; lets random search and regularised evolution ask the
same table; and draws all of it, as a picture and as the table of ``docs/spaces.md``. ``--draw`` only draws.
What the ``--limit`` cuts short is recorded as such.

``--collect`` records the finished searches of ``--runs``, wherever they were carried out, and draws. One that
was not started by this script needs RUNS/STRATEGY-SEED.processes.jsonl, a line ``{"commit": "1a2b3c4",
"per_device": 2}`` for each of its processes: its code, and how many searches shared its GPU.

``accuracy`` is the table's test accuracy on CIFAR-10 of the genotype that was found, ``wall_s`` its processes
from start to end, ``search_s`` the epochs of the search, validation included, ``searches_per_device`` the
most that ran at a time on the GPU of each. ``commits`` beside the genotypes are those of the code that
searched: a search that broke off goes on in its folder of ``--runs``.
"""

import argparse
import json
import math
import operator
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, compress
from pathlib import Path
from typing import Any

import torch
from _harness import RESULTS, Results, Spread, open_results, results_parser
from _processes import Run, carry_out_all, read_records

from neuroexapt.benchmarks import Table, load_table, random_search, regularized_evolution
from neuroexapt.core.genotypes import CellGenotype
from neuroexapt.engine.config import SearchConfig
from neuroexapt.spaces.nas_bench_201 import id_of_genotype
from neuroexapt.strategies import STRATEGIES, published_settings

PUBLISHED = {
    "darts": 0.5430,
    "gdas": 0.936,
    "pc-darts": 0.934,
    "drnas": 0.9436,
    "beta-darts": 0.9436,
    "lambda-darts": 0.9436,
}
"""Mean test accuracies on CIFAR-10, with the strategies' own settings."""
OPTIMUM = 0.9437
DISCRETE = {"random search": random_search, "regularised evolution": regularized_evolution}
QUERIES = (1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100, 140, 200, 300, 500)
DISCRETE_SEEDS = 100
METRIC = "table_cifar10_test"
DOCUMENT = RESULTS.parent.parent / "docs" / "spaces.md"
FIGURE = DOCUMENT.parent / "images" / "nas_bench_201.png"
MARKER = "<!-- table: nas_bench_201 -->"
SHARED = "†"
STRATEGY_COLOURS = {"sep_conv", "contrast", "skip", "accent", "dil_conv", "avg_pool", "conv", "max_pool"}
"""Of the report's theme."""


@dataclass(frozen=True)
class Search:
    """A search by one strategy with one seed."""

    strategy: str
    seed: int
    run: Run

    @property
    def folder(self) -> Path:
        return self.run.folder

    def curve(self) -> tuple[list[float], list[float]]:
        """Seconds at the end of each epoch so far, and the true accuracy of its genotype, at the end that of
        what was found: by a selection, or before a stop.
        """
        metrics, timing = (read_records(self.folder / f"{name}.jsonl") for name in ("metrics", "timing"))
        seconds = [record["seconds"] for record in timing if record["phase"] == "search"]
        accuracies = [record[METRIC] for record in metrics if METRIC in record]
        if self.run.is_done:
            accuracies[-1] = self.result()[METRIC]
        return list(accumulate(seconds)), accuracies

    def describe(self) -> str:
        _, accuracies = self.curve()
        return f"{accuracies[-1]:.2%} after {len(accuracies)} epochs" if accuracies else "no epoch done"

    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    def genotype_id(self) -> int:
        return id_of_genotype(CellGenotype.from_dict(json.loads((self.folder / "genotype.json").read_text())))


def record_searches(results: Results, searches: Sequence[Search]) -> None:
    """Of each strategy its finished seeds together."""
    of_strategy: dict[str, list[Search]] = {}
    for search in searches:
        if search.run.is_done:
            of_strategy.setdefault(search.strategy, []).append(search)
    for done in of_strategy.values():
        record_strategy(results, done)


def record_strategy(results: Results, searches: Sequence[Search]) -> None:
    times, accuracies = zip(*(search.curve() for search in searches), strict=True)
    strategy, config = searches[0].strategy, searches[0].config()
    case = f"{Path(config['dataset']).stem}-b{config['batch_size']}-{config['epochs']}epochs"
    shared = {"searches_per_device": [search.run.per_device for search in searches]}
    where = provenance(searches)

    def add(metric: str, unit: str, values: list[float]) -> None:
        spread = Spread.of(values) if len(values) > 1 else Spread.exactly(values[0])
        mean = statistics.fmean(values)
        figures = {"unit": unit, **asdict(spread), "mean": mean, "values": values, **shared, **where}
        results.record(case, strategy, "as shipped", metric, **figures)
        print(f"{case:28} {strategy:13} {metric:10} {mean:10.4f} {unit}  {values}", flush=True)

    add("accuracy", "share", [curve[-1] for curve in accuracies])
    wall_seconds = [search.run.seconds for search in searches]
    if math.isfinite(sum(wall_seconds)):
        add("wall_s", "s", wall_seconds)
    add("search_s", "s", [curve[-1] for curve in times])
    genotypes = [search.genotype_id() for search in searches]
    made = {"seeds": [search.seed for search in searches], "commits": [s.run.commits for s in searches]}
    results.record(case, strategy, "as shipped", "genotypes", values=genotypes, **made, **where)
    curves = {"values": accuracies, "seconds": times}
    results.record(case, strategy, "as shipped", "accuracy_curve", **curves, **shared, **where)


def provenance(searches: Sequence[Search]) -> dict[str, str | None]:
    """Where the searches ran, which need not be here. Their runs keep no version of Triton."""
    made = [search.result() for search in searches]
    named = {
        "device": [result["device"] for result in made],
        **{name: [result["versions"][name] for result in made] for name in ("torch", "cuda")},
    }
    several = {name: ", ".join(dict.fromkeys(filter(None, values))) for name, values in named.items()}
    return {**several, "triton": None}


def record_cut_short(results: Results, searches: Sequence[Search], dataset: str) -> None:
    for search in searches:
        if not search.run.is_done:
            status = f"seed {search.seed}: cut short by the limit, {search.describe()}"
            results.add_status(dataset, search.strategy, "as shipped", status)


def record_discrete(results: Results, table: Table) -> None:
    """Test accuracy of what searches without gradients hold best, by the number of their queries."""
    for name, search in DISCRETE.items():
        found = [search(table, QUERIES[-1], seed=seed) for seed in range(DISCRETE_SEEDS)]
        accuracies = [[table.query(best[count - 1])["cifar10_test"] for best in found] for count in QUERIES]
        spreads = [Spread.of(values) for values in accuracies]
        results.record(
            "queries", name, "table", "accuracy_by_queries", queries=QUERIES, runs=DISCRETE_SEEDS,
            values=[statistics.fmean(values) for values in accuracies],
            p20=[spread.p20 for spread in spreads], p80=[spread.p80 for spread in spreads],
        )  # fmt: skip
        print(f"{name}: {statistics.fmean(accuracies[-1]):.2%} after {QUERIES[-1]} queries", flush=True)


def write_table(document: str, lines: Sequence[dict[str, Any]]) -> str:
    """``document`` with its table made anew."""
    pattern = re.compile(rf"({MARKER}\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + _table(lines) + match[2], document)


def _table(lines: Sequence[dict[str, Any]]) -> str:
    """Every strategy's last record next to what was published, the most accurate first; then the others."""
    of_metric: defaultdict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        of_metric[line["metric"]][line["implementation"]] = line
    searched = sorted(of_metric["accuracy_curve"].values(), key=_mean_accuracy, reverse=True)
    rows = [
        ("strategy", "found, mean", "each seed", "epochs", "seconds", "published", "GPU", "commits"),
        ("---", *["---:"] * 5, "---", "---"),
        *(_row(record, of_metric["genotypes"][record["implementation"]]) for record in searched),
        *map(_discrete_row, of_metric["accuracy_by_queries"].values()),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows).replace("%", " %")


def _discrete_row(record: dict[str, Any]) -> tuple[str, ...]:
    trained = f"{record['queries'][-1]} trained networks"
    mean, seeds = f"{record['values'][-1]:.2%}", f"{record['runs']} seeds"
    return (record["implementation"], mean, seeds, "", trained, "", "", "")


def _row(record: dict[str, Any], genotypes: dict[str, Any]) -> tuple[str, ...]:
    strategy = record["implementation"]
    commits = genotypes.get("commits") or [[genotypes["commit"][:7]]]
    return (
        f"`{strategy}`",
        f"{_mean_accuracy(record):.2%}",
        ", ".join(f"{100 * curve[-1]:.2f}" for curve in record["values"]),
        _epochs(record),
        ", ".join(
            f"{seconds[-1]:,.0f}{SHARED * is_shared}"
            for seconds, is_shared in zip(record["seconds"], was_shared(record), strict=True)
        ),
        f"{PUBLISHED[strategy]:.2%}" if strategy in PUBLISHED else "",
        record["device"],
        ", ".join(dict.fromkeys(chain.from_iterable(commits))),
    )


def _epochs(record: dict[str, Any]) -> str:
    """How many, and for how many published ones where these are others."""
    epochs = record["case"].rpartition("-")[2].removesuffix("epochs")
    published = published_settings(record["implementation"], "nas-bench-201").get(
        "epochs", SearchConfig.epochs
    )
    return epochs if int(epochs) == published else f"{epochs} for {published}"


def _mean_accuracy(record: dict[str, Any]) -> float:
    return statistics.fmean(curve[-1] for curve in record["values"])


def was_shared(record: dict[str, Any]) -> list[bool]:
    """Of each search, whether others ran on its GPU. Early records have one figure for all."""
    searches = record["searches_per_device"]
    each = searches if isinstance(searches, list) else [searches] * len(record["values"])
    return [count > 1 for count in each]


def draw(lines: Sequence[dict[str, Any]], figure_path: Path) -> None:
    """Accuracy against seconds of every strategy's last record, and against queries without gradients."""
    import matplotlib
    from matplotlib.figure import Figure

    from neuroexapt.report.style import INK, RC_PARAMS

    with matplotlib.rc_context(RC_PARAMS):
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _draw_searches(left, [line for line in lines if line["metric"] == "accuracy_curve"])
        _draw_discrete(right, [line for line in lines if line["metric"] == "accuracy_by_queries"])
        for axes in (left, right):
            best = f"best cell {OPTIMUM:.2%}"
            axes.axhline(OPTIMUM, color=INK, linestyle="dashed", linewidth=1, label=best)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        figure.savefig(figure_path, dpi=160)


def _draw_searches(axes: Any, records: list[dict[str, Any]]) -> None:
    """Seeds thin, dotted where they shared their GPU; their mean bold, against the seconds of those that did
    not, if there are any; what was published at the right edge."""
    from neuroexapt.report.style import THEME

    colours = [colour for name, (colour, _) in THEME.items() if name in STRATEGY_COLOURS]
    axes.set(
        title="searches by gradient (◆: as published)",
        xlabel="seconds (dotted: several searches at a time on the GPU)",
        ylabel="test accuracy on CIFAR-10, by the table",
    )
    _spread_high_accuracies(axes)
    latest = {record["implementation"]: record for record in records}
    for (strategy, record), colour in zip(latest.items(), colours, strict=False):
        shared = was_shared(record)
        for seconds, accuracies, is_shared in zip(record["seconds"], record["values"], shared, strict=True):
            style = "dotted" if is_shared else "solid"
            axes.plot(seconds, accuracies, color=colour, linewidth=0.6, alpha=0.5, linestyle=style)
        alone = list(compress(record["seconds"], map(operator.not_, shared)))
        mean_seconds, means = (
            [statistics.fmean(epoch) for epoch in zip(*curves, strict=False)]
            for curves in (alone or record["seconds"], record["values"])
        )
        style = "solid" if alone else "dotted"
        label = f"{strategy}, {_epochs(record)} epochs: {means[-1]:.2%}"
        axes.plot(mean_seconds, means, color=colour, linestyle=style, label=label)
        if strategy in PUBLISHED:
            mark = {"marker": "D", "markersize": 5, "clip_on": False, "transform": axes.get_yaxis_transform()}
            axes.plot(1, PUBLISHED[strategy], color=colour, **mark)


def _spread_high_accuracies(axes: Any) -> None:
    """An axis on which errors, not accuracies, are logarithmic."""
    import numpy as np
    from matplotlib.ticker import PercentFormatter

    axes.set_yscale(
        "function", functions=(lambda a: -np.log(np.maximum(1 - a, 1e-3)), lambda y: 1 - np.exp(-y))
    )
    axes.set_ylim(0.5, 0.95)
    axes.set_yticks((0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.93, 0.94))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _draw_discrete(axes: Any, records: list[dict[str, Any]]) -> None:
    """Means, and the middle 60 % of the seeds."""
    from neuroexapt.report.style import CONTRAST, MUTED

    axes.set(title="searches without gradients", xlabel="networks trained for 12 epochs")
    axes.set_xscale("log")
    latest = {record["implementation"]: record for record in records}
    for (name, record), colour in zip(latest.items(), (MUTED, CONTRAST), strict=False):
        queries, means = record["queries"], record["values"]
        axes.fill_between(queries, record["p20"], record["p80"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(queries, means, color=colour, label=f"{name} {means[-1]:.2%}")


def searches_of(arguments: argparse.Namespace, folder: Path) -> Iterator[Search]:
    """Every strategy once before any has its second seed, in case that time runs out."""
    options = [f"--{option}" for option in arguments.options]
    for name in ("dataset", "data_root", "table", "epochs", "batch_size"):
        if getattr(arguments, name) is not None:
            options.append(f"--{name.replace('_', '-')}={getattr(arguments, name)}")
    for seed in range(arguments.seeds):
        for strategy in arguments.strategies:
            own = ("--space=nas-bench-201", "--train-epochs=0", f"--strategy={strategy}", f"--seed={seed}")
            yield Search(strategy, seed, Run("search", folder / f"{strategy}-{seed}", (*own, *options)))


def arguments_from_command_line() -> argparse.Namespace:
    parser = results_parser("nas_bench_201", __doc__)
    parser.add_argument("--table", type=Path, help="CSV file, or files of NATS-Bench")
    parser.add_argument("--dataset", default="cifar10", help="of neuroexapt search")
    parser.add_argument("--data-root", type=Path, help="of neuroexapt search")
    default = [name for name in PUBLISHED if name in STRATEGIES]
    parser.add_argument("--strategies", nargs="*", default=default, choices=[*STRATEGIES, []])
    parser.add_argument("--seeds", type=int, default=3, help="searches of each strategy")
    parser.add_argument("--epochs", type=int, help="of each search (default: as published)")
    parser.add_argument("--batch-size", type=int, help="of each search (default: as published)")
    parser.add_argument("--options", nargs="+", default=[], help="more of neuroexapt search, without dashes")
    parser.add_argument("--jobs", type=int, help="searches at a time (default: one for each GPU)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all searches")
    parser.add_argument("--runs", type=Path, help="keep the run folders here (default: a temporary folder)")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="file to draw to")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="file whose table is made anew")
    parser.add_argument("--collect", action="store_true", help="only record what --runs holds, and draw")
    parser.add_argument("--draw", action="store_true", help="only draw what the results hold")
    arguments = parser.parse_args()
    if arguments.collect and arguments.runs is None:
        parser.error("give the --runs to collect")
    if arguments.table is None and not (arguments.draw or arguments.collect):
        parser.error("give the --table, or --draw what the results hold")
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    gpus = torch.cuda.device_count()
    results = open_results("nas_bench_201", arguments, "cuda" if gpus else "cpu")
    searches = list(searches_of(arguments, folder))
    if arguments.collect:
        record_searches(results, searches)
        return
    record_discrete(results, load_table(arguments.table))
    jobs = arguments.jobs or max(1, gpus)
    of_run = {search.run: search for search in searches}
    deadline = time.monotonic() + arguments.limit
    carry_out_all(list(of_run), jobs, deadline, lambda run: of_run[run].describe(), results.commit)
    record_searches(results, searches)
    record_cut_short(results, searches, arguments.dataset)


def main() -> int:
    arguments = arguments_from_command_line()
    if not arguments.draw:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.runs or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            measure(arguments, folder)
    lines = read_records(arguments.out)
    draw(lines, arguments.figure)
    arguments.document.write_text(write_table(arguments.document.read_text(), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
