from pathlib import Path

import pytest
import torch

import neuroexapt
from neuroexapt.core.genotypes import GENOTYPES
from neuroexapt.engine.config import SearchConfig, make_config
from neuroexapt.engine.stopping import PREFERRED, Stopping, count_skips, how_sure, preference
from neuroexapt.errors import UserError
from neuroexapt.spaces import NAS_BENCH_201
from tests.engine.tiny import tiny_settings
from tests.strategies.small import make_phase


def weights(epoch: int) -> dict[str, torch.Tensor]:
    return {"normal": torch.tensor([float(epoch)])}


def run(stopping: Stopping, *, skips: list[int], eigenvalues: list[float]) -> int:
    """Epochs until it stops."""
    for epoch, (skip, eigenvalue) in enumerate(zip(skips, eigenvalues, strict=True)):
        if stopping.after_epoch(weights(epoch), skips=skip, eigenvalue=eigenvalue, seconds=60.0 * epoch):
            return epoch
    return len(skips)


def test_skips_stop_at_the_third_and_the_epoch_before_counts() -> None:
    stopping = Stopping("skips", None)
    assert run(stopping, skips=[0, 1, 2, 2, 3, 4], eigenvalues=[0] * 6) == 4
    assert stopping.weights == weights(3)
    assert "3 skip connections" in stopping.reason


def test_growing_eigenvalues_stop_and_the_epoch_five_before_counts() -> None:
    stopping = Stopping("eigenvalue", None)
    values = [1.0] * 12 + [1.1, 1.2, 2.0, 3.0, 4.0]
    stopped = run(stopping, skips=[8] * 17, eigenvalues=values)
    means = [sum(values[i - 4 : i + 1]) / 5 for i in range(4, 17)]  # of epochs 4, 5, …
    first = next(i for i in range(5, len(means)) if means[i - 5] / means[i] < 0.75) + 4
    assert stopped == first
    assert stopping.weights == weights(first - 5)


def test_minutes_stop_in_the_epoch_in_which_they_are_over() -> None:
    stopping = Stopping("", 2.5)
    assert run(stopping, skips=[8] * 5, eigenvalues=[0] * 5) == 3
    assert stopping.weights is None, "the search stands for what it is"


def test_without_a_criterion_nothing_stops() -> None:
    stopping = Stopping("", None)
    assert run(stopping, skips=[8] * 20, eigenvalues=[2.0**i for i in range(20)]) == 20
    assert stopping.weights is None


def test_state_goes_on_where_it_was() -> None:
    whole, first, second = (Stopping("eigenvalue", None) for _ in range(3))
    values = [1.0] * 10 + [4.0] * 6
    stopped = run(whole, skips=[0] * 16, eigenvalues=values)
    run(first, skips=[0] * 8, eigenvalues=values[:8])
    second.load_state_dict(first.state_dict())
    assert run(second, skips=[0] * 8, eigenvalues=values[8:]) + 8 == stopped
    assert second.weights is not None


def test_skips_are_those_of_the_normal_cell() -> None:
    assert count_skips(GENOTYPES["DARTS_V1"]) == (3, 8)
    skip = torch.tensor([0.0, 1, 0, 0, 0]).expand(6, 5)
    assert count_skips(NAS_BENCH_201.derive({"cell": skip})) == (6, 6)


def test_a_collapse_is_said_once_and_names_what_avoids_it(small_space: None) -> None:
    phase, said = make_phase(), []
    phase.prepare_execution(said.append)
    with torch.no_grad():
        phase.supernet.alphas["normal"][:, 1] = 5
    for epoch in range(2):
        record = phase.end_epoch(epoch)
        assert phase.reason_to_stop(record, 0.0) == ""
    assert record["skips"] == 4
    assert record["skip_share"] > 0.9
    (message,) = said
    assert "4 of the 4 operations of a normal cell are skip connections" in message
    assert "drnas" in message


