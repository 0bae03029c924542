import random
import sys
from collections import defaultdict
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
    """In place of a pool of processes: α says little, and what validates best attends most often."""

    def __init__(self):
        self.trained = []

    def search(self, results, searches):
        alpha = {"cell": torch.full((6, 8), 1 / 8).tolist(), "head": [[1.0, 0.0, 0.0, 0.0]]}
        return [{"genotype": str(load_genotype("HSTU")), "alpha": alpha} for _ in searches]

    def train(self, results, trainings):
        self.trained += trainings
        found = defaultdict(list)
        for training in trainings:
            run = {key: 0.0 for key, _ in FIGURES.values()}
            ndcg = training.genotype.count("attn_ln") / 10
            found[training.name].append(run | {"valid_ndcg": ndcg, "genotype": training.genotype})
        return found


@pytest.mark.parametrize(
    ("seeded", "refine_until", "attentions"), [(False, 0, 0), (False, float("inf"), 2), (True, 0, 1)]
)
def test_refinement_ends_in_the_best_recommender_within_the_limit(tmp_path, seeded, refine_until, attentions):
    """Two attentions are what SASRec's parameters allow for; the pool of two has none but SASRec's own."""
    write_made_up(tmp_path / "made_up.csv")
    dataset, variant, pool = f"seq:{tmp_path / 'made_up.csv'}", Variant(QUICK), AttentionIsAll()
    limit = Limit("SASRec", dataset, variant)
    arguments = {"strategies": ["darts"], "searches": 1, "search_epochs": 1, "candidate_epochs": 1}
    arguments |= {"quick": True, "pool": 2, "jobs": 8, "finalists": 2, "seeds": 3}
    results = Results("sequence_recommenders", tmp_path / "results.jsonl", "abc", "cpu")
    arguments |= {"seeded": seeded, "refine_until": refine_until}
    search_and_train(results, pool, dataset, limit, variant, SimpleNamespace(**arguments))
    assert [training.name for training in pool.trained[-3:]] == ["searched" + ", seeded" * seeded] * 3
    assert [training.seed for training in pool.trained[-3:]] == [0, 1, 2]
    (chosen,) = {training.genotype for training in pool.trained[-3:]}
    assert chosen.count("attn_ln") == attentions
    assert all(limit.admits(load_genotype(training.genotype)) for training in pool.trained)
    candidates = [training.genotype for training in pool.trained if training.variant.settings["epochs"] == 1]
    assert len(candidates) == len(set(candidates)) >= 2
