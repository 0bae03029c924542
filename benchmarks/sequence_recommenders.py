"""Recommenders of the space ``seqrec`` on Amazon Beauty and MovieLens-100K: how well and how fast.

``python benchmarks/sequence_recommenders.py --beauty beauty.txt.gz --movielens ml-100k.inter`` does in turn,
or what ``--parts`` names of it:

tune        trains the hand-built SASRec and HSTU with each of a few settings, a seed each; what validates
            best in the mean of both is used from there on
controls    trains SASRec, HSTU and a random genotype from every one of ``--seeds``
search      searches from several seeds by several strategies, for networks of no more parameters than the
            better hand-built one has; trains what they found for ``--candidate-epochs``; trains the one that
            validates best then from all seeds
movielens   trains HSTU with and without its bias by time

Figures are HR@10 and NDCG@10 over the whole catalogue, leaving one out; what is tested is the network of the
epoch that validated best, and the test decides nothing. ``--jobs`` trainings share the GPUs: seconds are of
shared ones then. Products are in TF32. ``--quick`` makes up a small data set, to try the script on a CPU.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _harness import Results, Spread, open_results, results_parser
from _processes import visible_gpus

from neuroexapt import evaluate, search
from neuroexapt.backend.candidates import without_kernels
from neuroexapt.core.derived import count_parameters
from neuroexapt.core.genotypes import AnyGenotype, load_genotype
from neuroexapt.data.sequences import load_sequences
from neuroexapt.engine.resources import Resources
from neuroexapt.recommend.metrics import gains, hits, target_ranks
from neuroexapt.spaces import SPACES
from neuroexapt.spaces.seqrec import SEQREC

PARTS = ("tune", "controls", "search", "movielens")
MOVIELENS_LENGTH = 200
HAND_BUILT = ("SASRec", "HSTU")
FIGURES = {
    "hr@10": ("test_accuracy", "share"),
    "ndcg@10": ("test_ndcg", "share"),
    "valid_ndcg@10": ("valid_ndcg", "share"),
    "parameters": ("parameters", ""),
    "best_epoch": ("best_epoch", ""),
    "train_s": ("training_seconds", "s"),
}
"""Metrics by their names in the results of ``train``."""
QUICK = {"init_channels": 16, "epochs": 3, "batch_size": 32, "backend": "cpu"}


@dataclass(frozen=True)
class Variant:
    """Settings of a run, and fields of the space, that differ from the usual ones."""

    settings: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)

    def register(self) -> str:
        """The name of the space."""
        name = "-".join(["seqrec", *(f"{key}={value}" for key, value in sorted(self.space.items()))])
        SPACES[name] = replace(SEQREC, name=name, **self.space)
        return name

    def __or__(self, other: "Variant") -> "Variant":
        return Variant(self.settings | other.settings, self.space | other.space)


VARIANTS = [
    Variant(space={"dropout": 0.3}),
    Variant(space={"dropout": 0.5}),
    Variant({"learning_rate": 2e-3}, {"dropout": 0.5}),
    Variant(space={"dropout": 0.5, "cosine": True}),
    Variant(space={"dropout": 0.3, "cosine": True, "negatives": 128}),
]
POSITIONS = {"beauty": 12, "ml-100k": None}
"""Of a history that are trained at most, in the mean of a batch: twice what Amazon Beauty has."""
SEARCH = {"batch_size": 256, "learning_rate": 2e-3, "arch_learning_rate": 2e-2, "warmup_epochs": 2}
"""Settings of searches, which are short."""


@dataclass(frozen=True)
class Training:
    """``genotype``: name or text, or "random"."""

    name: str
    genotype: str
    dataset: str
    seed: int
    variant: Variant


@dataclass(frozen=True)
class Search:
    strategy: str
    dataset: str
    seed: int
    settings: dict[str, Any]
    max_params: int
    variant: Variant


def train(training: Training) -> dict[str, Any]:
    """What ``neuroexapt.evaluate`` makes of it, in a folder that is thrown away."""
    torch.set_float32_matmul_precision("high")
    space, genotype = training.variant.register(), training.genotype
    settings = {"quiet": True, "seed": training.seed, **training.variant.settings}
    if genotype == "random":
        generator = torch.Generator().manual_seed(training.seed)
        genotype = str(SPACES[space].random_genotype(generator, layers=2))
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(
            dataset=training.dataset, space=space, genotype=genotype, out=Path(folder) / "run", **settings
        )
    valid = found.curves["evaluate"]["valid_ndcg"]
    best = {"best_epoch": valid.index(max(valid)), "valid_ndcg": max(valid)}
    return found.result | best | {"genotype": genotype}


def run_search(wanted: Search) -> dict[str, Any]:
    """Genotypes within the limit that α of ``neuroexapt.search`` stands for, α, and the seconds it took.

    The search itself has no budget, so that one search serves several limits and ways to derive.
    """
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = search(
            dataset=wanted.dataset,
            space=wanted.variant.register(),
            strategy=wanted.strategy,
            seed=wanted.seed,
            train_epochs=0,
            out=Path(folder) / "run",
            quiet=True,
            **(wanted.variant.settings | wanted.settings),
        )
    alpha = found.curves["search"]["alpha"][-1]
    genotypes = list(dict.fromkeys(str(genotype) for genotype in within_limit(wanted, alpha)))
    seconds = time.perf_counter() - start
    unlimited = {"unlimited": str(found.genotype)}
    return {**found.result, **unlimited, "genotypes": genotypes, "alpha": alpha, "seconds": seconds}


def within_limit(wanted: Search, alpha: dict[str, list[list[float]]]) -> Iterator[AnyGenotype]:
    """What α stands for within the limit, with and without ``none``, with its head and the plain one."""
    data = load_sequences(Path(wanted.dataset.removeprefix("seq:")))
    sizes = {**SEQREC.defaults, **wanted.variant.settings}
    shape = data.facts | {"channels": sizes["init_channels"], "layers": sizes["layers"]}

    def make_network(genotype: Any) -> torch.nn.Module:
        return SEQREC.network(genotype, **shape)

    resources = Resources(
        {"max_params": wanted.max_params},
        SEQREC.supernet(**shape),
        data.test.inputs[:2],
        SEQREC,
        make_network,
    )
    weights = {cell: torch.tensor(rows) for cell, rows in alpha.items()}
    without_none, last = weights["cell"].clone(), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    without_none[:, SEQREC.primitives.index("none")] = 0
    for cell, head in itertools.product((weights["cell"], without_none), (weights["head"], last)):
        yield resources.fit({"cell": cell, "head": head})


class Pool:
    """Runs trainings and searches, several at a time, spread over the GPUs that are visible."""

    def __init__(self, jobs: int, without: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        gpus = context.Queue()
        visible = visible_gpus() or [""]
        for job in range(jobs):
            gpus.put(visible[job % len(visible)])
        self._executor = (
            ProcessPoolExecutor(jobs, context, initializer=_prepare, initargs=(gpus, without))
            if jobs > 1
            else None
        )

    def train(self, results: Results, trainings: Sequence[Training]) -> dict[str, list[dict[str, Any]]]:
        """Results by name, in order; each is recorded as it comes."""
        found = defaultdict(list)
        for training, result in zip(trainings, self._map(train, trainings), strict=True):
            found[training.name].append(result)
            kept = {metric: result[key] for metric, (key, _) in FIGURES.items()}
            what = {"seed": training.seed, "genotype": result["genotype"], **vars(training.variant)}
            results.record("training", training.name, "tf32", "figures", **kept, **what)
            figures = f"{result['test_accuracy']:.4f} {result['test_ndcg']:.4f}"
            best = f"valid {result['valid_ndcg']:.4f} in epoch {result['best_epoch']} of {result['epochs']}"
            seconds = f"{result['training_seconds']:.0f} s, {result['parameters']:,} parameters"
            print(f"{training.name} seed {training.seed}: {figures}, {best}, {seconds}", flush=True)
        return dict(found)

    def search(self, searches: Sequence[Search]) -> list[dict[str, Any]]:
        found = []
        for wanted, result in zip(searches, self._map(run_search, searches), strict=True):
            found.append(result)
            shown = f"{result['seconds']:.0f} s, valid {result['valid_accuracy']:.4f}: {result['unlimited']}"
            print(f"{wanted.strategy} seed {wanted.seed}: {shown}, within {wanted.max_params:,} parameters:")
            print("\n".join(result["genotypes"]), flush=True)
        return found

    def _map(self, run: Any, tasks: Sequence[Any]) -> Iterator[dict[str, Any]]:
        return self._executor.map(run, tasks) if self._executor else map(run, tasks)


def _prepare(gpus: Any, without: Sequence[str]) -> None:
    """Give a process a GPU of its own before CUDA starts in it, and its kernels."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    without_kernels(without).__enter__()  # for as long as the process lives


