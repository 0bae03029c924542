"""Training a given genotype from scratch and testing it."""

from pathlib import Path
from typing import Any

from neuroexapt.core.derived import check_auxiliary_size, count_parameters
from neuroexapt.core.genotypes import Genotype, load_genotype
from neuroexapt.engine.config import EvaluateConfig
from neuroexapt.engine.result import RunResult, finish, read_curves
from neuroexapt.engine.session import OpenRun, open_run, running
from neuroexapt.engine.training import TrainPhase
from neuroexapt.spaces import get_space

PHASE = "evaluate"


def evaluate(
    *, resume: str | Path | None = None, config: str | Path | None = None, **settings: Any
) -> RunResult:
    """Train the network of ``genotype`` on all training pictures and test it.

    ``settings`` are the fields of ``EvaluateConfig``; ``resume`` and ``config`` as in ``search``.
    """
    run_config, folder = open_run(
        EvaluateConfig,
        settings,
        first_phase=PHASE,
        resume=resume,
        config_file=config,
    )
    with running(run_config, folder, "evaluate") as run:
        return _evaluate(run, new=resume is None)


def _evaluate(run: OpenRun[EvaluateConfig], *, new: bool) -> RunResult:
    config, data = run.config, run.data
    genotype = _genotype(run, new)
    get_space(config.space).check(data.image_size, config.init_channels, config.layers, config.batch_size)
    if config.auxiliary:
        check_auxiliary_size(data.image_size)
    network = run.derived_network(genotype, PHASE, auxiliary=config.auxiliary)
    phase = TrainPhase(
        PHASE,
        network,
        run.loader("train", training=True, stream="derived"),
        run.loader("test", training=False),
        config,
        epochs=config.epochs,
        auxiliary_weight=config.auxiliary_weight,
        drop_path=config.drop_path,
    )
    if new:
        run.create_folder()
        run.folder.write_json("genotype.json", genotype.to_dict())
    run.session.progress.say(
        f"training {config.genotype} on {config.dataset}: {phase.epochs} epochs of "
        f"{phase.steps_per_epoch} steps on {run.where}, run folder {run.folder.path}"
    )
    seconds = run.train(phase)
    curves = read_curves(run.folder)
    result = {
        "genotype": genotype.to_dict(),
        "test_accuracy": curves[PHASE]["test_accuracy"][-1],
        "seconds": seconds,
        **run.measurements(PHASE),
        "parameters": count_parameters(network),
        **run.environment(),
    }
    finish(run, result)
    return RunResult(genotype, network, curves, result, run.folder.path)


def _genotype(run: OpenRun[EvaluateConfig], new: bool) -> Genotype:
    """The genotype that was asked for; a resumed run keeps the copy it made, whatever became of the file."""
    if new:
        return load_genotype(run.config.genotype)
    return Genotype.from_dict(run.folder.read_json("genotype.json"))
