import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neuroexapt.core.genotypes import CellGenotype, RecommenderGenotype, load_genotype

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from _harness import Results
from sequence_recommenders import (
    FIGURES,
    QUICK,
    Candidates,
    Limit,
    Variant,
    child_of,
    computed_by,
    drawn_from,
    one_hot,
    search_and_train,
    write_made_up,
)


def recommender(arch, head="last"):
    return RecommenderGenotype(CellGenotype.from_text(arch), head)


def test_recommenders_that_only_skip_differently_count_once(tmp_path):
    write_made_up(tmp_path / "made_up.csv")
    limit = Limit("HSTU", f"seq:{tmp_path / 'made_up.csv'}", Variant(QUICK))
    hstu = load_genotype("HSTU")
    same = recommender("|none~0|+|hstu_2h~0|none~1|+|none~0|none~1|skip_connect~2|")
    twice = recommender("|hstu_2h~0|+|none~0|skip_connect~1|+|none~0|skip_connect~1|skip_connect~2|")
    added = recommender("|hstu_2h~0|+|hstu_2h~0|none~1|+|none~0|skip_connect~1|skip_connect~2|")
    other_head = recommender(str(hstu.cell), "dot_interaction")
    assert len({computed_by(g) for g in (hstu, same, twice, added, other_head)}) == 4
    candidates = Candidates(limit)
    assert candidates.new_ones([hstu, same, twice, added, other_head], 9) == [str(hstu), str(twice)]
    assert candidates.new_ones([same], 9) == []


def test_recommenders_are_drawn_by_alpha_and_children_differ_in_one_choice():
    sasrec = load_genotype("SASRec")
    alpha = one_hot(sasrec)
    assert drawn_from(alpha, torch.Generator()) == sasrec
    rng = random.Random(0)
    hstu = load_genotype("HSTU")  # of a single path, which stays one
    children = [child_of(hstu, rng) for _ in range(50)]
    assert len(set(children)) > 10
    for child in children:
        changed = [a != b for a, b in zip(choices(child), choices(hstu), strict=True)]
        assert sum(changed) <= 1


def choices(genotype):
    return [op for cell in genotype.cells.values() for *_, op in cell.edges]


class AttentionIsAll:
    """In place of a pool of processes: α says little, and what validates best attends most often, but that
    from ``lucky`` seeds not to attend is better than to attend once.
    """

    def __init__(self, lucky=()):
        self.trained, self.lucky = [], lucky

    def search(self, results, searches):
        alpha = {"cell": torch.full((6, 8), 1 / 8).tolist(), "head": [[1.0, 0.0, 0.0, 0.0]]}
        return [{"genotype": str(load_genotype("HSTU")), "alpha": alpha} for _ in searches]

    def train(self, results, trainings):
        self.trained += trainings
        found = defaultdict(list)
        for training in trainings:
            run = {key: 0.0 for key, _ in FIGURES.values()}
            attentions = training.genotype.count("attn_ln")
            ndcg = 0.15 if training.seed in self.lucky and not attentions else attentions / 10
            found[training.name].append(run | {"valid_ndcg": ndcg, "genotype": training.genotype})
        return found


class SearchOfMadeUp:
    """The part ``search`` on made-up data, in ``pool``: what it trained and recorded."""

    def __init__(self, folder, pool, **arguments):
        write_made_up(folder / "made_up.csv")
        dataset, variant = f"seq:{folder / 'made_up.csv'}", Variant(QUICK)
        self.limit = Limit("SASRec", dataset, variant)
        usual = {"strategies": ["darts"], "searches": 1, "search_epochs": 1, "candidate_epochs": 1}
        usual |= {"quick": True, "pool": 2, "jobs": 8, "finalists": 2, "seeds": 3, "refine_until": 0}
        results = Results("sequence_recommenders", folder / "results.jsonl", "abc", "cpu")
        search_and_train(results, pool, dataset, self.limit, variant, SimpleNamespace(**usual | arguments))
        self.briefly = [training for training in pool.trained if training.variant.settings["epochs"] == 1]
        self.in_full = [training for training in pool.trained if training not in self.briefly]
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        self.recorded = {(line["implementation"], line["metric"]): line for line in lines}


@pytest.mark.parametrize(
    ("seeded", "refine_until", "attentions"), [(False, 0, 0), (False, float("inf"), 2), (True, 0, 1)]
)
def test_refinement_ends_in_the_best_recommender_within_the_limit(tmp_path, seeded, refine_until, attentions):
    """Two attentions are what SASRec's parameters allow for; the pool of two has none but SASRec's own."""
    search = SearchOfMadeUp(tmp_path, AttentionIsAll(), seeded=seeded, refine_until=refine_until)
    (chosen,) = set(search.recorded["searched" + ", seeded" * seeded, "genotypes"]["values"])
    assert chosen.count("attn_ln") == attentions
    trained = search.briefly + search.in_full
    assert all(search.limit.admits(load_genotype(training.genotype)) for training in trained)
    candidates = [training.genotype for training in search.briefly if training.seed == 3]
    assert len(candidates) == len(set(candidates)) >= 2


@pytest.mark.parametrize("finalists", [1, 2])
def test_a_lucky_seed_makes_neither_a_finalist_nor_the_result(tmp_path, finalists):
    """With the seeds that are lucky alone, HSTU would come before SASRec."""
    pool = AttentionIsAll(lucky=(0, 3))
    search = SearchOfMadeUp(tmp_path, pool, seeded=True, finalists=finalists)
    assert search.recorded["searched, seeded", "genotypes"]["values"] == [str(load_genotype("SASRec"))] * 3
    assert search.recorded["searched, seeded", "valid_ndcg@10"]["values"] == [0.1] * 3
    trainings = Counter(training.genotype for training in search.in_full)
    assert len(trainings) == finalists
    assert set(trainings.values()) == {3}
    assert {training.seed for training in search.briefly}.isdisjoint(t.seed for t in search.in_full)