def record(results: Results, case: str, found: dict[str, list[dict[str, Any]]], jobs: int) -> None:
    """Of each network, figures of all its seeds."""
    for name, runs in found.items():
        for metric, (key, unit) in FIGURES.items():
            values = [run[key] for run in runs]
            spread = vars(Spread.of(values) if len(values) > 1 else Spread.exactly(values[0]))
            figures = {"unit": unit, "mean": statistics.fmean(values), "values": values, **spread}
            share = jobs / max(1, len(visible_gpus()))
            results.record(case, name, "tf32", metric, **figures, trainings_per_device=share)
        genotypes = [run["genotype"] for run in runs]
        results.record(case, name, "tf32", "genotypes", values=genotypes)
        means = (statistics.fmean(run[key] for run in runs) for key, _ in FIGURES.values())
        print(f"{case} {name}:", ", ".join(f"{m} {v:.5g}" for m, v in zip(FIGURES, means, strict=True)))


def record_popularity(results: Results, case: str, dataset: str) -> None:
    """The same ten items for everybody: those that occur most in the training data."""
    data = load_sequences(Path(dataset.removeprefix("seq:")))
    counts = data.item_counts.float()[:, None]
    targets = data.test.labels.max(dim=1).values
    ranks = torch.cat([target_ranks(torch.ones(len(t), 1), counts, t) for t in targets.split(512)])
    for metric, values in (("hr@10", hits(ranks)), ("ndcg@10", gains(ranks))):
        results.add(case, "popularity", "fp32", metric, "share", Spread.exactly(values.mean().item()))


