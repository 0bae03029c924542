"""Does a fused search find what the module-by-module search finds? α step by step, and genotypes over seeds.

``python benchmarks/search_fidelity.py`` searches scikit-learn's digits, enlarged to 16x16 pixels, in every
run of ``RUNS`` with the same initial weights and batches, appends α's distance from the reference after
each step and the genotypes of all seeds to the results, and draws both; ``--draw`` only draws.

The yardstick is the reference itself with the pictures of each batch in another order: mathematically the
same search, whose sums are rounded differently. Rounding grows from step to step, since relus open or not and
Adam follows the sign of small gradients; a fused search is faithful where it stays as close as that.
"""

import argparse
import collections
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from _harness import RESULTS, Results, Spread, open_results, results_parser
from _search import IMPLEMENTATIONS, Network, make_step, take_step
from torch import Tensor

from neuroexapt.core.genotypes import Genotype
from neuroexapt.data import Loader, load_dataset, make_loader, split_indices
from neuroexapt.engine.captured import capture
from neuroexapt.engine.config import SearchConfig, make_config
from neuroexapt.engine.training import cosine, set_learning_rate
from neuroexapt.spaces import get_space

CURVE_STEPS = 100
PUBLISHED_RATES = {"learning_rate": 0.025, "arch_learning_rate": 3e-4}
"""Of the search whose first steps are compared; at the higher ones for digits α soon depends on rounding."""
FIGURE = RESULTS.parent.parent / "docs" / "images" / "search_fidelity.png"


class Run(NamedTuple):
    """A way to run the search, with the pictures of each batch moved on by ``roll`` places."""

    label: str
    implementation: str
    precision: str = "float32"
    roll: int = 0

    @property
    def needs_gpu(self) -> bool:
        return self.precision == "tf32" or IMPLEMENTATIONS[self.implementation].tier == "ext"


RUNS = {
    "reference": Run("reference", "eager-graph"),
    "rolled-5": Run("reference, another order of sums", "eager-graph", roll=5),
    "rolled-32": Run("reference, a third order of sums", "eager-graph", roll=32),
    "reference-tf32": Run("reference, TF32", "eager-graph", "tf32"),
    "plan": Run("fused, PyTorch", "plan-graph"),
    "ext": Run("fused, CUDA C++", "ext-graph"),
    "ext-tf32": Run("fused, CUDA C++, TF32", "ext-graph", "tf32"),
}


@dataclass(frozen=True)
class Task:
    """The search that every run repeats."""

    network: Network
    config: SearchConfig
    device: torch.device

    @property
    def name(self) -> str:
        return f"digits{self.network.side}-c{self.network.channels}"

    def loaders(self) -> tuple[Loader, Loader]:
        """Batches for w and for α."""
        data, config = load_dataset("digits", image_size=self.network.side), self.config
        indices = split_indices(data.train.labels, config.train_portion, config.seed)
        train, valid = (
            make_loader(
                data.train,
                part,
                batch_size=config.batch_size,
                device=self.device,
                seed=config.seed + stream,
                mean=data.mean,
                std=data.std,
                augmentation=data.augmentation,
            )
            for stream, part in enumerate(indices)
        )
        return train, valid


def search(task: Task, run: Run) -> Iterator[dict[str, Tensor]]:
    """Yields α, before the first step and after each."""
    torch.manual_seed(task.config.seed)
    supernet = task.network.supernet(task.device)
    implementation = IMPLEMENTATIONS[run.implementation]
    implementation.set_up(supernet, run.precision)
    step = make_step(supernet, task.config)
    take = take_step(step)
    if implementation.captured:
        take = capture(take, task.device)
    yield {cell: alpha.detach().cpu().clone() for cell, alpha in supernet.alphas.items()}
    with implementation.in_force(run.precision, task.device):
        for batches in schedule(task, step.weight_optimizer):
            take(*(tensor.roll(run.roll, 0) for tensor in batches))
            yield {cell: alpha.detach().cpu().clone() for cell, alpha in supernet.alphas.items()}