@pytest.mark.parametrize(("edges", "is_collapse"), [([0], False), ([0, 2], True)])
def test_half_of_a_cell_in_skip_connections_is_a_collapse(
    edges: list[int], is_collapse: bool, small_space: None
) -> None:
    phase, said = make_phase(), []
    phase.prepare_execution(said.append)
    with torch.no_grad():
        phase.supernet.alphas["normal"][:, 2] = 1
        phase.supernet.alphas["normal"][edges, 1] = 5
    record = phase.end_epoch(0)
    phase.reason_to_stop(record, 0.0)
    assert record["skips"] == len(edges)
    assert bool(said) == is_collapse


def test_skips_by_chance_do_not_stop_a_search(small_space: None) -> None:
    """α is as good as untouched; the genotype has more of them than a cell may have."""
    phase = make_phase(stop="skips")
    phase.prepare_execution(print)
    for preferred, reason in ((0.01, ""), (5.0, "4 skip connections in the normal cell")):
        with torch.no_grad():
            phase.supernet.alphas["normal"][:, 1] = preferred
        assert phase.reason_to_stop(phase.end_epoch(0), 0.0) == reason


@pytest.mark.parametrize("kept", [[True, True, True, True], [False, True, True, False]])
def test_chance_is_no_collapse(kept: list[bool], small_space: None) -> None:
    phase, said = make_phase(), []
    phase.prepare_execution(said.append)
    phase.supernet.keep("normal", torch.tensor(kept))
    with torch.no_grad():
        phase.supernet.alphas["normal"][:, 1] = 0.01
    record = phase.end_epoch(0)
    phase.reason_to_stop(record, 0.0)
    assert record["skips"] == 4
    assert not said


def test_preference_is_of_the_strongest_over_the_mean() -> None:
    even, decided = torch.full((3, 4), 0.25), torch.tensor([[1.0, 0, 0, 0]])
    kept = {"normal": torch.ones(3, 4, dtype=torch.bool), "reduce": torch.ones(1, 4, dtype=torch.bool)}
    assert preference({"normal": even}, kept) == 1
    assert preference({"normal": even, "reduce": decided}, kept) == (3 * 1 + 1 * 4) / 4


def test_an_even_alpha_is_called_chance() -> None:
    assert "little more than chance" in how_sure(1.01)
    assert how_sure(2.5).endswith("2.50 times the weight of its mean one, where 1 is no preference.")


@pytest.mark.parametrize("strategy", ["p-darts", "drnas-progressive"])
def test_what_was_ruled_out_makes_no_preference(strategy: str, small_space: None) -> None:
    phase = make_phase(strategy=strategy, arch_learning_rate=1e-9)
    phase.strategy.start_epoch(phase.supernet, 3, 4)
    assert not phase.supernet.kept("normal").all()
    assert phase.preference() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(("learning_rate", "is_chance"), [(1e-6, True), (2.0, False)])
def test_a_genotype_by_chance_is_called_so(
    learning_rate: float, is_chance: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = tiny_settings(tmp_path, arch_learning_rate=learning_rate, epochs=1, train_epochs=0)
    found = neuroexapt.search(**{**settings, "quiet": False})
    assert ("little more than chance" in capsys.readouterr().err) == is_chance
    assert (found.curves["search"]["preference"][-1] < PREFERRED) == is_chance
    assert found.result["test_examples"] == 12
    assert (found.result["baseline"], found.result["baseline_accuracy"]) == ("“0”", 1 / 3)


def test_a_run_ends_early_and_is_finished_then(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, epochs=3, train_epochs=0, minutes=1e-6)
    result = neuroexapt.search(**settings)
    assert len(result.curves["search"]["train_loss"]) == 1
    assert result.curves["search"]["step"] == [1], "an epoch may take longer than the minutes"
    assert "minutes are over" in result.result["stopped"]
    assert neuroexapt.search(resume=settings["out"], quiet=True).genotype == result.genotype
    assert neuroexapt.derive(settings["out"]) == result.genotype


@pytest.mark.parametrize(
    ("settings", "message"), [({"stop": "soon"}, "unknown stop 'soon'"), ({"minutes": 0}, "minutes=0")]
)
def test_refuses(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(SearchConfig, settings)
