"""Recommenders of the space ``seqrec`` on Amazon Beauty and MovieLens-100K: how well and how fast.

``python benchmarks/sequence_recommenders.py --beauty beauty.txt.gz`` trains the hand-built SASRec and HSTU
and random genotypes over ``--seeds``, searches for a network of no more parameters than the better one's, and
trains what was found alike, on full-catalogue HR@10 and NDCG@10 (leave one out; the network of the epoch that
validates best is tested). ``--movielens ml-100k.inter`` trains HSTU with and without its bias by time.
``--parts`` chooses among them, ``--sweep`` instead compares settings, a seed each. ``--jobs`` trainings share
the GPU; times are then not recorded. Products are in TF32.

``--quick`` makes up a small data set, for a look at the script on a CPU.
"""

import argparse
import itertools
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _harness import Results, Spread, open_results, results_parser

from neuroexapt import evaluate, search
from neuroexapt.core.derived import count_parameters
from neuroexapt.core.genotypes import load_genotype
from neuroexapt.data.sequences import load_sequences
from neuroexapt.recommend.metrics import gains, hits, target_ranks
from neuroexapt.spaces import SPACES
from neuroexapt.spaces.seqrec import SEQREC

PARTS = ("controls", "search", "movielens")
LENGTHS = {"beauty": 50, "movielens": 200}
QUICK = {"init_channels": 16, "epochs": 3, "batch_size": 32, "backend": "cpu"}


@dataclass(frozen=True)
class Training:
    """``genotype``: name or text, or "random"; ``space``: fields of the space that differ from ``seqrec``."""

    name: str
    genotype: str
    dataset: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)


def register(changes: dict[str, Any]) -> str:
    """The name of the space with these changes."""
    name = "-".join(["seqrec", *(f"{key}={value}" for key, value in sorted(changes.items()))])
    SPACES[name] = replace(SEQREC, name=name, **changes)
    return name


def train(training: Training) -> dict[str, Any]:
    """What ``neuroexapt.evaluate`` makes of it, in a folder that is thrown away."""
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        space = register(training.space)
        genotype = training.genotype
        if genotype == "random":
            generator = torch.Generator().manual_seed(training.seed)
            genotype = str(SPACES[space].random_genotype(generator, layers=2))
        settings = {"quiet": True, "out": Path(folder) / "run", "seed": training.seed, **training.settings}
        found = evaluate(dataset=training.dataset, space=space, genotype=genotype, **settings)
        return found.result | {"genotype": genotype, "best_epoch": best_epoch(found.curves["evaluate"])}


def best_epoch(curves: dict[str, list[float]]) -> int:
    return max(range(len(curves["valid_ndcg"])), key=curves["valid_ndcg"].__getitem__)


def run_all(
    trainings: Iterable[Training], jobs: int, each: Callable[[Training, dict[str, Any]], None]
) -> None:
    if jobs == 1:
        for training in trainings:
            each(training, train(training))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        trainings = list(trainings)
        for training, result in zip(trainings, pool.map(train, trainings), strict=True):
            each(training, result)


def record(results: Results, case: str, found: dict[str, list[dict[str, Any]]], timed: bool) -> None:
    """Of each network, figures of all its seeds."""
    for name, runs in found.items():
        for metric, key, unit in (
            ("hr@10", "test_accuracy", "share"),
            ("ndcg@10", "test_ndcg", "share"),
            ("parameters", "parameters", ""),
            ("epochs", "epochs", ""),
            ("train_s", "training_seconds", "s"),
        ):
            values = [run[key] for run in runs]
            if metric == "train_s" and not timed:
                continue
            spread = Spread.of(values) if len(values) > 1 else Spread.exactly(values[0])
            mean = statistics.fmean(values)
            results.record(case, name, "fp32", metric, unit=unit, mean=mean, values=values, **vars(spread))
            print(f"{case:12} {name:14} {metric:10} {mean:10.4f} {unit}  {values}", flush=True)
        results.record(case, name, "fp32", "genotypes", values=sorted({run["genotype"] for run in runs}))


def record_popularity(results: Results, case: str, dataset: str, max_length: int) -> None:
    """The same ten items for everybody: those that occur most in the training data."""
    data = load_sequences(Path(dataset.removeprefix("seq:")), max_length)
    counts = data.item_counts.float()[:, None]
    targets = data.test.labels.max(dim=1).values
    ranks = torch.cat([target_ranks(torch.ones(len(t), 1), counts, t) for t in targets.split(512)])
    for metric, values in (("hr@10", hits(ranks)), ("ndcg@10", gains(ranks))):
        results.add(case, "popularity", "fp32", metric, "share", Spread.exactly(values.mean().item()))


def controls(dataset: str, seeds: int, settings: dict[str, Any]) -> list[Training]:
    names = ("SASRec", "HSTU", "random")
    return [
        Training(name, name, dataset, seed, settings) for seed, name in itertools.product(range(seeds), names)
    ]


def time_biases(dataset: str, seeds: int, settings: dict[str, Any]) -> list[Training]:
    return [
        Training(name, "HSTU", dataset, seed, settings, {"times": times})
        for seed in range(seeds)
        for name, times in (("HSTU, time bias", True), ("HSTU, no time bias", False))
    ]


def count_parameters_of(genotype: str, dataset: str, channels: int) -> int:
    facts = load_sequences(Path(dataset.removeprefix("seq:"))).facts
    chosen: Any = load_genotype(genotype)
    return count_parameters(SEQREC.network(chosen, **facts, channels=channels, layers=2))