def schedule(task: Task, optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """The training and validation batches of all steps, at the learning rate of their epoch."""
    config, (train_loader, valid_loader) = task.config, task.loaders()
    valid = valid_loader.forever()
    for epoch in range(config.epochs):
        rate = cosine(epoch, config.epochs, config.learning_rate, config.learning_rate_min)
        set_learning_rate(optimizer, rate)
        for batch in train_loader.epoch(epoch):
            yield [*batch, *next(valid)]


class Outcome(NamedTuple):
    """α [1 + steps, entries] along the first steps, and the genotypes of whole searches."""

    alphas: Tensor
    genotypes: list[Genotype]


def outcome(run: Run, first_steps: Task, searches: Sequence[Task]) -> Outcome:
    history = itertools.islice(search(first_steps, run), 1 + CURVE_STEPS)
    rows = [torch.cat([alpha.flatten() for alpha in alphas.values()]) for alphas in history]
    return Outcome(torch.stack(rows), [found(task, run) for task in searches])


def found(task: Task, run: Run) -> Genotype:
    """The genotype at the end of the search."""
    (alphas,) = collections.deque(search(task, run), maxlen=1)
    return get_space(task.config.space).derive({cell: alpha.softmax(-1) for cell, alpha in alphas.items()})


def record(results: Results, case: str, name: str, found: Outcome, reference: Outcome) -> None:
    """The figures of a run against those of the reference, and the curves that are drawn."""

    def add(metric: str, unit: str, value: float) -> None:
        results.add(case, name, RUNS[name].precision, metric, unit, Spread.exactly(value))

    origin = reference.alphas if name != "reference" else reference.alphas[0]
    curve = (found.alphas - origin).abs().amax(dim=1)[1:].tolist()
    operations = chosen_operations(found.genotypes)
    results.record(case, name, RUNS[name].precision, "alpha_difference_curve", values=curve)
    results.record(case, name, RUNS[name].precision, "operations", values=operations)
    add("alpha_difference", "absolute", curve[-1])
    add("same_edges", "share", same_edges(found.genotypes, reference.genotypes))
    add("operations_distance", "share", distance(operations, chosen_operations(reference.genotypes)))


def chosen_operations(genotypes: Sequence[Genotype]) -> dict[str, float]:
    """The share of each operation among all edges of all genotypes."""
    operations = [op for genotype in genotypes for op, _ in (*genotype.normal, *genotype.reduce)]
    return {op: count / len(operations) for op, count in sorted(collections.Counter(operations).items())}


def same_edges(ones: Sequence[Genotype], others: Sequence[Genotype]) -> float:
    """The share of chosen edges, operation and all, that the same seed chose in both."""
    pairs = [
        (set(one.edges(cell)), set(other.edges(cell)))
        for one, other in zip(ones, others, strict=True)
        for cell in ("normal", "reduce")
    ]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def distance(one: dict[str, float], other: dict[str, float]) -> float:
    """Total variation: the share of choices that would have to change to turn one into the other."""
    return sum(abs(one.get(op, 0.0) - other.get(op, 0.0)) for op in one | other) / 2


def draw(path: Path, figure_path: Path) -> None:
    """The last curves and choices of every run on the device that measured last."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    from neuroexapt.report.style import ACCENT, CONTRAST, INK, MUTED, RC_PARAMS, THEME

    colours = dict(zip(RUNS, (INK, MUTED, MUTED, INK, THEME["conv"][0], ACCENT, CONTRAST), strict=True))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["device"] == lines[-1]["device"]]
    curves, operations = (
        {line["implementation"]: line["values"] for line in lines if line["metric"] == metric}
        for metric in ("alpha_difference_curve", "operations")
    )
    with matplotlib.rc_context(RC_PARAMS):
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.set(title="α, largest distance from the reference", xlabel="step", yscale="log")
        left.yaxis.set_major_formatter("{x:.0e}")
        right.set(title="operations chosen, over all seeds", ylabel="share of edges")
        names = sorted(set().union(*operations.values()))
        width = 0.8 / len(operations)
        for number, (run, shares) in enumerate(operations.items()):
            moved = " (from its start)" if run == "reference" else ""
            line = "dotted" if RUNS[run].precision == "tf32" else "solid"
            steps = range(1, 1 + len(curves[run]))
            left.plot(steps, curves[run], color=colours[run], linestyle=line, label=RUNS[run].label + moved)
            places = np.arange(len(names)) + (number - (len(operations) - 1) / 2) * width
            heights = [shares.get(name, 0.0) for name in names]
            right.bar(places, heights, 0.9 * width, color=colours[run], alpha=0.5 if line == "dotted" else 1)
        right.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
        right.grid(False, axis="x")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        figure.savefig(figure_path, dpi=160)


def task_from(arguments: argparse.Namespace, seed: int = 0, **settings: float) -> Task:
    """A search with the settings that a search of digits has, but for ``settings``."""
    network = Network(
        layers=arguments.layers, channels=arguments.channels, in_channels=1, side=arguments.side
    )
    overrides = {"dataset": "digits", "epochs": arguments.epochs, "batch_size": arguments.batch, "seed": seed}
    return Task(network, make_config(SearchConfig, overrides | settings), torch.device(arguments.device))


def arguments_from_command_line() -> argparse.Namespace:
    parser = results_parser("search_fidelity", __doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS, help="besides the reference")
    parser.add_argument("--seeds", type=int, default=8, help="searches of each run")
    parser.add_argument("--epochs", type=int, default=15, help="of each search")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--side", type=int, default=16, help="pixels a side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--figure", type=Path, default=FIGURE, help="file to draw to")
    parser.add_argument("--draw", action="store_true", help="only draw what the results hold")
    return parser.parse_args()


def measure(results: Results, arguments: argparse.Namespace) -> None:
    """Every run that the device allows, each recorded as soon as it is through."""
    first_steps = task_from(arguments, **PUBLISHED_RATES)
    searches = [task_from(arguments, seed) for seed in range(arguments.seeds)]
    reference = outcome(RUNS["reference"], first_steps, searches)
    record(results, first_steps.name, "reference", reference, reference)
    for name in dict.fromkeys(arguments.runs):
        if name != "reference" and not (RUNS[name].needs_gpu and arguments.device == "cpu"):
            record(results, first_steps.name, name, outcome(RUNS[name], first_steps, searches), reference)


def main() -> int:
    arguments = arguments_from_command_line()
    if not arguments.draw:
        measure(open_results("search_fidelity", arguments, arguments.device), arguments)
    draw(arguments.out, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
