"""The typed configuration of a run: one object, saved with the run, loadable and overridable field by field.

The command line's options are generated from these fields, so a setting is declared once.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from neuroexapt.errors import UserError
from neuroexapt.spaces import get_space
from neuroexapt.strategies import STRATEGIES, get_strategy, published_settings

EXECUTIONS = ("fused", "reference", "compile", "fastest")
LIMITS = ("max_flops", "max_params", "max_latency_ms")
CRITERIA = ("", "skips", "eigenvalue")
SELECTIONS = ("argmax", "perturbation", "shrink")
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("sgd", "adamw")
CONTROLS = ("random", "resnet18")
CONTROL_BUDGETS = ("epochs", "time")

LOADING = ("workers", "crop_padding", "flip", "cutout")
"""Settings of the batches of pictures,"""
OF_PICTURES = ("image_size", *LOADING)
"""and all settings that say nothing of other data."""

Config = TypeVar("Config", bound="RunConfig")


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run needs: data, batches, where it runs and where it is kept.

    ``neuroexapt search --help`` and ``evaluate --help`` say what each field means.
    """

    dataset: str = setting(
        "digits", "digits, mnist, fashion-mnist, cifar10, cifar100, svhn, folder:PATH, npz:PATH or seq:PATH"
    )
    data_root: Path = setting(Path("data"), "folder in which the standard data sets are looked for")
    download: bool = setting(False, "download a standard data set that is not there")
    image_size: int | None = setting(None, "side in pixels to which the pictures are resized")
    max_length: int = setting(50, "newest items of a history that a recommender sees")
    space: str = setting("darts", "search space")
    layers: int = setting(8, "cells, of pictures two of them reduction cells")
    init_channels: int = setting(16, "channels of the first cells, or width of a recommender")
    batch_size: int = setting(64, "pictures, or histories, in a batch")
    workers: int | None = setting(None, "decoding processes, for data too large for memory")
    crop_padding: int | None = setting(None, "random crop after padding by so many pixels")
    flip: bool | None = setting(None, "random horizontal flip")
    cutout: int | None = setting(None, "side of the square that is blanked out, in pixels")
    optimizer: str = setting("sgd", "of the weights: sgd or adamw")
    learning_rate: float = setting(0.025, "learning rate of the weights at the start of the cosine")
    learning_rate_min: float = setting(0.001, "learning rate of the weights at its end")
    momentum: float = setting(0.9, "momentum of SGD")
    weight_decay: float = setting(3e-4, "weight decay of the weights")
    grad_clip: float = setting(5.0, "largest norm of the weights' gradient")
    patience: int | None = setting(
        None, "end a training so many epochs after it validated best, where data has a validation part"
    )
    precision: str = setting("fp32", "of what networks keep for backward passes: fp32, or bf16 (autocast)")
    channels_last: bool | None = setting(
        None,
        "memory layout of derived networks in training (default: channels-last on the CPU in fp32 and on a "
        "GPU in bf16)",
    )
    compile: bool | None = setting(
        None,
        "train derived networks through torch.compile (default: on a GPU pictures in bf16, channels-last, "
        "where there are 10,000 steps or more)",
    )
    seed: int = setting(0, "seed of everything random")
    backend: str = setting("auto", "auto, cpu, cuda, cuda:triton, ...")
    out: Path | None = setting(None, "folder of the run (default: runs/<time>-<data set>)")
    overwrite: bool = setting(False, "replace the run that the folder holds")
    checkpoint_seconds: float = setting(60.0, "longest time between two checkpoints within an epoch")
    quiet: bool = setting(False, "print nothing but errors")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(
                self, f.name, _typed(f.name, getattr(self, f.name), _field_type(type(self), f.name))
            )
        _require_positive(
            self,
            "batch_size",
            "learning_rate",
            "grad_clip",
            "checkpoint_seconds",
            "image_size",
            "max_length",
            "patience",
        )
        _require_not_negative(
            self, "workers", "crop_padding", "cutout", "learning_rate_min", "momentum", "weight_decay"
        )
        _require_one_of(self, "precision", PRECISIONS)
        _require_one_of(self, "optimizer", OPTIMIZERS)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: choose one from 0 to 2**63 - 1")

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the settings that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the run's own folder: another run may load them."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("out", "overwrite")}
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