def run_search(results: Results, case: str, dataset: str, arguments: argparse.Namespace, limit: int) -> str:
    """The genotype that is found, whose network is no larger than that of ``--no-more-than``."""
    torch.set_float32_matmul_precision("high")
    settings = arguments.settings | {"epochs": arguments.search_epochs}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = search(
            dataset=dataset,
            space=register({}),
            strategy=arguments.strategy,
            train_epochs=0,
            max_params=limit,
            out=Path(folder) / "run",
            quiet=True,
            **settings,
        )
        seconds = time.perf_counter() - start
    results.add(case, "search", "fp32", "wall_s", "s", Spread.exactly(seconds))
    results.record(case, "search", "fp32", "alpha", values=found.curves["search"]["alpha"][-1])
    print(found.genotype, found.result["valid_accuracy"], flush=True)
    return str(found.genotype)


SWEEP: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"dropout": 0.3}),
    ({}, {"dropout": 0.5}),
    ({"batch_size": 512, "learning_rate": 2e-3}, {"dropout": 0.5}),
    ({}, {"dropout": 0.3, "cosine": True}),
    ({}, {"dropout": 0.3, "cosine": True, "negatives": 128}),
    ({"init_channels": 128}, {"dropout": 0.5}),
]
"""Settings of the run, and of the space."""


def sweep(results: Results, arguments: argparse.Namespace, dataset: str) -> None:
    trainings = [
        Training(f"{genotype} {settings | space}", genotype, dataset, 0, arguments.settings | settings, space)
        for settings, space in SWEEP
        for genotype in ("SASRec", "HSTU")
    ]

    def show(training: Training, result: dict[str, Any]) -> None:
        figures = {name: result[name] for name in ("test_accuracy", "test_ndcg", "epochs", "best_epoch")}
        results.record("sweep", training.name, "fp32", "figures", **figures)
        shown = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"{training.name:75} {shown} {result['training_seconds']:.0f} s", flush=True)

    run_all(trainings, arguments.jobs, show)


def write_made_up(path: Path) -> None:
    """Histories in which an item mostly follows from the one before, three seconds apart."""
    rng = random.Random(0)
    lines = []
    for user in range(300):
        item = rng.randrange(40)
        for step in range(rng.randrange(6, 14)):
            lines.append(f"{user},{item},5,{3 * step}")
            item = (3 * item + 1) % 40 if rng.random() < 0.8 else rng.randrange(40)
    path.write_text("\n".join(lines) + "\n")


def arguments_from_command_line() -> argparse.Namespace:
    parser = results_parser("sequence_recommenders", __doc__)
    parser.add_argument("--beauty", type=Path, help="sequences of Amazon Beauty, a user a line")
    parser.add_argument("--movielens", type=Path, help="MovieLens-100K, as RecBole's ml-100k.inter")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--epochs", type=int, default=100, help="at most, of each training")
    parser.add_argument("--strategy", default="darts", help="of the search")
    parser.add_argument("--search-epochs", type=int, default=30)
    parser.add_argument("--no-more-than", help="genotype whose parameters limit the searched network's")
    parser.add_argument("--backend", default="auto", help="of all trainings, as of neuroexapt search")
    parser.add_argument("--genotypes", nargs="*", default=[], help="further ones to train, by file or text")
    parser.add_argument("--sweep", action="store_true", help="compare settings")
    parser.add_argument("--quick", action="store_true", help="made-up data on the CPU")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    arguments.settings = {"epochs": arguments.epochs, "backend": arguments.backend}
    if arguments.quick:
        write_made_up(folder / "made_up.csv")
        arguments.beauty = arguments.movielens = folder / "made_up.csv"
        arguments.settings = QUICK
        arguments.search_epochs = 2
    results = open_results("sequence_recommenders", arguments, "cpu" if arguments.quick else "cuda")
    datasets = {name: f"seq:{getattr(arguments, name)}" for name in LENGTHS}
    found: dict[str, list[dict[str, Any]]] = {}

    def keep(training: Training, result: dict[str, Any]) -> None:
        found.setdefault(training.name, []).append(result)
        figures = f"{result['test_accuracy']:.4f} {result['test_ndcg']:.4f} of epoch {result['best_epoch']}"
        seconds = result["training_seconds"]
        print(f"{training.name} seed {training.seed}: {figures}, {seconds:.0f} s", flush=True)

    def train_all(name: str, trainings: list[Training]) -> None:
        found.clear()
        run_all(trainings, arguments.jobs, keep)
        record(results, name, found, timed=arguments.jobs == 1)

    beauty = datasets["beauty"]
    if arguments.sweep:
        sweep(results, arguments, beauty)
        return
    better = "HSTU"
    if "controls" in arguments.parts:
        record_popularity(results, "beauty", beauty, LENGTHS["beauty"])
        train_all("beauty", controls(beauty, arguments.seeds, arguments.settings))
        better = max("SASRec", "HSTU", key=lambda name: sum(run["test_ndcg"] for run in found[name]))
    chosen = list(arguments.genotypes)
    if "search" in arguments.parts:
        width = arguments.settings.get("init_channels", SEQREC.defaults["init_channels"])
        limit = count_parameters_of(arguments.no_more_than or better, beauty, width)
        chosen.append(run_search(results, "beauty", beauty, arguments, limit))
    for genotype in chosen:
        train_all(
            "beauty",
            [
                Training("searched", genotype, beauty, seed, arguments.settings)
                for seed in range(arguments.seeds)
            ],
        )
    if "movielens" in arguments.parts:
        settings = arguments.settings | {"max_length": LENGTHS["movielens"]}
        record_popularity(results, "ml-100k", datasets["movielens"], LENGTHS["movielens"])
        train_all("ml-100k", time_biases(datasets["movielens"], arguments.seeds, settings))


def main() -> int:
    arguments = arguments_from_command_line()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
