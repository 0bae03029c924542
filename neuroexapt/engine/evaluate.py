"""Training a given genotype from scratch and testing it, over several seeds and next to controls."""

import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuroexapt.core.derived import check_auxiliary_size, count_parameters
from neuroexapt.core.genotypes import AnyGenotype, genotype_from_dict, load_genotype
from neuroexapt.core.task import CLASSIFICATION
from neuroexapt.engine.config import EvaluateConfig
from neuroexapt.engine.result import RunResult, finish, read_curves
from neuroexapt.engine.run import RunFolder
from neuroexapt.engine.session import OpenRun, open_run, running, seed_for
from neuroexapt.engine.training import TrainPhase
from neuroexapt.errors import UserError
from neuroexapt.spaces import SPACES

PHASE = "evaluate"
RESNET = "resnet18"
CONTROL_EPOCHS = "control_epochs.json"
MEASURED_SECONDS = 5.0


def evaluate(
    *, resume: str | Path | None = None, config: str | Path | None = None, **settings: Any
) -> RunResult:
    """Train the network of ``genotype`` on all training data and test it.

    With ``seeds`` as often, and with ``controls`` other networks alike: ``random``, a genotype that is drawn
    anew for every seed, and ``resnet18``. ``settings`` are the fields of ``EvaluateConfig``; ``resume`` and
    ``config`` as in ``search``. The space of a ``genotype`` that is the folder of a run is that of the run,
    where none is given.
    """
    if resume is None and config is None:
        settings = {**_space_of(settings.get("genotype")), **settings}
    run_config, folder = open_run(
        EvaluateConfig,
        settings,
        first_phase=PHASE,
        resume=resume,
        config_file=config,
    )
    with running(run_config, folder, "evaluate") as run:
        return _evaluate(run, new=resume is None)


def _space_of(genotype: object) -> dict[str, str]:
    """As a setting, if it is the folder of a run; it may as well be a text that is too long for a path."""
    folder = str(genotype)
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return {}
    space = RunFolder(Path(folder)).read_json("config.json").get("space")
    return {"space": space} if space in SPACES else {}


@dataclass(frozen=True)
class Trained:
    """What one phase made: the genotype that it trained if there is one, the network, how long it took."""

    phase: str
    genotype: AnyGenotype | None
    network: nn.Module
    seconds: float


def _evaluate(run: OpenRun[EvaluateConfig], *, new: bool) -> RunResult:
    config = run.config
    genotype = _genotype(run, new)
    run.check_space()
    _check_task(run)
    runs = [run.with_seed(config.seed + number) for number in range(config.seeds)]
    first = _make_phase(run, PHASE, PHASE, genotype, config.epochs)
    if config.auxiliary:
        check_auxiliary_size(run.data.input_size)
    if new:
        run.create_folder()
        run.folder.write_json("genotype.json", genotype.to_dict())
    names = " and ".join((config.genotype, *config.control_names))
    run.session.progress.say(
        f"training {names} on {config.dataset}{_seeds(config)}: {first.epochs} epochs of "
        f"{first.steps_per_epoch} steps on {run.where}, run folder {run.folder.path}"
    )
    trained = _train_all(runs, genotype, first)
    curves, figures = read_curves(run.folder), run.space.task.figures
    seconds = {training.phase: training.seconds for training in itertools.chain(*trained.values())}
    result = {
        "genotype": genotype.to_dict(),
        **_summary(trained[PHASE], curves, figures),
        **run.test_facts(),
        "controls": {
            kind: {**_summary(trained[kind], curves, figures), "genotypes": _genotypes(trained[kind])}
            for kind in config.control_names
        },
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        **run.measurements(PHASE),
        **run.environment(),
    }
    finish(run, result)
    return RunResult(genotype, trained[PHASE][0].network, curves, result, run.folder.path)


def _check_task(run: OpenRun[EvaluateConfig]) -> None:
    """Refuse what only classifiers can be trained by, or compared with."""
    if run.space.task is CLASSIFICATION:
        return
    if RESNET in run.config.control_names:
        raise UserError(f"control {RESNET} is for pictures; leave it out for {run.data.kind}")
    if run.config.recipe != "published":
        raise UserError(f"recipe {run.config.recipe} is for pictures; leave it out for {run.data.kind}")
    if run.config.drop_path:
        raise UserError(f"networks for {run.data.kind} drop no paths; leave out --drop-path")


def _genotype(run: OpenRun[EvaluateConfig], new: bool) -> AnyGenotype:
    """The genotype that was asked for; a resumed run keeps the copy it made, whatever became of the file."""
    if new:
        return load_genotype(run.config.genotype)
    return genotype_from_dict(run.folder.read_json("genotype.json"))


