"""A whole search: bilevel steps, genotype, derived network with inherited weights, and its control."""

import functools
from pathlib import Path
from typing import Any

import torch

from neuroexapt.benchmarks import load_table
from neuroexapt.core.derived import DerivedNetwork, count_parameters, inherit_weights
from neuroexapt.core.genotypes import AnyGenotype, genotype_from_dict
from neuroexapt.core.supernet import Supernet
from neuroexapt.data import split_indices
from neuroexapt.engine.checkpoint import load_checkpoint
from neuroexapt.engine.config import SearchConfig
from neuroexapt.engine.device import place
from neuroexapt.engine.result import RunResult, finish, read_curves
from neuroexapt.engine.run import RunFolder
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.engine.select_phase import SELECTIONS, SelectPhase
from neuroexapt.engine.session import OpenRun, open_run, running, seed_for
from neuroexapt.engine.training import TrainPhase, evaluate_loss, score
from neuroexapt.errors import UserError
from neuroexapt.spaces import get_space


def search(
    *, resume: str | Path | None = None, config: str | Path | None = None, **settings: Any
) -> RunResult:
    """Search an architecture, derive it, train it with the inherited weights, and keep it all in a run
    folder.

    ``settings`` are the fields of ``SearchConfig``; those not given come from the file ``config``, then from
    the data set's preset. ``resume`` continues the run in that folder instead, from its last checkpoint to
    the same result bit for bit on the CPU. Raises UserError for what the caller can mend and Interrupted,
    after saving, on SIGINT or SIGTERM.
    """
    run_config, folder = open_run(
        SearchConfig,
        settings,
        first_phase=SearchPhase.name,
        resume=resume,
        config_file=config,
    )
    with running(run_config, folder, "search") as run:
        return _search(run, new=resume is None)


def derive(run_dir: str | Path) -> AnyGenotype:
    """The genotype that α stands for in the last search checkpoint of a run, finished or not."""
    folder = RunFolder.open(Path(run_dir))
    if not folder.checkpoint(SearchPhase.name).exists():
        raise UserError(
            f"{run_dir} holds no checkpoint of a search: {folder.checkpoint(SearchPhase.name)} is missing"
        )
    selection = folder.checkpoint(SelectPhase.name)
    state = load_checkpoint(selection)["phase"] if selection.exists() else {}
    if "genotype" not in state:  # the selection has not come to its end
        state = load_checkpoint(folder.checkpoint(SearchPhase.name))["phase"]
    return genotype_from_dict(state["genotype"])


def _search(run: OpenRun[SearchConfig], *, new: bool) -> RunResult:
    config, progress = run.config, run.session.progress
    phase = _search_phase(run)
    if new:
        _create_folder(run)
    progress.say(
        f"searching {config.space} on {config.dataset} with {config.strategy}: {phase.epochs} epochs of "
        f"{phase.steps_per_epoch} steps on {run.where}, run folder {run.folder.path}"
    )
    phase.prepare_execution(progress.say)
    seconds = {"search": run.train(phase)}
    genotype = phase.genotype()
    if config.selection != "argmax":
        selection = SELECTIONS[config.selection](phase, config)
        seconds["select"] = run.train(selection)
        genotype = selection.genotype()
    run.folder.write_json("genotype.json", genotype.to_dict())
    progress.say(f"found {genotype}")

    network, seconds["inherit"], test_accuracy = _train_derived(run, "inherit", genotype, phase.supernet)
    scratch_accuracy = None
    if config.control and config.train_epochs:
        _, seconds["scratch"], scratch_accuracy = _train_derived(run, "scratch", genotype, None)

    curves = read_curves(run.folder)
    result = {
        "genotype": genotype.to_dict(),
        "valid_accuracy": curves["search"]["valid_accuracy"][-1],
        "test_accuracy": test_accuracy,
        **phase.table_accuracies(genotype),
        "scratch_test_accuracy": scratch_accuracy,
        "stopped": phase.stopping.reason,
        **(phase.resources.measure(genotype) if phase.resources else {}),
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        **run.measurements("search"),
        "parameters": count_parameters(network),
        **run.environment(),
    }
    finish(run, result)
    return RunResult(genotype, network, curves, result, run.folder.path)


def _search_phase(run: OpenRun[SearchConfig]) -> SearchPhase:
    config, data = run.config, run.data
    space = get_space(config.space)
    space.check(data.image_size, config.init_channels, config.layers, config.batch_size)
    train_indices, valid_indices = _split(run)
    train_loader = run.loader("train", training=True, indices=train_indices, stream="w")
    valid_loader = run.loader("train", training=True, indices=valid_indices, stream="alpha")
    torch.manual_seed(seed_for(config.seed, SearchPhase.name))
    supernet = space.supernet(
        in_channels=data.in_channels,
        num_classes=data.num_classes,
        channels=config.init_channels,
        layers=config.layers,
    )
    table = load_table(config.table) if config.table else None
    phase = SearchPhase(place(supernet, run.device), train_loader, valid_loader, config, table)
    phase.table_accuracies(phase.genotype())  # refuses a table of another space before anything is computed
    return phase


def _split(run: OpenRun[SearchConfig]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training pictures for w and of those for α."""
    return split_indices(run.data.train.labels, run.config.train_portion, run.config.seed)


def _create_folder(run: OpenRun[SearchConfig]) -> None:
    run.create_folder()
    run.folder.write_json("space.json", get_space(run.config.space).describe(run.config.layers))
    train_indices, valid_indices = _split(run)
    run.folder.write_json("split.json", {"w": train_indices.tolist(), "alpha": valid_indices.tolist()})


def _train_derived(
    run: OpenRun[SearchConfig], name: str, genotype: AnyGenotype, supernet: Supernet | None
) -> tuple[DerivedNetwork, float, float]:
    """The trained network, the seconds that took, and its test accuracy."""
    config = run.config
    network = run.derived_network(genotype, name)
    if supernet is not None:
        inherit_weights(network, supernet)
    test_loader = run.loader("test", training=False)
    if config.train_epochs == 0:
        return network, 0.0, evaluate_loss(functools.partial(score, network.eval()), test_loader)[1]
    # Both networks see the same batches in the same order.
    loader = run.loader("train", training=True, stream="derived")
    phase = TrainPhase(name, network, loader, test_loader, config, epochs=config.train_epochs)
    seconds = run.train(phase)
    return network, seconds, read_curves(run.folder)[name]["test_accuracy"][-1]
