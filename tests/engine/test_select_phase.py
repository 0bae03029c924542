from pathlib import Path

import pytest
import torch

import neuroexapt
from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint
from neuroexapt.engine.config import SearchConfig, make_config
from neuroexapt.engine.select_phase import SELECTIONS, Perturbation, SelectPhase, Shrinking, _without
from neuroexapt.errors import UserError
from tests.engine.tiny import tiny_settings
from tests.strategies.small import SPACE, make_phase

pytestmark = pytest.mark.usefixtures("small_space")


def make_selection(name: str, strategy: str = "darts") -> SelectPhase:
    search = make_phase(strategy=strategy, selection=name)
    return SELECTIONS[name](search, search._config)


def run(selection: SelectPhase, epoch: int) -> dict:
    for _ in selection.steps(epoch, 0):
        pass
    return selection.end_epoch(epoch)


def test_the_candidate_without_which_accuracy_falls_most_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = make_selection("perturbation")
    assert isinstance(selection, Perturbation)
    assert selection.epochs == 2 * 5 + 1

    def accuracy(weights: dict) -> float:
        """The average pool matters on odd edges, the convolution on others; so does edge 4 of both types."""
        assert selection.search.supernet.training, "by the statistics of batches"
        columns = [3 if edge % 2 else 2 for edge in range(5)]
        return sum(
            (w[range(5), columns] > 0).sum().item() + (w[4].sum() > 0).item() for w in weights.values()
        )

    monkeypatch.setattr(selection, "accuracy_at", accuracy)
    selection.search.supernet.eval()
    records = [selection.end_epoch(epoch) for epoch in range(selection.epochs)]
    places = [(record["cell"], record["edge"]) for record in records[:-1]]
    assert sorted(places) == sorted(selection.edges), "each edge once"
    assert places != selection.edges, "in random order"
    for cell in ("normal", "reduce"):
        chosen = selection.search.supernet.kept(cell).float().argmax(dim=-1)
        assert chosen.tolist() == [2, 3, 2, 3, 2]
        assert (selection.search.supernet.kept(cell).sum(dim=-1) == 1).all()
    genotype = selection.genotype()
    assert ("sep_conv_3x3", 2) in genotype.normal, "edge 4, the strongest, enters the second node"
    assert records[-1]["genotype"] == genotype.to_dict()


def test_weights_adapt_at_a_tenth_of_the_first_learning_rate() -> None:
    selection = make_selection("perturbation")
    next(iter(selection.steps(0, 0)))
    rate = selection.search.weight_optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(selection._config.learning_rate / 10)


def test_none_is_not_chosen_where_no_genotype_can_hold_it() -> None:
    selection = make_selection("perturbation")
    assert selection.candidates("normal", 0) == [1, 2, 3]
    selection.keep("normal", 0, [3])
    assert selection.candidates("normal", 0) == [3]
    assert selection.candidates("normal", 1) == [1, 2, 3]


def test_shrinking_drops_the_worst_of_every_edge_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = make_selection("shrink", "random")
    assert isinstance(selection, Shrinking)
    means = {cell: [[0.9, 0.5, 0.3, 0.7]] * 5 for cell in ("normal", "reduce")}
    monkeypatch.setattr(selection, "_mean_accuracies", lambda number: means)
    left = [selection.end_epoch(epoch).get("candidates") for epoch in range(selection.epochs)]
    assert left == [2, 1, None]
    assert {op for op, _ in selection.genotype().normal} == {"avg_pool_3x3"}


def test_a_candidates_mean_is_that_of_the_paths_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are as good as they have separable convolutions; none leads through what was ruled out."""
    selection = make_selection("shrink", "random")
    assert isinstance(selection, Shrinking)
    selection.keep("reduce", 3, [1, 3])
    seen, pictures = [], []

    def score(images: torch.Tensor, labels: torch.Tensor, *path: torch.Tensor) -> torch.Tensor:
        seen.append(path)
        pictures.append(images)
        return torch.stack([torch.zeros(()), len(labels) * sum(p[:, 2].mean() for p in path) / 2])

    monkeypatch.setattr(selection, "_score", score)
    means = selection._mean_accuracies(0)
    assert all((p.sum(dim=-1) == 1).all() and not p[:, 0].any() for path in seen for p in path)
    assert all(max(range(4), key=row.__getitem__) == 2 for row in means["normal"])
    assert means["reduce"][3][2] == 0
    assert torch.equal(pictures[0], next(iter(selection.search.valid_loader.forever(0)))[0])


@pytest.mark.parametrize("name", SELECTIONS)
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    strategy = "random" if name == "shrink" else "darts"
    whole = make_selection(name, strategy)
    run(whole, 0)
    save_checkpoint(tmp_path / "checkpoint", whole.state_dict())
    random_state = torch.get_rng_state()
    expected = [run(whole, epoch) for epoch in range(1, whole.epochs)]

    resumed = make_selection(name, strategy)
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint"))
    torch.set_rng_state(random_state)
    assert [run(resumed, epoch) for epoch in range(1, whole.epochs)] == expected
    assert resumed.genotype() == whole.genotype()


def test_removal_leaves_the_weights_themselves_alone() -> None:
    weights = {"normal": torch.ones(2, 3), "reduce": torch.ones(2, 3)}
    assert torch.equal(_without(weights, "normal", (1, 2))["normal"], torch.tensor([[1.0, 1, 1], [1, 1, 0]]))
    assert torch.equal(_without(weights, "reduce", (0,))["reduce"], torch.tensor([[0.0, 0, 0], [1, 1, 1]]))
    assert all(w.all() for w in weights.values())


def test_a_whole_run_selects(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, space=SPACE.name, strategy="random", epochs=1, train_epochs=0)
    result = neuroexapt.search(**settings)
    assert result.result["seconds_by_phase"].keys() == {"search", "select", "inherit"}
    assert neuroexapt.derive(settings["out"]) == result.genotype
    assert neuroexapt.search(resume=settings["out"], quiet=True).genotype == result.genotype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "best"}, "unknown selection 'best'; choose one of argmax, perturbation, shrink"),
        ({"strategy": "random", "selection": "argmax"}, "random learns no α to take the largest of"),
        ({"strategy": "gdas", "selection": "perturbation"}, "the weights of gdas never learned to be summed"),
        ({"strategy": "random", "stop": "skips"}, "--stop watches α, which random leaves as it is"),
        ({"stop": "eigenvalue", "selection": "shrink"}, "--stop eigenvalue goes back to an earlier α"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(SearchConfig, settings)