@dataclass(frozen=True, kw_only=True)
class SearchConfig(RunConfig):
    """A search by gradient descent, and the training of what it found. Defaults are those of DARTS."""

    strategy: str = setting("darts", f"search strategy: {', '.join(STRATEGIES)}")
    epochs: int = setting(50, "epochs of the search")
    warmup_epochs: int = setting(0, "first epochs, in which α stays as it is")
    arch_learning_rate: float = setting(3e-4, "learning rate of α (Adam)")
    arch_weight_decay: float = setting(1e-3, "weight decay of α")
    train_portion: float = setting(
        0.5, "share of the training data for w; the rest is for α, where data has no validation part"
    )
    selection: str = setting(
        "argmax", "choice of the genotype: argmax (of α), perturbation (DARTS-PT) or shrink (by validation)"
    )
    max_flops: float | None = setting(None, "most multiply-adds of the derived network for one example")
    max_params: float | None = setting(None, "most parameters of the derived network")
    max_latency_ms: float | None = setting(None, "longest forward pass of it, a batch, on this device")
    stop: str = setting("", "end early: skips, eigenvalue (of the Hessian over α), or not at all")
    minutes: float | None = setting(None, "end the search when it has taken so long")
    execution: str = setting(
        "fused",
        "fused, reference (module by module), compile (torch.compile an edge) or fastest (measured once)",
    )
    table: Path | None = setting(
        None, "table of the space's accuracies to follow the search in: CSV, or NATS-Bench's files"
    )
    recompute: bool = setting(False, "compute cells again in backward passes: far less memory, longer steps")
    train_epochs: int = setting(10, "epochs of the derived network with the inherited weights; 0: none")
    control: bool = setting(True, "also train the derived network from scratch, as long, to compare")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "epochs", "arch_learning_rate", "minutes", *LIMITS)
        _require_not_negative(self, "warmup_epochs", "arch_weight_decay", "train_epochs")
        if not 0 < self.train_portion < 1:
            raise UserError(f"train_portion={self.train_portion}: choose a share between 0 and 1")
        _require_one_of(self, "execution", EXECUTIONS)
        _require_one_of(self, "stop", CRITERIA)
        _require_one_of(self, "selection", SELECTIONS)
        self._refuse_combinations()
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"warmup_epochs={self.warmup_epochs} leaves none of {self.epochs} epochs for α; choose fewer"
            )

    def settings_of_fixed(self, genotype: str) -> dict[str, Any]:
        """Those of ``evaluate`` that train ``genotype`` in a network as large as the search's, as long as the
        search's derived network is trained.
        """
        shared = EvaluateConfig.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        return {
            **{name: getattr(self, name) for name in shared},
            "epochs": self.train_epochs,
            "genotype": genotype,
            "auxiliary": False,
            "drop_path": 0.0,
        }

    def _refuse_combinations(self) -> None:
        """Those of strategy, selection and stopping that make no sense."""
        strategy = get_strategy(self.strategy)
        if self.selection == "argmax" and not strategy.learns_alpha:
            raise UserError(
                f"{self.strategy} learns no α to take the largest of; choose --selection shrink, which "
                "compares its paths by validation"
            )
        if self.selection == "perturbation" and strategy.single_path:
            raise UserError(
                f"perturbation takes single operations out of their sum, and the weights of {self.strategy} "
                "never learned to be summed; choose --selection shrink"
            )
        if self.stop and not strategy.learns_alpha:
            raise UserError(f"--stop watches α, which {self.strategy} leaves as it is; leave it out")
        if self.stop == "skips" and "skip_connect" not in get_space(self.space).primitives:
            raise UserError(f"{self.space} has no skip connections; leave out --stop skips")
        if self.stop == "eigenvalue" and strategy.single_path:
            raise UserError(
                f"the eigenvalue is that of a sum of all candidates, and the weights of {self.strategy} "
                "never learned to be summed; leave out --stop eigenvalue"
            )
        if self.stop and self.selection != "argmax":
            raise UserError(
                f"--stop {self.stop} goes back to an earlier α, --selection {self.selection} judges the "
                "weights that the search ended with; give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RunConfig):
    """Training of a given genotype from scratch. Defaults are those of DARTS for CIFAR-10."""

    genotype: str = setting("DARTS_V2", "published name, file, or folder of a run")
    recipe: str = setting("published", "how to train: published (as DARTS), or fast, in a tenth of the time")
    seeds: int = setting(1, "trainings to take the mean of, with seeds counted up from --seed")
    controls: str = setting("", "networks trained alike to compare with: random, resnet18 or random,resnet18")
    control_budget: str = setting("epochs", "what controls have as much of as the genotype: epochs or time")
    epochs: int = setting(600, "epochs")
    batch_size: int = setting(96, "pictures, or histories, in a batch")
    layers: int = setting(20, "cells, of pictures two of them reduction cells")
    init_channels: int = setting(36, "channels of the first cells, or width of a recommender")
    learning_rate_min: float = setting(0.0, "learning rate of the weights at its end")
    auxiliary: bool = setting(True, "second classifier at two thirds of the depth while training")
    auxiliary_weight: float = setting(0.4, "weight of its loss")
    drop_path: float = setting(0.2, "probability of dropping an operation, reached at the end")
    learning_rate_warmup: float = setting(0.0, "share of the steps over which the learning rate rises")
    label_smoothing: float = setting(0.0, "share of each label that is spread over all classes")
    ema: float = setting(0.0, "decay a step of the moving average of weights, which is tested; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_one_of(self, "recipe", tuple(RECIPES))
        _require_one_of(self, "control_budget", CONTROL_BUDGETS)
        _require_positive(self, "epochs", "seeds")
        _require_not_negative(self, "auxiliary_weight")
        for name in ("drop_path", "learning_rate_warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: choose a value from 0 to below 1")
        if self.control_budget != "epochs" and not self.control_names:
            raise UserError(
                f"--control-budget {self.control_budget} is of controls; add --controls, or leave it out"
            )
        for name in self.control_names:
            if name not in CONTROLS:
                raise UserError(
                    f"unknown control {name!r}; choose of {', '.join(CONTROLS)}, separated by commas"
                )

    @property
    def control_names(self) -> tuple[str, ...]:
        """The names in ``controls``, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.controls.split(",") if name.strip()))


# What a data set calls for where neither the user nor a config file says otherwise.
PRESETS: dict[str, dict[type[RunConfig], dict[str, Any]]] = {
    "digits": {
        SearchConfig: {
            "epochs": 15,
            "layers": 4,
            "init_channels": 8,
            "batch_size": 64,
            "train_epochs": 15,
            "arch_learning_rate": 3e-2,
            "learning_rate": 0.05,
        },
        EvaluateConfig: {
            "epochs": 20,
            "layers": 4,
            "init_channels": 8,
            "batch_size": 64,
            "auxiliary": False,
            "drop_path": 0.0,
            "learning_rate": 0.05,
        },
    },
    "mnist": {EvaluateConfig: {"epochs": 50, "layers": 8, "init_channels": 16}},
    "fashion-mnist": {EvaluateConfig: {"epochs": 100, "layers": 8, "init_channels": 16, "cutout": 8}},
    "cifar10": {EvaluateConfig: {"cutout": 16}},
    "cifar100": {EvaluateConfig: {"cutout": 16}},
}

# What a recipe changes, and what it changes besides for a data set.
RECIPES: dict[str, dict[str, Any]] = {
    "published": {},
    "fast": {
        "epochs": 60,
        "batch_size": 256,
        "learning_rate": 0.1,
        "learning_rate_warmup": 0.05,
        "weight_decay": 5e-4,
        "drop_path": 0.0,
        "label_smoothing": 0.1,
        "ema": 0.999,
        "precision": "bf16",
    },
}
RECIPES_BY_DATASET: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "digits": {"epochs": 10, "batch_size": 64},
        "mnist": {"epochs": 5},
        "fashion-mnist": {"epochs": 10},
    }
}


def make_config(cls: type[Config], overrides: dict[str, Any], file: Path | None = None) -> Config:
    """Explicit values, over those of a config file, the recipe, the data set's preset, what was published for
    the strategy, those of the space, and the defaults.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    saved = _read(file) if file else {}
    given = {**saved, **overrides}
    for name in given:
        if name not in names:
            raise UserError(f"unknown setting {name!r} for {cls.__name__}; known are {', '.join(names)}")
    if given.get("recipe") != saved.get("recipe", given.get("recipe")):
        raise UserError(
            f"{file} holds the settings of recipe {saved['recipe']}; leave out --recipe or --config"
        )
    dataset = given.get("dataset", cls.__dataclass_fields__["dataset"].default)
    given = {**PRESETS.get(dataset, {}).get(cls, {}), **_recipe(given.get("recipe"), dataset), **given}
    if issubclass(cls, SearchConfig):
        given = {**_published(given), **given}
    space = get_space(given.get("space", cls.__dataclass_fields__["space"].default))
    return cls(**{k: v for k, v in space.defaults.items() if k in names} | given)


def _published(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the strategy's paper; a warm-up keeps its share of the epochs. Where a space has another
    optimizer than SGD, what it sets itself stands.
    """
    fields = SearchConfig.__dataclass_fields__
    strategy, space = (given.get(name, fields[name].default) for name in ("strategy", "space"))
    settings, own = published_settings(strategy, space), get_space(space).defaults
    if "warmup_epochs" in settings and isinstance(given.get("epochs"), int):
        settings["warmup_epochs"] = settings["warmup_epochs"] * given["epochs"] // settings["epochs"]
    if "optimizer" in own:
        return {name: value for name, value in settings.items() if name not in own}
    return settings


def _recipe(name: Any, dataset: str) -> dict[str, Any]:
    """What a recipe says for a data set; nothing where none of that name is known, which is refused later."""
    return {**RECIPES.get(name, {}), **RECIPES_BY_DATASET.get(name, {}).get(dataset, {})}


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config {file}: {error}; give a JSON object of settings") from error
    if not isinstance(fields, dict):
        raise UserError(f"the config {file} is no JSON object of settings")
    return fields


def _field_type(cls: type, name: str) -> tuple[type, bool]:
    """The type of a field without None, and whether None is allowed."""
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not types.NoneType), True
    return hint, False


def _typed(name: str, value: Any, expected: tuple[type, bool]) -> Any:
    kind, optional = expected
    if value is None and optional:
        return None
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value}: choose a finite number")
    if isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise UserError(f"{name}={value!r}: expected {'a path' if kind is Path else kind.__name__}")


def _require_one_of(config: RunConfig, name: str, known: tuple[str, ...]) -> None:
    if getattr(config, name) not in known:
        raise UserError(
            f"unknown {name} {getattr(config, name)!r}; choose one of {', '.join(filter(None, known))}"
        )


def _require_positive(config: RunConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{name}={value}: choose a value above 0")


def _require_not_negative(config: RunConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise UserError(f"{name}={value}: choose a value of at least 0")
