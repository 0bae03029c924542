"""Opening a run: folder, configuration, data, device and seed, for a new run or one that goes on."""

import dataclasses
import hashlib
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from neuroexapt.backend import Backend, get_backend, list_backends, use_backend
from neuroexapt.core.derived import DerivedNetwork
from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.core.task import CLASSIFICATION
from neuroexapt.data import AnyDataset, Loader, load_dataset
from neuroexapt.engine.config import LOADING, OF_PICTURES, RunConfig, make_config
from neuroexapt.engine.device import Network, get_device_name, place
from neuroexapt.engine.interrupt import StopRequest
from neuroexapt.engine.phase import Phase, PhaseRunner, Session
from neuroexapt.engine.progress import Progress
from neuroexapt.engine.run import RunFolder, how_to_resume
from neuroexapt.errors import UserError
from neuroexapt.spaces import SPACES, Space, get_space
from neuroexapt.version import __version__

Config = TypeVar("Config", bound=RunConfig)

PLACEMENT = frozenset(
    {
        "backend",
        "channels_last",
        "checkpoint_seconds",
        "compile",
        "data_root",
        "download",
        "execution",
        "out",
        "overwrite",
        "quiet",
        "table",
        "workers",
    }
)
"""Settings that say where and how a run is computed, not what: a resumed run may change them."""


def open_run(
    cls: type[Config],
    overrides: dict[str, Any],
    *,
    first_phase: str,
    resume: str | Path | None,
    config_file: str | Path | None,
) -> tuple[Config, RunFolder]:
    """A new run folder with its config, or one that holds a run, whose settings then stand.

    Without the checkpoint of its first phase a run is not resumed: it would start from random weights.
    """
    if resume is None:
        config = make_config(cls, overrides, Path(config_file) if config_file else None)
        out = config.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(config.dataset).name}"
        return dataclasses.replace(config, out=out), RunFolder(out)
    run = RunFolder.open(Path(resume))
    if run.command != first_phase:
        go_on = how_to_resume(run.command, run.path, run.read_json("config.json")["space"])
        raise UserError(f"{resume} holds a run of {run.command}: go on with {go_on}")
    fixed = sorted(set(overrides) - PLACEMENT) + (["config"] if config_file else [])
    if fixed:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
        raise UserError(f"a resumed run keeps its settings: leave out {options}")
    if not run.checkpoint(first_phase).exists():
        raise UserError(
            f"{resume} cannot go on: {run.checkpoint(first_phase)} is missing; start anew without --resume"
        )
    return make_config(cls, {**overrides, "out": run.path}, run.path / "config.json"), run


