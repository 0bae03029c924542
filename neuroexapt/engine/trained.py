"""The network that a run has trained, read from its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroexapt.core.derived import DerivedNetwork
from neuroexapt.core.genotypes import genotype_from_dict
from neuroexapt.engine import evaluate, search
from neuroexapt.engine.checkpoint import load_checkpoint
from neuroexapt.engine.config import EvaluateConfig, RunConfig, SearchConfig, make_config
from neuroexapt.engine.result import read_curves
from neuroexapt.engine.run import RunFolder, command_line, how_to_resume
from neuroexapt.engine.session import load_data, make_network
from neuroexapt.engine.training import TrainPhase
from neuroexapt.errors import UserError


@dataclass(frozen=True)
class TrainedRun:
    """A run whose network is trained.

    ``network``: that of ``RunResult.model``, in evaluation mode on the CPU, without auxiliary head;
    ``data``: the ``description`` of its data set; ``figures``: what the test gave, by name.
    """

    folder: RunFolder
    config: RunConfig
    network: DerivedNetwork
    data: dict[str, Any]
    figures: dict[str, float]


def load_trained(run_dir: Path | str) -> TrainedRun:
    """Read what a search or an evaluation trained; of several seeds the first one's.

    Raises:
        UserError: there is no run, or its network is not trained to the end.
    """
    folder = RunFolder.open(Path(run_dir))
    is_search = folder.command == "search"
    kind: type[RunConfig] = SearchConfig if is_search else EvaluateConfig
    config = make_config(kind, {}, folder.path / "config.json")
    phase = search.INHERIT if is_search else evaluate.PHASE
    state = _finished_state(folder, config, phase)
    data = _describe_data(folder, config)
    genotype = genotype_from_dict(folder.read_json("genotype.json"))
    network = make_network(config, data["facts"], genotype, getattr(config, "auxiliary", False))
    network.load_state_dict(TrainPhase.trained_weights(state))
    network.auxiliary_head = None
    curves = read_curves(folder)[phase]
    figures = {name: values[-1] for name, values in curves.items() if name.startswith("test_")}
    return TrainedRun(folder, config, network.eval().requires_grad_(False), data, figures)


def _finished_state(folder: RunFolder, config: RunConfig, phase: str) -> dict[str, Any]:
    """What the phase's checkpoint holds of it."""
    if getattr(config, "train_epochs", None) == 0:
        data = "--dataset", config.dataset, "--space", config.space
        train = command_line("evaluate", "--genotype", folder.path, *data)
        raise UserError(
            f"{folder.path} has trained no network, since it was made with --train-epochs 0; train what it "
            f"found with: {train}"
        )
    checkpoint = folder.checkpoint(phase)
    state = load_checkpoint(checkpoint) if checkpoint.exists() else None
    if state is None or not state["position"]["finished"]:
        raise UserError(
            f"the network of {folder.path} is not trained to its end; go on with: "
            f"{how_to_resume(folder.command, folder.path, config.space)}"
        )
    return state["phase"]


def _describe_data(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    if (folder.path / "data.json").exists():
        return folder.read_json("data.json")
    return load_data(config).description  # runs of earlier versions did not keep it
