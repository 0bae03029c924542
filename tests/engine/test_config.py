import json
from pathlib import Path

import pytest

from neuroexapt.engine.config import PRESETS, RECIPES, EvaluateConfig, SearchConfig, make_config
from neuroexapt.errors import UserError
from neuroexapt.spaces import SEQREC


def test_explicit_over_file_over_preset_over_default(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"epochs": 7, "layers": 5}))
    config = make_config(SearchConfig, {"epochs": 9}, file)
    assert (config.epochs, config.layers) == (9, 5)
    assert config.init_channels == PRESETS["digits"][SearchConfig]["init_channels"]
    assert config.momentum == 0.9


def test_defaults_are_those_of_the_paper() -> None:
    config = make_config(SearchConfig, {"dataset": "cifar10"})
    assert (config.epochs, config.batch_size, config.layers, config.init_channels) == (50, 64, 8, 16)
    assert (config.learning_rate, config.learning_rate_min, config.arch_learning_rate) == (0.025, 0.001, 3e-4)
    assert (config.weight_decay, config.arch_weight_decay, config.grad_clip) == (3e-4, 1e-3, 5.0)
    retrain = make_config(EvaluateConfig, {"dataset": "cifar10"})
    assert (retrain.epochs, retrain.batch_size, retrain.layers, retrain.init_channels) == (600, 96, 20, 36)
    assert (retrain.drop_path, retrain.auxiliary_weight, retrain.cutout) == (0.2, 0.4, 16)


def test_a_recipe_changes_what_was_not_asked_for() -> None:
    fast = make_config(EvaluateConfig, {"dataset": "cifar10", "recipe": "fast", "batch_size": 128})
    published = make_config(EvaluateConfig, {"dataset": "cifar10", "batch_size": 128})
    changed = {name for name in vars(fast) if getattr(fast, name) != getattr(published, name)}
    assert changed == {"recipe", *RECIPES["fast"]} - {"batch_size"}
    assert fast.epochs == published.epochs / 10
    assert (fast.layers, fast.init_channels, fast.cutout) == (20, 36, 16)
    digits = make_config(EvaluateConfig, {"recipe": "fast"})
    assert (digits.epochs, digits.layers) == (10, PRESETS["digits"][EvaluateConfig]["layers"])


def test_a_saved_config_stands_for_its_recipe(tmp_path: Path) -> None:
    saved = make_config(EvaluateConfig, {"recipe": "fast", "epochs": 3})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(saved.to_dict()))
    assert make_config(EvaluateConfig, {"out": saved.out}, file) == saved
    with pytest.raises(UserError, match="holds the settings of recipe fast; leave out --recipe or --config"):
        make_config(EvaluateConfig, {"recipe": "published"}, file)


def test_saved_config_reads_back() -> None:
    config = make_config(SearchConfig, {"dataset": "cifar10", "out": "somewhere", "flip": False, "cutout": 4})
    saved = json.loads(json.dumps(config.to_dict()))
    assert not {"out", "overwrite"} & set(saved), "loading the settings of a run must not replace that run"
    assert make_config(SearchConfig, {**saved, "out": config.out}) == config


@pytest.mark.parametrize("dataset", PRESETS)
@pytest.mark.parametrize("cls", [SearchConfig, EvaluateConfig])
def test_presets_are_valid(dataset: str, cls: type) -> None:
    assert make_config(cls, {"dataset": dataset}).dataset == dataset


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0: choose a value above 0"),
        ({"epochs": 2.5}, "epochs=2.5: expected int"),
        ({"epochs": True}, "epochs=True: expected int"),
        ({"flip": 1}, "flip=1: expected bool"),
        ({"out": 3}, "out=3: expected a path"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: choose a finite number"),
        ({"grad_clip": float("inf")}, "grad_clip=inf: choose a finite number"),
        ({"batch_size": -4}, "batch_size=-4"),
        ({"train_portion": 1.0}, "train_portion=1.0: choose a share"),
        ({"epochs": 3, "warmup_epochs": 3}, "leaves none of 3 epochs"),
        ({"seed": -1}, "seed=-1"),
        ({"epochz": 3}, "unknown setting 'epochz' for SearchConfig; known are dataset"),
    ],
)
def test_refuses(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(SearchConfig, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "slow"}, "unknown recipe 'slow'; choose one of published, fast"),
        ({"recipe": 3}, "recipe=3: expected str"),
        ({"seeds": 0}, "seeds=0: choose a value above 0"),
        ({"controls": "random, resnet50"}, "unknown control 'resnet50'; choose of random, resnet18"),
        ({"control_budget": "time"}, "--control-budget time is of controls; add --controls, or leave it out"),
        ({"ema": 1.0}, "ema=1.0: choose a value from 0 to below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1: choose a value from 0 to below 1"),
        ({"drop_path": 1}, "drop_path=1.0: choose a value from 0 to below 1"),
        ({"learning_rate_warmup": 1.5}, "learning_rate_warmup=1.5: choose a value from 0 to below 1"),
    ],
)
def test_refuses_to_evaluate(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(EvaluateConfig, settings)


def test_no_criterion_is_no_choice() -> None:
    with pytest.raises(UserError, match=r"^unknown stop 'soon'; choose one of skips, eigenvalue$"):
        make_config(SearchConfig, {"stop": "soon"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "skips", "space": "s4"}, "s4 has no skip connections; leave out --stop skips"),
        ({"stop": "eigenvalue", "strategy": "gdas"}, "the weights of gdas never learned to be summed"),
    ],
)
def test_refuses_to_watch_what_is_not_there(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(SearchConfig, settings)


def test_controls_are_told_once_each() -> None:
    assert EvaluateConfig(controls="random, resnet18,random,").control_names == ("random", "resnet18")
    assert EvaluateConfig().control_names == ()


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_refuses_a_file_that_holds_no_settings(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        make_config(SearchConfig, {}, file)


def test_a_fixed_genotype_is_trained_as_what_a_search_finds() -> None:
    settings = {"space": "seqrec", "dataset": "seq:x", "train_epochs": 7, "init_channels": 32, "seed": 3}
    config = make_config(SearchConfig, settings)
    evaluated = make_config(EvaluateConfig, config.settings_of_fixed("SASRec"))
    assert (evaluated.genotype, evaluated.epochs, evaluated.auxiliary) == ("SASRec", 7, False)
    assert (evaluated.layers, evaluated.init_channels, evaluated.seed) == (2, 32, 3)
    assert evaluated.learning_rate_min == config.learning_rate_min


@pytest.mark.parametrize("strategy", ["fair-darts", "gdas", "p-darts"])
def test_what_was_published_of_sgd_is_not_taken_for_another_optimizer(strategy: str) -> None:
    config = make_config(SearchConfig, {"space": "seqrec", "dataset": "seq:events", "strategy": strategy})
    own = SEQREC.defaults.items()
    assert all(getattr(config, name) == value for name, value in own if hasattr(config, name))