@dataclass
class OpenRun(Generic[Config]):
    """A run that is under way: what its phases share."""

    config: Config
    session: Session
    data: AnyDataset
    backend: Backend

    @property
    def device(self) -> torch.device:
        return self.backend.torch_device

    @property
    def where(self) -> str:
        """The device, and if it is not a GPU why not."""
        if self.device.type != "cpu" or self.config.backend == "cpu":
            return str(self.device)
        reason = next(backend.reason for backend in list_backends() if backend.value == "cuda")
        return f"cpu ({reason}, which would be faster)"

    @property
    def folder(self) -> RunFolder:
        return self.session.run

    def loader(self, part: str, *, training: bool, stream: str = "", **options: Any) -> Loader:
        """Batches of a part of the data; ``stream`` tells loaders of one run apart, ``options`` are the data
        set's own.
        """
        return self.data.loader(
            part,
            training=training,
            batch_size=self.config.batch_size,
            device=self.device,
            seed=seed_for(self.config.seed, f"{part} {stream}"),
            **self.config.given(LOADING),
            **options,
        )

    def valid_loader(self) -> Loader | None:
        """Of the data's own validation part, for choosing between epochs; None if it has none."""
        return None if self.data.valid is None else self.loader("valid", training=False)

    @property
    def space(self) -> Space:
        return get_space(self.config.space)

    def check_space(self) -> None:
        """Refuse, with one clear line, data or settings that the space has no network for."""
        if self.data.kind != self.space.task.unit:
            fitting = [name for name, space in SPACES.items() if space.task.unit == self.data.kind]
            raise UserError(
                f"{self.config.dataset} holds {self.data.kind}, and --space {self.config.space} is for "
                f"{self.space.task.unit}; choose --space {' or '.join(fitting)}, or another --dataset"
            )
        self._check_settings_of_other_data()
        self.space.check(
            self.data.input_size, self.config.init_channels, self.config.layers, self.config.batch_size
        )

    def _check_settings_of_other_data(self) -> None:
        of_pictures, kind = self.config.given(OF_PICTURES), self.data.kind
        if kind == CLASSIFICATION.unit:
            if self.config.max_length != RunConfig.max_length:
                raise UserError(f"only histories have --max-length; leave it out for {kind}")
        elif of_pictures:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in of_pictures)
            raise UserError(f"only pictures have {options}; leave out for {kind}")

    def derived_network(self, genotype: AnyGenotype, phase: str, auxiliary: bool = False) -> DerivedNetwork:
        """The genotype's network in the size of this run, with the initial weights of ``phase``."""
        return self.initial_network(
            lambda: make_network(self.config, self.data.facts, genotype, auxiliary), phase
        )

    def initial_network(self, make: Callable[[], Network], phase: str) -> Network:
        """A network on this run's device, with the initial weights of ``phase``."""
        torch.manual_seed(seed_for(self.config.seed, phase))
        return place(make(), self.device, self.config.channels_last, self.config.precision)

    def with_seed(self, seed: int) -> "OpenRun[Config]":
        """The same run, whose initial weights and batches come from another seed."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, seed=seed))

    def create_folder(self) -> None:
        """Make the folder of a new run. To be called once everything that may be refused has been checked."""
        RunFolder.create(self.folder.path, overwrite=self.config.overwrite)
        self.folder.write_json("config.json", self.config.to_dict())
        self.folder.write_json("data.json", self.data.description)

    def train(self, phase: Phase) -> float:
        """Carry the phase to its end; seconds it took over all invocations."""
        return PhaseRunner(phase, self.session).run()

    def measurements(self, phase: str) -> dict[str, Any]:
        """Speed of one phase and the memory of all so far, from the run's timing records."""
        timing = list(self.folder.records(self.folder.timing))
        rates = [record["steps_per_second"] for record in timing if record["phase"] == phase]
        return {
            "steps_per_second": statistics.median(rates),
            "peak_memory_bytes": max(record["peak_memory_bytes"] for record in timing),
        }

    def test_facts(self) -> dict[str, Any]:
        """What was seen of how many examples, and what its figures are to be judged by, for result.json."""
        baseline, accuracy = self.data.baseline
        return {
            "input_size": list(self.data.input_size),
            "test_examples": len(self.data.test),
            "baseline": baseline,
            "baseline_accuracy": accuracy,
        }

    def environment(self) -> dict[str, Any]:
        """Versions and device, for result.json."""
        cuda = self.device.type == "cuda"
        return {
            "versions": {
                "neuroexapt": __version__,
                "torch": torch.__version__,
                "cuda": torch.version.cuda if cuda else None,
                "python": platform.python_version(),
            },
            "device": get_device_name(self.device),
        }


def load_data(config: RunConfig, **options: Any) -> AnyDataset:
    """The data set of a run; ``options`` are further ones of ``load_dataset``."""
    return load_dataset(
        config.dataset,
        root=config.data_root,
        download=config.download,
        image_size=config.image_size,
        max_length=config.max_length,
        quiet=config.quiet,
        **options,
    )


def make_network(
    config: RunConfig, facts: Mapping[str, Any], genotype: AnyGenotype, auxiliary: bool
) -> DerivedNetwork:
    """The genotype's network in the size of a run, for data of these ``facts``."""
    return get_space(config.space).network(
        genotype, **facts, channels=config.init_channels, layers=config.layers, auxiliary=auxiliary
    )


@contextmanager
def running(config: Config, folder: RunFolder, command: str) -> Iterator[OpenRun[Config]]:
    """Choose the backend, read the data and listen to signals while the block runs."""
    with _warnings(not config.quiet), _chosen_backend(config) as backend, StopRequest().listening() as stop:
        data = load_data(config)
        what = {k: v for k, v in config.to_dict().items() if k not in PLACEMENT}
        session = Session(
            run=folder,
            identity={**what, "data": fingerprint(data)},
            progress=Progress(config.quiet),
            stop=stop,
            checkpoint_seconds=config.checkpoint_seconds,
            how_to_resume=how_to_resume(command, folder.path, config.space),
        )
        yield OpenRun(config, session, data, backend)


@contextmanager
def _warnings(shown: bool) -> Iterator[None]:
    logger = logging.getLogger("neuroexapt")
    before = logger.level
    logger.setLevel(before if shown else logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _chosen_backend(config: RunConfig) -> Iterator[Backend]:
    if config.backend == "auto":  # left to the environment and to the saved configuration
        yield get_backend()
    else:
        with use_backend(config.backend) as backend:
            yield backend


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for every purpose, so that one phase does not depend on what ran before it."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def fingerprint(data: AnyDataset) -> str:
    """Digest of the labels, sizes and whatever is made of the data: other data or other labels show."""
    digest = hashlib.sha256(json.dumps(data.identity).encode())
    for part in (data.train, data.test):
        digest.update(part.labels.numpy().tobytes())
    return digest.hexdigest()[:16]
