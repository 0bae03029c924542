"""What the report concludes: intervals, chance, and commands that can be run."""

import pytest

from neuroexapt.report.summary import (
    chance_difference,
    how_good,
    interval,
    next_command,
    worth_of_inheriting,
)

CONFIG = {
    "dataset": "folder:my pets",
    "space": "darts",
    "image_size": 32,
    "max_length": 50,
}


def test_interval_is_wilsons():
    # Example of Newcombe, Statistics in Medicine 1998: 81 of 263.
    assert interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = interval(1.0, 10)
    assert 0.7 < low < high <= 1


def test_hits_of_recommenders_are_explained():
    result = {"test_examples": 200, "test_accuracy": 0.1, "baseline": "the ten commonest items"}
    text = how_good({**result, "baseline_accuracy": 0.05, "test_ndcg": 0.04})
    assert text.startswith("10.00 % of 200 test examples are right, which means that the next item is among")
    assert text.endswith("To answer the ten commonest items every time would be right for 5.00 %.")


def test_a_network_that_was_not_trained_is_said_to_be_none():
    result = {"test_examples": 200, "test_accuracy": 0.1, "baseline": "1", "baseline_accuracy": 0.1}
    assert "was not trained after the search" in how_good(result, is_trained=False)
    assert "not trained" not in how_good(result)


def test_chance_is_larger_with_fewer_examples():
    assert chance_difference(0.5, 0.5, 200) == pytest.approx(0.098)
    assert "can be chance" in worth_of_inheriting(0.62, 0.6075, 400)
    assert "more than chance" in worth_of_inheriting(0.62, 0.6075, 400_000)


def test_next_command_names_the_same_data(tmp_path):
    _, command = next_command("search", CONFIG, {"input_size": [32, 32]}, tmp_path / "run")
    assert command.startswith(
        f"neuroexapt evaluate --genotype {tmp_path / 'run'} --dataset 'folder:my pets' --im"
    )
    assert "--image-size 32 --recipe fast --seeds 3 --controls random,resnet18" in command
    assert "--space" not in command
    assert "--max-length" not in command


def test_next_command_spares_small_pictures_the_auxiliary_head(tmp_path):
    _, command = next_command("search", CONFIG, {"input_size": [32, 20]}, tmp_path)
    assert "--recipe fast --no-auxiliary --seeds 3" in command


def test_next_command_of_recommenders_leaves_out_what_is_for_pictures(tmp_path):
    config = {"dataset": "seq:a.csv", "space": "seqrec", "max_length": 20}
    _, command = next_command("search", config, {"input_size": [20]}, tmp_path)
    assert command.endswith("--dataset seq:a.csv --space seqrec --max-length 20 --seeds 3 --controls random")


def test_next_command_goes_on_with_what_is_unfinished(tmp_path):
    config = {"dataset": "digits", "space": "darts"}
    assert next_command("evaluate", config, {}, tmp_path)[1] == f"neuroexapt evaluate --resume {tmp_path}"
    _, command = next_command("evaluate", config, {"parameters": 1}, tmp_path)
    assert command == f"neuroexapt export {tmp_path}"


def test_no_command_knows_a_space_of_the_users_own(tmp_path):
    assert next_command("search", {**CONFIG, "space": "mine"}, {}, tmp_path) is None
