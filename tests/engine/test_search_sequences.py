"""A whole search for a recommender, and its training, on made-up histories."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from neuroexapt import evaluate, search
from neuroexapt.core.supernet import Supernet
from neuroexapt.engine.bilevel import Batch, BilevelStep, Strategy
from neuroexapt.engine.training import BestNetwork
from neuroexapt.errors import UserError
from neuroexapt.spaces.seqrec import SEQREC
from neuroexapt.strategies import STRATEGIES, get_strategy
from neuroexapt.strategies.darts import Darts
from tests.engine.tiny import tiny_settings as tiny_pictures
from tests.engine.tiny import write_tiny_npz


def tiny_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """An item mostly decides the next one."""
    rng = random.Random(0)
    lines = []
    for user in range(64):
        item = rng.randrange(20)
        history = []
        for _ in range(rng.randrange(6, 10)):
            history.append(str(item))
            item = (3 * item + 1) % 20 if rng.random() < 0.9 else rng.randrange(20)
        lines.append(f"user{user} {' '.join(history)}")
    (folder / "made.txt").write_text("\n".join(lines))
    return {
        "dataset": f"seq:{folder / 'made.txt'}",
        "space": "seqrec",
        "max_length": 8,
        "batch_size": 16,
        "init_channels": 8,
        "layers": 1,
        "out": folder / "run",
        "backend": "cpu",
        "quiet": True,
        **changes,
    }


def test_a_search_ends_with_a_trained_recommender(tmp_path: Path) -> None:
    found = search(**tiny_settings(tmp_path, epochs=2, train_epochs=3))
    assert found.result["test_accuracy"] == found.curves["inherit"]["test_accuracy"][-1]
    assert 0 < found.result["test_ndcg"] <= found.result["test_accuracy"] <= 1
    assert found.result["genotype"] == found.curves["search"]["genotype"][-1]
    assert len(found.curves["search"]["alpha"][-1]["head"][0]) == 4
    assert "Head" in (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / "split.json").exists()  # α has the validation items


@pytest.mark.gpu
def test_steps_of_recommenders_run_as_graphs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = tiny_settings(tmp_path, epochs=2, train_epochs=2, backend="cuda", quiet=False)
    assert search(**settings).result["test_ndcg"] > 0
    assert "launching every kernel by itself" not in caplog.text


def test_a_budget_holds_for_a_recommender(tmp_path: Path) -> None:
    found = search(**tiny_settings(tmp_path, epochs=1, train_epochs=0, max_params=1_000))
    assert found.result["params"] == found.result["parameters"] <= 1_000


@pytest.mark.parametrize("limit", ["max_flops", "max_latency_ms"])
def test_recommenders_are_measured_by_running_them(tmp_path: Path, limit: str) -> None:
    found = search(**tiny_settings(tmp_path, epochs=1, train_epochs=0, **{limit: 1e9}))
    assert 0 < found.result[limit.removeprefix("max_")] < 1e9


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("pc-darts", "lambda-darts")])
def test_every_other_strategy_takes_steps(name: str) -> None:
    torch.manual_seed(0)
    supernet = SEQREC.supernet(num_items=9, max_length=4, has_times=False, channels=4, layers=1)
    strategy = get_strategy(name)
    strategy.shape(supernet)
    for epoch in range(4):
        strategy.start_epoch(supernet, epoch, 4)
    step = make_step(supernet, strategy)
    batch = Batch(torch.randint(1, 10, (3, 1, 4)), torch.randint(1, 10, (3, 4)))
    assert all(value.isfinite() for value in step(batch, batch))
    assert {name: w.shape for name, w in strategy.mixing(supernet.choices()).items()} == {
        "cell": (6, 8),
        "head": (1, 4),
    }


@pytest.mark.parametrize(("name", "left"), [("p-darts", (3, 2)), ("drnas-progressive", (4, 2))])
def test_candidates_of_heads_are_ruled_out_by_their_own_number(name: str, left: tuple[int, int]) -> None:
    supernet = SEQREC.supernet(num_items=9, max_length=4, has_times=False, channels=4, layers=1)
    get_strategy(name).start_epoch(supernet, 3, 4)
    assert tuple(supernet.kept(cell).sum(dim=-1).max().item() for cell in ("cell", "head")) == left


def make_step(supernet: Supernet, strategy: Strategy) -> BilevelStep:
    weight_optimizer = torch.optim.SGD(supernet.weights(), 0.1)
    arch_optimizer = torch.optim.Adam(supernet.arch_parameters(), 0.1)
    return BilevelStep(supernet, strategy, weight_optimizer, arch_optimizer, grad_clip=5.0, task=SEQREC.task)


def test_a_step_trains_what_is_left_when_a_node_leads_nowhere() -> None:
    torch.manual_seed(0)
    supernet = SEQREC.supernet(num_items=9, max_length=4, has_times=False, channels=4, layers=1)
    kept = torch.ones(6, len(SEQREC.primitives), dtype=torch.bool)
    kept[[2, 4], 1:] = False  # of the edges that leave the first node, nothing but none
    supernet.keep("cell", kept)
    step = make_step(supernet, Darts())
    batch = Batch(torch.randint(1, 10, (3, 1, 4)), torch.randint(1, 10, (3, 4)))
    before = supernet.alphas["cell"].clone()
    step(batch, batch)
    changed = (supernet.alphas["cell"] != before).any(dim=1).tolist()
    assert changed == [False, True, False, True, False, True]


def test_training_learns_and_keeps_the_epoch_that_validates_best(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, genotype="SASRec", epochs=12, patience=2, learning_rate=0.02)
    found = evaluate(**settings)
    curves = found.curves["evaluate"]
    best = max(range(len(curves["valid_ndcg"])), key=curves["valid_ndcg"].__getitem__)
    assert curves["test_ndcg"][best:] == [curves["test_ndcg"][best]] * (len(curves["test_ndcg"]) - best)
    assert found.result["test_ndcg"] == curves["test_ndcg"][best]
    assert len(curves["epoch"]) in (best + 3, 12)
    assert found.result["test_accuracy"] > 0.75  # ten of twenty by chance


def test_the_last_line_tells_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(**tiny_settings(tmp_path, genotype="HSTU", epochs=1, quiet=False)).result
    figures = f"test accuracy {result['test_accuracy']:.2%}, ndcg {result['test_ndcg']:.2%}, "
    assert capsys.readouterr().err.splitlines()[-1].startswith(figures)


def test_pictures_and_histories_are_not_mixed_up(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    with pytest.raises(UserError, match=r"holds histories, .* is for pictures; choose --space seqrec"):
        search(**{**settings, "space": "darts"})
    with pytest.raises(UserError, match=r"holds pictures, .* is for histories; choose --space darts"):
        search(**{**settings, "dataset": f"npz:{write_tiny_npz(tmp_path / 'tiny.npz')}"})


@pytest.mark.parametrize(("name", "value"), [("controls", "random,resnet18"), ("recipe", "fast")])
def test_controls_and_recipes_for_pictures_are_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(UserError, match="is for pictures; leave it out for histories"):
        evaluate(**tiny_settings(tmp_path, **{name: value}))


@pytest.mark.parametrize("space", ["seqrec", "seqrec-sampled"])
def test_trainings_in_bf16_compare_in_one_dtype(tmp_path: Path, space: str) -> None:
    settings = tiny_settings(tmp_path, space=space, genotype="SASRec", epochs=1, precision="bf16")
    assert evaluate(**settings).result["test_ndcg"] > 0


def test_the_best_network_survives_a_checkpoint() -> None:
    best, network = BestNetwork(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2)
    assert best.beaten_by(network, 0.5, epoch=3)
    best.test = {"loss": 1.0}
    assert not best.beaten_by(torch.nn.Linear(2, 2), 0.5, epoch=4)
    restored = BestNetwork(torch.nn.Linear(2, 2))
    restored.load_state_dict(best.state_dict())
    assert torch.equal(restored.network.weight, network.weight)
    assert (restored.epoch, restored.value, restored.test) == (3, 0.5, {"loss": 1.0})


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"cutout": 4, "flip": True}, "--flip, --cutout"), ({"recompute": True}, "--recompute")],
)
def test_settings_of_pictures_are_refused(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"^only .* {named}; leave"):
        search(**tiny_settings(tmp_path, **settings))
    assert not (tmp_path / "run").exists()


def test_settings_of_histories_are_refused_for_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^only histories have --max-length; leave it out for pictures"):
        search(**tiny_pictures(tmp_path, max_length=20))
    assert not (tmp_path / "run").exists()


def test_recommenders_drop_no_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="drop no paths; leave out --drop-path"):
        evaluate(**tiny_settings(tmp_path, genotype="HSTU", drop_path=0.1))
