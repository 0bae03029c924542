"""What the report concludes: intervals, chance, and commands that can be run."""

import pytest

from neuroexapt.report.summary import (
    chance_difference,
    how_sure,
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


def test_chance_is_larger_with_fewer_examples():
    assert chance_difference(0.5, 0.5, 200) == pytest.approx(0.098)
    assert "can be chance" in worth_of_inheriting(0.62, 0.6075, 400)
    assert "more than chance" in worth_of_inheriting(0.62, 0.6075, 400_000)


def test_an_even_alpha_is_called_chance():
    assert "little more than chance" in how_sure(1.01)
    assert how_sure(2.5).endswith("2.50 times the weight of its mean one.")


def test_next_command_names_the_same_data(tmp_path):
    _, command = next_command("search", CONFIG, tmp_path / "run", finished=True)
    assert command.startswith(
        f"neuroexapt evaluate --genotype {tmp_path / 'run'} --dataset 'folder:my pets' --im"
    )
    assert "--image-size 32 --recipe fast --seeds 3 --controls random,resnet18" in command
    assert "--space" not in command
    assert "--max-length" not in command


def test_next_command_of_recommenders_leaves_out_what_is_for_pictures(tmp_path):
    config = {"dataset": "seq:a.csv", "space": "seqrec", "max_length": 20}
    _, command = next_command("search", config, tmp_path, finished=True)
    assert command.endswith("--dataset seq:a.csv --space seqrec --max-length 20 --seeds 3 --controls random")


def test_next_command_goes_on_with_what_is_unfinished(tmp_path):
    config = {"dataset": "digits", "space": "darts"}
    assert (
        next_command("evaluate", config, tmp_path, finished=False)[1]
        == f"neuroexapt evaluate --resume {tmp_path}"
    )
    assert next_command("evaluate", config, tmp_path, finished=True) is None


def test_no_command_knows_a_space_of_the_users_own(tmp_path):
    assert next_command("search", {**CONFIG, "space": "mine"}, tmp_path, finished=True) is None