def tuned(results: Results, pool: Pool, dataset: str, variant: Variant, numbers: Sequence[int]) -> Variant:
    """Of some ``VARIANTS`` the one with which both hand-built networks validate best."""
    trainings = [
        Training(f"variant {number}", name, dataset, 0, variant | VARIANTS[number])
        for number in numbers
        for name in HAND_BUILT
    ]
    found = pool.train(results, trainings)
    means = [statistics.fmean(run["valid_ndcg"] for run in runs) for runs in found.values()]
    best = VARIANTS[numbers[means.index(max(means))]]
    print("tuned:", best, flush=True)
    return variant | best


def count_parameters_of(genotype: str, dataset: str, variant: Variant) -> int:
    facts = load_sequences(Path(dataset.removeprefix("seq:"))).facts
    sizes = {**SEQREC.defaults, **variant.settings}
    chosen: Any = load_genotype(genotype)
    network = SEQREC.network(chosen, **facts, channels=sizes["init_channels"], layers=sizes["layers"])
    return count_parameters(network)


def search_and_train(
    results: Results, pool: Pool, dataset: str, limit: int, variant: Variant, arguments: argparse.Namespace
) -> None:
    start = time.perf_counter()
    settings: dict[str, Any] = {"epochs": arguments.search_epochs}
    if not arguments.quick:
        settings |= SEARCH
    searches = [
        Search(strategy, dataset, seed, settings, limit, variant)
        for seed in range(arguments.searches)
        for strategy in arguments.strategies
    ]
    found = pool.search(searches)
    for wanted, result in zip(searches, found, strict=True):
        kept = {
            name: result[name] for name in ("unlimited", "genotypes", "alpha", "seconds", "valid_accuracy")
        }
        results.record("beauty", wanted.strategy, "tf32", "search", seed=wanted.seed, limit=limit, **kept)
    genotypes = list(dict.fromkeys(itertools.chain(*(result["genotypes"] for result in found))))
    briefly = variant | Variant({"epochs": arguments.candidate_epochs})
    candidates = pool.train(results, [Training(g, g, dataset, arguments.seeds, briefly) for g in genotypes])
    chosen = max(genotypes, key=lambda genotype: candidates[genotype][0]["valid_ndcg"])
    results.add("beauty", "searched", "tf32", "search_s", "s", Spread.exactly(time.perf_counter() - start))
    trainings = [Training("searched", chosen, dataset, s, variant) for s in range(arguments.seeds)]
    record(results, "beauty", pool.train(results, trainings), arguments.jobs)
    results.add("beauty", "searched", "tf32", "total_s", "s", Spread.exactly(time.perf_counter() - start))


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
    parser = results_parser("sequence_recommenders", __doc__ or "")
    parser.add_argument("--beauty", type=Path, help="sequences of Amazon Beauty, a user a line")
    parser.add_argument("--movielens", type=Path, help="MovieLens-100K, as RecBole's ml-100k.inter")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings and searches at a time")
    parser.add_argument("--epochs", type=int, default=40, help="at most, of each training")
    parser.add_argument("--patience", type=int, default=8, help="epochs after the one that validates best")
    parser.add_argument("--strategies", nargs="+", default=["darts"], help="of the searches")
    parser.add_argument("--searches", type=int, default=1, help="seeds of each strategy")
    parser.add_argument("--search-epochs", type=int, default=12)
    parser.add_argument("--candidate-epochs", type=int, default=10, help="of what the searches found")
    parser.add_argument("--no-more-than", choices=HAND_BUILT, help="whose parameters limit the searched one")
    parser.add_argument(
        "--variants",
        type=int,
        nargs="+",
        default=list(range(len(VARIANTS))),
        help="settings to tune among, by number; the first is used where they are not tuned",
    )
    parser.add_argument("--without", nargs="+", default=[], help="ops to run in plain PyTorch")
    parser.add_argument("--backend", default="auto", help="of all trainings, as of neuroexapt search")
    parser.add_argument("--quick", action="store_true", help="made-up data on the CPU")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    variant = Variant(
        {"epochs": arguments.epochs, "patience": arguments.patience, "backend": arguments.backend},
        {"positions": POSITIONS["beauty"]},
    )
    if arguments.quick:
        write_made_up(folder / "made_up.csv")
        arguments.beauty = arguments.movielens = folder / "made_up.csv"
        arguments.search_epochs = 2
        variant = Variant(QUICK)
    results = open_results("sequence_recommenders", arguments, "cpu" if arguments.quick else "cuda")
    beauty, movielens = f"seq:{arguments.beauty}", f"seq:{arguments.movielens}"
    pool = Pool(arguments.jobs, arguments.without)
    if "tune" in arguments.parts:
        variant = tuned(results, pool, beauty, variant, arguments.variants)
    else:
        variant |= VARIANTS[arguments.variants[0]]
    better = arguments.no_more_than or "HSTU"
    if "controls" in arguments.parts:
        record_popularity(results, "beauty", beauty)
        names = itertools.product(range(arguments.seeds), (*HAND_BUILT, "random"))
        found = pool.train(results, [Training(name, name, beauty, seed, variant) for seed, name in names])
        record(results, "beauty", found, arguments.jobs)
        better = arguments.no_more_than or max(
            HAND_BUILT, key=lambda name: sum(run["test_ndcg"] for run in found[name])
        )
    if "search" in arguments.parts:
        limit = count_parameters_of(better, beauty, variant)
        search_and_train(results, pool, beauty, limit, variant, arguments)
    if "movielens" in arguments.parts:
        record_popularity(results, "ml-100k", movielens)
        of_length = variant | Variant({"max_length": MOVIELENS_LENGTH}, {"positions": POSITIONS["ml-100k"]})
        trainings = [
            Training(f"HSTU, {name}", "HSTU", movielens, seed, of_length | Variant(space={"times": times}))
            for seed in range(arguments.seeds)
            for name, times in (("time bias", True), ("no time bias", False))
        ]
        record(results, "ml-100k", pool.train(results, trainings), arguments.jobs)


def main() -> int:
    arguments = arguments_from_command_line()
    with tempfile.TemporaryDirectory() as folder, without_kernels(arguments.without):
        measure(arguments, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