def _seeds(config: EvaluateConfig) -> str:
    return f", seeds {config.seed} to {config.seed + config.seeds - 1}" if config.seeds > 1 else ""


def _train_all(
    runs: Sequence[OpenRun[EvaluateConfig]], genotype: AnyGenotype, first: TrainPhase
) -> dict[str, list[Trained]]:
    """The genotype (under ``PHASE``, of which ``first`` is the first phase) and the controls, each from the
    seed of every run.
    """
    trained: dict[str, list[Trained]] = {kind: [] for kind in (PHASE, *runs[0].config.control_names)}
    phase: TrainPhase | None = first
    for kind, run in itertools.product(trained, runs):
        name = kind if run is runs[0] else f"{kind}-seed{run.config.seed}"
        chosen = _chosen(run, kind, genotype)
        phase = phase or _make_phase(run, kind, name, chosen, _epochs(run, kind, name, chosen, genotype))
        trained[kind].append(Trained(name, chosen, phase.trained, run.train(phase)))
        phase = None  # Its graphs are freed before the next network is made.
    return trained


def _chosen(run: OpenRun[EvaluateConfig], kind: str, genotype: AnyGenotype) -> AnyGenotype | None:
    if kind == "random":
        generator = torch.Generator().manual_seed(seed_for(run.config.seed, "random genotype"))
        return run.space.random_genotype(generator, run.config.layers)
    return genotype if kind == PHASE else None


def _epochs(
    run: OpenRun[EvaluateConfig],
    kind: str,
    name: str,
    chosen: AnyGenotype | None,
    genotype: AnyGenotype,
) -> int:
    """As many as ``genotype`` has, or those in which a control takes as long, measured once for a run."""
    config = run.config
    if kind == PHASE or config.control_budget == "epochs":
        return config.epochs
    known = run.folder.read_json(CONTROL_EPOCHS) if (run.folder.path / CONTROL_EPOCHS).exists() else {}
    if name not in known:
        share = _step_ms(run, PHASE, genotype) / _step_ms(run, kind, chosen)
        known[name] = max(1, round(config.epochs * share))
        run.folder.write_json(CONTROL_EPOCHS, known)
    return known[name]


def _step_ms(run: OpenRun[EvaluateConfig], kind: str, genotype: AnyGenotype | None) -> float:
    return _make_phase(run, kind, kind, genotype, run.config.epochs).step_ms(MEASURED_SECONDS)


def _make_phase(
    run: OpenRun[EvaluateConfig], kind: str, name: str, genotype: AnyGenotype | None, epochs: int
) -> TrainPhase:
    """Of the network of ``genotype``, or where there is none of the ResNet, by the recipe of the run."""
    config = run.config
    if genotype is None:
        network: nn.Module = run.initial_network(lambda: resnet18(**run.data.facts), kind)
    else:
        network = run.derived_network(genotype, kind, auxiliary=config.auxiliary)
    has_auxiliary = config.auxiliary and genotype is not None
    return TrainPhase(
        name,
        network,
        run.loader("train", training=True, stream="derived"),
        run.loader("test", training=False),
        config,
        epochs=epochs,
        task=run.space.task,
        valid_loader=run.valid_loader(),
        patience=config.patience,
        auxiliary_weight=config.auxiliary_weight if has_auxiliary else 0.0,
        drop_path=config.drop_path if genotype is not None else 0.0,
        warmup=config.learning_rate_warmup,
        label_smoothing=config.label_smoothing,
        ema=config.ema,
        say=run.session.progress.say,
    )


def _summary(
    trainings: Sequence[Trained], curves: Mapping[str, Any], figures: Sequence[str]
) -> dict[str, Any]:
    """Mean, and where there are several seeds standard deviation, of what was trained from each of them."""
    of_all = {
        name: [curves[training.phase][f"test_{name}"][-1] for training in trainings] for name in figures
    }
    accuracies = of_all["accuracy"]
    return {
        **{f"test_{name}": statistics.mean(values) for name, values in of_all.items()},
        "test_accuracy_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "test_accuracies": accuracies,
        "parameters": round(statistics.mean(count_parameters(training.network) for training in trainings)),
        "epochs": statistics.mean(len(curves[training.phase]["epoch"]) for training in trainings),
        "training_seconds": statistics.mean(training.seconds for training in trainings),
    }


def _genotypes(trainings: Sequence[Trained]) -> list[dict[str, Any]]:
    return [training.genotype.to_dict() for training in trainings if training.genotype is not None]


def resnet18(in_channels: int, num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al., CVPR 2016) for small pictures.

    As is usual for CIFAR, the first convolution is 3x3 without a stride and no pool follows it.
    """
    from torchvision import models

    network = models.resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, network.conv1.out_channels, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
