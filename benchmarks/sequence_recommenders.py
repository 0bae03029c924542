"""Recommenders of the space ``seqrec`` on Amazon Beauty and MovieLens-100K: how well and how fast.

``python benchmarks/sequence_recommenders.py --beauty beauty.txt.gz --movielens ml-100k.inter`` does in turn,
or what ``--parts`` names of it:

tune        trains the hand-built SASRec and HSTU with each of a few settings, a seed each; what validates
            best in the mean of both is used from there on
controls    trains SASRec, HSTU, a random genotype and what is given as ``--beside`` from every one of
            ``--seeds``; where these are not three the case's name tells how many
search      looks for a network of no more parameters than the better hand-built one has (see below)
movielens   trains HSTU with and without its bias by time

The part ``search``:

1. Several strategies search from several seeds. The limit is theirs, so that α is learned within it instead
   of cut down to it afterwards.
2. ``--pool`` genotypes are trained briefly, with one seed: what every search derived, then what is drawn from
   their α in turn, as probabilities. Of many networks within the limit α tells apart only few.
3. While ``--refine-until`` allows, rounds of ``--jobs`` children of the best so far, which differ from their
   parent in one edge or the head, are trained as briefly.
4. The best, twice as many as ``--finalists``, are trained as briefly with a second seed. The finalists, best
   in the mean of both, are trained in full from all ``--seeds``: what is best in their mean is the result,
   with these trainings.

All these genotypes are within the limit and no two compute the same. NDCG@10 in validation decides every
time; from one seed to another a network's has a deviation of .0002 to .0008, and good networks are no farther
apart. The hand-built networks take no part, unless ``--seeded``: then they come first in the pool, as the
Transformer did in the first population of the Evolved Transformer (So, Liang, Le; ICML 2019), and what is
found is recorded as ``searched, seeded``.

Seconds since the part began are ``gradient_search_s`` when the searches have ended, ``refined_s`` when the
finalists are known and ``total_s`` when the result is, with all its trainings; ``train_s`` are those of each
of these.

Figures are HR@10 and NDCG@10 over the whole catalogue, leaving one out; what is tested is the network of the
epoch that validated best, and the test decides nothing. ``--jobs`` trainings share the GPUs: seconds are of
shared ones then. Products are in TF32. ``--quick`` makes up a small data set, to try the script on a CPU.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Results, Spread, open_results, results_parser
from _processes import visible_gpus
from torch import Tensor

from neuroexapt import evaluate, search
from neuroexapt.backend.candidates import without_kernels
from neuroexapt.core.derived import count_parameters
from neuroexapt.core.genotypes import RECOMMENDERS, RecommenderGenotype
from neuroexapt.data.sequences import load_sequences
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
SEEDS = 3
POSITIONS = {"beauty": 12, "ml-100k": None}
"""Of a history that are trained at most, in the mean of a batch: twice what Amazon Beauty has."""
BRIEF = {"batch_size": 256, "learning_rate": 2e-3}
"""Settings of short trainings: half the steps, twice as far each."""
SEARCH = BRIEF | {"arch_learning_rate": 2e-2, "warmup_epochs": 2}
PARENTS = 4
"""How many of the best candidates have children."""
SHORTLISTED = 2
"""How many times as many candidates as finalists are trained briefly with a second seed."""
TRIES = 1_000
"""How many genotypes are looked at for new ones."""


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
    """What ``neuroexapt.search`` derived within the limit, its α, and the seconds it took."""
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = search(
            dataset=wanted.dataset,
            space=wanted.variant.register(),
            strategy=wanted.strategy,
            seed=wanted.seed,
            max_params=wanted.max_params,
            train_epochs=0,
            out=Path(folder) / "run",
            quiet=True,
            **wanted.variant.settings,
        )
    alpha = found.curves["search"]["alpha"][-1]
    seconds = time.perf_counter() - start
    return {**found.result, "genotype": str(found.genotype), "alpha": alpha, "seconds": seconds}


class Limit:
    """Parameters of a network, and whether they are no more than those of a named one."""

    def __init__(self, name: str, dataset: str, variant: Variant) -> None:
        facts = load_sequences(Path(dataset.removeprefix("seq:"))).facts
        sizes = {**SEQREC.defaults, **variant.settings}
        self._shape = {**facts, "channels": sizes["init_channels"], "layers": sizes["layers"]}
        self.parameters = self.count(RECOMMENDERS[name])

    def count(self, genotype: RecommenderGenotype) -> int:
        with torch.device("meta"):
            return count_parameters(SEQREC.network(genotype, **self._shape))

    def admits(self, genotype: RecommenderGenotype) -> bool:
        return self.count(genotype) <= self.parameters


def drawn_from(alpha: Mapping[str, Tensor], generator: torch.Generator) -> RecommenderGenotype:
    """Of operations drawn with the probabilities α [E, K]; where the space has to mend it, α decides."""
    drawn = {cell: rows.multinomial(1, generator=generator)[:, 0] for cell, rows in alpha.items()}
    return SEQREC.derive({cell: rows + F.one_hot(drawn[cell], rows.shape[1]) for cell, rows in alpha.items()})


def child_of(parent: RecommenderGenotype, rng: random.Random) -> RecommenderGenotype:
    """``parent`` with an operation drawn evenly on one edge, or such a head; where the space has to mend it,
    the operation that was there stays.
    """
    weights = one_hot(parent)
    row = rng.choice([row for rows in weights.values() for row in rows])
    row /= 2
    row[rng.randrange(len(row))] = 1
    return SEQREC.derive(weights)


def one_hot(genotype: RecommenderGenotype) -> dict[str, Tensor]:
    """1 for what ``genotype`` chose, else 0: [E, K] for each type of cells."""
    return {
        cell: torch.tensor(
            [[name == op for name in SEQREC.primitives_of(cell)] for *_, op in chosen.edges]
        ).float()
        for cell, chosen in genotype.cells.items()
    }


def computed_by(genotype: RecommenderGenotype) -> Hashable:
    """The same for genotypes that differ only in what they skip: the last state as a sum of operations on
    such sums, the operations, each of which has weights of its own, and the head.
    """
    states: list[tuple[Any, ...]] = [("input",)]
    for operations in genotype.cell.operations:
        terms: list[Any] = []
        for op, source in zip(operations, states, strict=True):
            terms += source if op == "skip_connect" else [(op, source)] if op != "none" and source else []
        states.append(tuple(sorted(terms, key=str)))
    weighted = sorted(op for _, _, op in genotype.edges if op != "skip_connect")
    return states[-1], tuple(weighted), genotype.head


class Candidates:
    """Genotypes within the limit, each once; what they reached in validation is in ``ndcg`` by their text."""

    def __init__(self, limit: Limit) -> None:
        self._limit, self._known = limit, set[Hashable]()
        self.ndcg: dict[str, float] = {}

    def new_ones(self, genotypes: Iterable[RecommenderGenotype], count: int) -> list[str]:
        """The first ``count`` of ``genotypes`` that compute something new."""
        return [str(genotype) for genotype in itertools.islice(self._admitted(genotypes), count)]

    def _admitted(self, genotypes: Iterable[RecommenderGenotype]) -> Iterator[RecommenderGenotype]:
        for genotype in itertools.islice(genotypes, TRIES):
            computed = computed_by(genotype)
            is_new = computed not in self._known
            self._known.add(computed)
            if is_new and self._limit.admits(genotype):
                yield genotype

    def children(self, rng: random.Random) -> Iterator[RecommenderGenotype]:
        """Without end, of the best."""
        parents = [load_recommender(text) for text in best(self.ndcg, PARENTS)]
        while True:
            yield child_of(rng.choice(parents), rng)


def best(ndcg: Mapping[str, float], count: int) -> list[str]:
    return sorted(ndcg, key=ndcg.__getitem__, reverse=True)[:count]


def of_searches(found: Sequence[dict[str, Any]]) -> Iterator[RecommenderGenotype]:
    """What searches derived, then, without end, what is drawn from their α in turn."""
    for result in found:
        yield load_recommender(result["genotype"])
    generator = torch.Generator().manual_seed(0)
    for result in itertools.cycle(found):
        yield drawn_from({cell: torch.tensor(rows) for cell, rows in result["alpha"].items()}, generator)


def load_recommender(text: str) -> RecommenderGenotype:
    return RecommenderGenotype.from_dict(json.loads(text))


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

    def search(self, results: Results, searches: Sequence[Search]) -> list[dict[str, Any]]:
        """What each found, in order; recorded as it comes."""
        found = []
        for wanted, result in zip(searches, self._map(run_search, searches), strict=True):
            found.append(result)
            kept = {name: result[name] for name in ("genotype", "alpha", "seconds", "valid_accuracy")}
            limited = {"seed": wanted.seed, "limit": wanted.max_params}
            results.record("beauty", wanted.strategy, "tf32", "search", **limited, **kept)
            shown = f"{result['seconds']:.0f} s, valid {result['valid_accuracy']:.4f}: {result['genotype']}"
            print(f"{wanted.strategy} seed {wanted.seed}: {shown}", flush=True)
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


def search_and_train(
    results: Results, pool: Pool, dataset: str, limit: Limit, variant: Variant, arguments: argparse.Namespace
) -> None:
    start = time.perf_counter()
    name, first = ("searched, seeded", RECOMMENDERS.values()) if arguments.seeded else ("searched", ())

    def note_seconds(metric: str) -> None:
        seconds = time.perf_counter() - start
        results.add("beauty", name, "tf32", metric, "s", Spread.exactly(seconds))

    briefly = variant | Variant(({} if arguments.quick else BRIEF) | {"epochs": arguments.candidate_epochs})
    searching = variant | Variant(({} if arguments.quick else SEARCH) | {"epochs": arguments.search_epochs})
    searches = [
        Search(strategy, dataset, seed, limit.parameters, searching)
        for seed in range(arguments.searches)
        for strategy in arguments.strategies
    ]
    found = pool.search(results, searches)
    note_seconds("gradient_search_s")

    def train_all(
        genotypes: Sequence[str], variant: Variant, seeds: Iterable[int]
    ) -> dict[str, list[dict[str, Any]]]:
        pairs = itertools.product(seeds, genotypes)
        return pool.train(results, [Training(text, text, dataset, seed, variant) for seed, text in pairs])

    def validated_briefly(genotypes: Sequence[str], seed: int) -> dict[str, float]:
        return mean_ndcg(train_all(genotypes, briefly, [seed]))

    candidates, rng = Candidates(limit), random.Random(0)
    new = candidates.new_ones(itertools.chain(first, of_searches(found)), arguments.pool)
    seed = arguments.seeds  # and the next one: what chooses the finalists is not among their trainings
    while new:
        candidates.ndcg |= validated_briefly(new, seed)
        in_time = time.perf_counter() - start < arguments.refine_until
        new = candidates.new_ones(candidates.children(rng), arguments.jobs) if in_time else []
    shortlist = best(candidates.ndcg, SHORTLISTED * arguments.finalists)
    again = validated_briefly(shortlist, seed + 1)
    finalists = best({text: candidates.ndcg[text] + again[text] for text in shortlist}, arguments.finalists)
    note_seconds("refined_s")
    trained = train_all(finalists, variant, range(arguments.seeds))
    (chosen,) = best(mean_ndcg(trained), 1)
    note_seconds("total_s")
    record(results, "beauty", {name: trained[chosen]}, arguments.jobs)


def mean_ndcg(trained: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, float]:
    """In validation, of all seeds of each genotype."""
    return {text: statistics.fmean(run["valid_ndcg"] for run in runs) for text, runs in trained.items()}


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
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--beside", nargs="+", default=[], help="genotypes to train beside the controls")
    parser.add_argument("--jobs", type=int, default=1, help="trainings and searches at a time")
    parser.add_argument("--epochs", type=int, default=40, help="at most, of each training")
    parser.add_argument("--patience", type=int, default=8, help="epochs after the one that validates best")
    parser.add_argument("--strategies", nargs="+", default=["darts"], help="of the searches")
    parser.add_argument("--searches", type=int, default=1, help="seeds of each strategy")
    parser.add_argument("--search-epochs", type=int, default=8)
    parser.add_argument("--candidate-epochs", type=int, default=16, help="of short trainings of candidates")
    parser.add_argument("--pool", type=int, default=16, help="candidates before refinement")
    parser.add_argument(
        "--refine-until", type=float, default=150.0, help="seconds of the part, for rounds to begin"
    )
    parser.add_argument("--finalists", type=int, default=6, help="candidates that are trained in full")
    parser.add_argument("--seeded", action="store_true", help="begin the pool with the hand-built networks")
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
        arguments.search_epochs = arguments.candidate_epochs = arguments.finalists = 2
        arguments.pool = 3
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
        names = itertools.product(range(arguments.seeds), (*HAND_BUILT, "random", *arguments.beside))
        found = pool.train(results, [Training(name, name, beauty, seed, variant) for seed, name in names])
        case = "beauty" if arguments.seeds == SEEDS else f"beauty-{arguments.seeds}seeds"
        record(results, case, found, arguments.jobs)
        better = arguments.no_more_than or max(
            HAND_BUILT, key=lambda name: sum(run["test_ndcg"] for run in found[name])
        )
    if "search" in arguments.parts:
        limit = Limit(better, beauty, variant)
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
