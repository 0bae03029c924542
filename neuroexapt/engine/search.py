"""A whole search: bilevel steps, genotype, derived network with inherited weights, and its control."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuroexapt.benchmarks import load_table
from neuroexapt.core.derived import DerivedNetwork, count_parameters, inherit_weights
from neuroexapt.core.genotypes import AnyGenotype, genotype_from_dict
from neuroexapt.core.supernet import Supernet
from neuroexapt.data import ImageDataset, Loader, split_indices
from neuroexapt.engine.checkpoint import load_checkpoint
from neuroexapt.engine.config import SearchConfig
from neuroexapt.engine.result import RunResult, finish, read_curves
from neuroexapt.engine.run import RunFolder
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.engine.select_phase import SELECTIONS, SelectPhase
from neuroexapt.engine.session import OpenRun, open_run, running, seed_for
from neuroexapt.engine.stopping import PREFERRED, how_sure
from neuroexapt.engine.training import TrainPhase, evaluate_figures, score
from neuroexapt.errors import UserError

INHERIT = "inherit"
"""The phase that trains the derived network with the weights of the search network."""


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
    elif (preference := phase.preference()) < PREFERRED:
        progress.say(how_sure(preference))
    run.folder.write_json("genotype.json", genotype.to_dict())
    progress.say(f"found {genotype}")

    network, seconds[INHERIT], test = _train_derived(run, INHERIT, genotype, phase.supernet)
    scratch: dict[str, float] = {}
    if config.control and config.train_epochs:
        _, seconds["scratch"], scratch = _train_derived(run, "scratch", genotype, None)

    curves = read_curves(run.folder)
    result = {
        "genotype": genotype.to_dict(),
        "valid_accuracy": curves["search"]["valid_accuracy"][-1],
        **{f"test_{name}": value for name, value in test.items()},
        **phase.table_accuracies(genotype),
        "scratch_test_accuracy": scratch.get("accuracy"),
        **run.test_facts(),
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
    config = run.config
    run.check_space()
    train_loader, valid_loader = _loaders(run)
    torch.manual_seed(seed_for(config.seed, SearchPhase.name))
    supernet = run.space.supernet(**run.data.facts, channels=config.init_channels, layers=config.layers)
    table = load_table(config.table) if config.table else None
    phase = SearchPhase(supernet, train_loader, valid_loader, config, table, run.data.facts)
    phase.table_accuracies(phase.genotype())  # refuses a table of another space before anything is computed
    return phase


def _loaders(run: OpenRun[SearchConfig]) -> tuple[Loader, Loader]:
    """Batches for w and for α: those of the data's own validation part, or of a part of the training data."""
    if run.data.valid is not None:
        train_loader = run.loader("train", training=True, stream="w")
        return train_loader, run.loader("valid", training=True, stream="alpha")
    train_indices, valid_indices = _split(run)
    train_loader = run.loader("train", training=True, indices=train_indices, stream="w")
    return train_loader, run.loader("train", training=True, indices=valid_indices, stream="alpha")


def _split(run: OpenRun[SearchConfig]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training data for w and of those for α."""
    data, config = run.data, run.config
    assert isinstance(data, ImageDataset)  # others have a validation part
    return split_indices(data.train.labels, config.train_portion, config.seed, data.classes)


def _create_folder(run: OpenRun[SearchConfig]) -> None:
    run.create_folder()
    run.folder.write_json("space.json", run.space.describe(run.config.layers))
    if run.data.valid is not None:
        return
    train_indices, valid_indices = _split(run)
    run.folder.write_json("split.json", {"w": train_indices.tolist(), "alpha": valid_indices.tolist()})


def _inherit(network: DerivedNetwork, supernet: Supernet, say: Callable[[str], None]) -> None:
    """Give ``network`` the weights of the search network, unless the search ended before that was as deep."""
    searched, derived = len(supernet.cells), len(network.cells)
    if searched == derived:
        inherit_weights(network, supernet)
    else:
        say(
            f"the search network had only {searched} of {derived} cells when the search ended, so nothing is "
            "inherited: the derived network starts anew"
        )


def _train_derived(
    run: OpenRun[SearchConfig], name: str, genotype: AnyGenotype, supernet: Supernet | None
) -> tuple[nn.Module, float, dict[str, float]]:
    """The trained network, the seconds that took, and the figures of its test."""
    config, task = run.config, run.space.task
    network = run.derived_network(genotype, name)
    if supernet is not None:
        _inherit(network, supernet, run.session.progress.say)
    test_loader = run.loader("test", training=False)
    if config.train_epochs == 0:
        figures = evaluate_figures(functools.partial(score, network.eval(), task), task, test_loader)
        return network, 0.0, {name: figures[name] for name in task.figures}
    # Both networks see the same batches in the same order.
    loader = run.loader("train", training=True, stream="derived")
    phase = TrainPhase(
        name,
        network,
        loader,
        test_loader,
        config,
        epochs=config.train_epochs,
        task=task,
        valid_loader=run.valid_loader(),
        patience=config.patience,
        say=run.session.progress.say,
    )
    seconds = run.train(phase)
    curves = read_curves(run.folder)[name]
    return phase.trained, seconds, {figure: curves[f"test_{figure}"][-1] for figure in task.figures}
