"""What the report of a run says and shows, gathered from the run folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import ceil
from statistics import median
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from neuroexapt.core.genotypes import AnyGenotype, ChosenCell, Genotype, genotype_from_dict
from neuroexapt.engine.config import LIMITS
from neuroexapt.engine.run import RunFolder
from neuroexapt.engine.stopping import how_sure
from neuroexapt.report.cell_graph import draw_cell
from neuroexapt.report.cell_layout import is_joined
from neuroexapt.report.figures import alpha_heat_map, alpha_history, curves, edge_names, entropy_history
from neuroexapt.report.style import op_style, themed
from neuroexapt.report.summary import how_good, next_command, worth_of_inheriting
from neuroexapt.report.svg import inline_svg
from neuroexapt.report.text import duration, large, memory, percent, rate

Record = Mapping[str, Any]

PHASES = {
    "search": "Search",
    "select": "Selection by validation",
    "inherit": "Derived network, inherited weights",
    "scratch": "Derived network, from scratch",
    "evaluate": "Given genotype, from scratch",
    "random": "Random genotype, from scratch",
    "resnet18": "ResNet-18, from scratch",
}
"""Titles of phases. A phase of a further seed has its name with ``-seed`` and the seed after it."""
_TABLE_DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet16": "ImageNet16-120"}
_NUMBERS = {
    "test_accuracy": ("test accuracy", percent),
    "test_ndcg": ("test NDCG@10 (the accuracy is HR@10)", percent),
    "test_accuracy_deviation": ("its standard deviation over seeds", percent),
    "scratch_test_accuracy": ("test accuracy from scratch, as many epochs", percent),
    **{
        f"table_{name}_test": (f"test accuracy on {label}, from the table", percent)
        for name, label in _TABLE_DATASETS.items()
    },
    "valid_accuracy": ("validation accuracy in the search", percent),
    "parameters": ("parameters", large),
    "flops": ("multiply-adds for one example", large),
    "latency_ms": ("milliseconds of a forward pass of a batch", rate),
    "seconds": ("time in all", duration),
    "steps_per_second": ("steps a second", rate),
    "peak_memory_bytes": ("peak memory", memory),
}
_CELLS = {
    "normal": "Normal cell",
    "reduce": "Reduction cell",
    "cell": "Cell",
    "head": "Head",
    "block": "Blocks",
}


@dataclass(frozen=True)
class CellGraph:
    title: str
    svg: Markup


@dataclass(frozen=True)
class CellAlpha:
    title: str
    heat_map: Markup
    entropy: Markup
    operations: list[tuple[str, str]]
    """(operation, CSS of its line) for the key of the histories."""
    histories: list[Markup]


@dataclass(frozen=True)
class PhaseCurves:
    title: str
    loss: Markup
    accuracy: Markup


@dataclass(frozen=True)
class Comparison:
    """Test accuracy with inherited weights and from scratch; a row is (epoch, inherited, from scratch)."""

    svg: Markup
    rows: list[tuple[int, float, float]]
    worth: str


@dataclass(frozen=True)
class Evaluated:
    """What training by one recipe made of a network: mean and standard deviation over seeds."""

    title: str
    test_accuracy: float
    deviation: float | None
    parameters: int
    epochs: float
    seconds: float


@dataclass(frozen=True)
class PhaseTiming:
    title: str
    epochs: int
    seconds: float
    steps_per_second: float
    peak_memory_bytes: int


class Report:
    """Every section of the report; one whose records do not exist yet is None or empty."""

    def __init__(self, run: RunFolder) -> None:
        self.path = run.path
        self.name = run.path.resolve().name
        self.config: Record = run.read_json("config.json")
        self.result: Record = _read_if_there(run, "result.json")
        self.command = run.command
        self.is_search = self.command == "search"
        self._space: Record = _read_if_there(run, "space.json")
        self._control_epochs: Record = _read_if_there(run, "control_epochs.json")
        self._final_genotype: Record = _read_if_there(run, "genotype.json")
        self._metrics = _by_phase(run.records(run.metrics))
        self._timing = _by_phase(run.records(run.timing))
        self._figure_number = count(1)

    @property
    def title(self) -> str:
        dataset = self.config["dataset"]
        return (
            f"Architecture search on {dataset}"
            if self.is_search
            else f"{self.config['genotype']} on {dataset}"
        )

    @property
    def environment(self) -> Record:
        return {"device": self.result["device"], **self.result["versions"]}

    @property
    def progress(self) -> list[tuple[str, int, int]]:
        """(phase, epochs done, epochs planned) of every phase of the run."""
        if self.is_search:
            planned = {"search": self.config["epochs"], "inherit": self.config["train_epochs"]}
            if self.config["control"]:
                planned["scratch"] = self.config["train_epochs"]
        else:
            begun = ["evaluate", *(phase for phase in self._metrics if self._metrics[phase])]
            planned = {phase: self._control_epochs.get(phase, self.config["epochs"]) for phase in begun}
        return [
            (phase_title(phase), len(self._metrics[phase]), epochs)
            for phase, epochs in planned.items()
            if epochs
        ]

    @property
    def numbers(self) -> list[tuple[str, str]]:
        """(what, how much) of every headline number that there is."""
        values = self.result or self._newest_accuracies()
        return [
            (label, write(values[name]))
            for name, (label, write) in _NUMBERS.items()
            if values.get(name) is not None
        ]

    @property
    def summary(self) -> list[tuple[str, str]]:
        """(question, answer) of what the run comes to, as far as it got."""
        answers = []
        if "test_examples" in self.result:
            is_trained = self.config.get("train_epochs") != 0
            answers.append(("How good", how_good(self.result, is_trained=is_trained)))
        searched = self._metrics["search"]
        if searched and "preference" in searched[-1] and self.config.get("selection") == "argmax":
            answers.append(("How sure", how_sure(searched[-1]["preference"])))
        if self.result.get("stopped"):
            planned = self.config["epochs"]
            answers.append(("Ended early", f"{len(searched)} of {planned} epochs: {self.result['stopped']}."))
        return answers

    @property
    def next_command(self) -> tuple[str, str] | None:
        return next_command(self.command, self.config, self.result, self.path)

    def _newest_accuracies(self) -> Record:
        newest = {phase: records[-1] if records else {} for phase, records in self._metrics.items()}
        trained = newest["inherit"] or newest["evaluate"]
        return {
            "test_accuracy": trained.get("test_accuracy"),
            "scratch_test_accuracy": newest["scratch"].get("test_accuracy"),
            "valid_accuracy": newest["search"].get("valid_accuracy"),
        }

    @property
    def genotype_epoch(self) -> int | None:
        """The epoch of an unfinished search whose genotype is shown; None where it is the final one."""
        return None if self._final_genotype else len(self._metrics["search"])

    @cached_property
    def genotype(self) -> AnyGenotype | None:
        if self._final_genotype:
            return genotype_from_dict(self._final_genotype)
        if self._metrics["search"]:
            return genotype_from_dict(self._metrics["search"][-1]["genotype"])
        return None

    @property
    def notation(self) -> str | None:
        """The genotype as its paper writes it, where that is not JSON."""
        text = str(self.genotype)
        return None if text.startswith("{") else text

    @property
    def choice(self) -> str:
        """How the genotype follows from the weights of α."""
        selection = self.config.get("selection", "argmax")
        if selection != "argmax":
            return f"The genotype is chosen by validation (--selection {selection}), not by these weights."
        if any(self.config.get(limit) for limit in LIMITS):
            return "The genotype is that of the largest weights that meets the budget."
        if isinstance(self.genotype, Genotype):
            return "A node keeps the two edges whose strongest operation weighs most; none is never kept."
        return "The genotype is that of the largest weights."

    @property
    def joins_states(self) -> bool:
        """Whether a cell's output is more than its last state."""
        cells = self.genotype.cells.values() if self.genotype else ()
        return any(is_joined(cell.concat, len(cell.state_names)) for cell in cells)

    @property
    def cells(self) -> list[CellGraph]:
        return [self._cell(*cell) for cell in self.genotype.cells.items()] if self.genotype else []

    def _cell(self, cell: str, chosen: ChosenCell) -> CellGraph:
        title, names = _CELLS.get(cell, cell), chosen.state_names
        operations = ", ".join(
            f"{op} from {names[source]} to {names[target]}" for source, target, op in chosen.edges
        )
        output = " and ".join(names[state] for state in chosen.concat)
        description = f"{title}: {operations}; the output is {output}"
        return CellGraph(title, self._svg(draw_cell(*chosen), description))

    @property
    def alphas(self) -> list[CellAlpha]:
        return [self._alpha(cell) for cell in self._space["edges"]] if self._metrics["search"] else []

    def _primitives(self, cell: str) -> list[str]:
        return self._space.get("primitives_of", {}).get(cell, self._space["primitives"])

    def _alpha(self, cell: str) -> CellAlpha:
        title, primitives = _CELLS.get(cell, cell), self._primitives(cell)
        edges = edge_names(self._space["edges"][cell], self._space["nodes"])
        weights = np.array([record["alpha"][cell] for record in self._metrics["search"]])
        entropies = np.array([record["alpha_entropy"][cell] for record in self._metrics["search"]])
        top, styles = max(0.5, 1.05 * weights.max()), [op_style(op) for op in primitives]
        strongest = [
            f"{edge} {primitives[op]}" for edge, op in zip(edges, weights[-1].argmax(1), strict=True)
        ]
        return CellAlpha(
            title,
            self._svg(
                alpha_heat_map(weights[-1], edges, primitives),
                f"{title}, softmax weights; strongest on each edge: {', '.join(strongest)}",
            ),
            self._svg(
                entropy_history(entropies, len(primitives)),
                f"{title}, {_ends({'mean of all edges': entropies.mean(1).tolist()}, 'entropy in nats')}",
            ),
            [
                (op, f"{style.line} {themed(style.colour)}")
                for op, style in zip(primitives, styles, strict=True)
            ],
            [
                self._svg(
                    alpha_history(weights[:, edge], primitives, top, name),
                    f"{title}, edge {name}: softmax weights by epoch",
                )
                for edge, name in enumerate(edges)
            ],
        )

    @property
    def phases(self) -> list[PhaseCurves]:
        return [
            PhaseCurves(phase_title(phase), self._curves(phase, "loss"), self._curves(phase, "accuracy"))
            for phase in self._metrics
            if self._metrics[phase]
        ]

    def _curves(self, phase: str, quantity: str) -> Markup:
        names = {part: f"{part}_{quantity}" for part in ("train", "valid", "test")}
        recorded = self._metrics[phase][0]
        values = {part: self._values(phase, name) for part, name in names.items() if name in recorded}
        return self._svg(curves(values, quantity), f"{phase_title(phase)}: {_ends(values, quantity)}")

    @cached_property
    def table(self) -> Markup | None:
        """The accuracies that a table knows of the genotype of each epoch."""
        known = self._metrics["search"][0] if self._metrics["search"] else {}
        values = {
            label: self._values("search", f"table_{name}_test")
            for name, label in _TABLE_DATASETS.items()
            if f"table_{name}_test" in known
        }
        return self._svg(curves(values, "test accuracy"), _ends(values, "test accuracy")) if values else None

    @cached_property
    def comparison(self) -> Comparison | None:
        """Exapt against from scratch at equal epochs: as many as both have."""
        if not (self._metrics["inherit"] and self._metrics["scratch"]):
            return None
        inherited = self._values("inherit", "test_accuracy")
        scratch = self._values("scratch", "test_accuracy")
        values = {"inherited weights": inherited, "from scratch": scratch}
        equal = min(len(inherited), len(scratch))
        epochs = sorted({1, *(ceil(equal * quarter / 4) for quarter in range(1, 5))})
        count = self.result.get("test_examples")
        return Comparison(
            self._svg(curves(values, "test accuracy"), _ends(values, "test accuracy")),
            [(epoch, inherited[epoch - 1], scratch[epoch - 1]) for epoch in epochs],
            worth_of_inheriting(inherited[equal - 1], scratch[equal - 1], count) if count else "",
        )

    @property
    def evaluated(self) -> list[Evaluated]:
        """The genotype and the controls that were trained alike; empty without controls."""
        controls = self.result.get("controls", {})
        rows = {"evaluate": self.result, **controls} if controls else {}
        return [
            Evaluated(
                PHASES[kind],
                row["test_accuracy"],
                row["test_accuracy_deviation"],
                row["parameters"],
                row["epochs"],
                row["training_seconds"],
            )
            for kind, row in rows.items()
        ]

    @property
    def timing(self) -> list[PhaseTiming]:
        return [
            PhaseTiming(
                phase_title(phase),
                len(records),
                sum(record["seconds"] for record in records),
                median(record["steps_per_second"] for record in records),
                max(record["peak_memory_bytes"] for record in records),
            )
            for phase, records in self._timing.items()
            if records
        ]

    def _values(self, phase: str, name: str) -> list[float]:
        return [record[name] for record in self._metrics[phase]]

    def _svg(self, figure: Figure, description: str) -> Markup:
        return inline_svg(figure, f"figure{next(self._figure_number)}", description)


def _read_if_there(run: RunFolder, name: str) -> Record:
    return run.read_json(name) if (run.path / name).is_file() else {}


def _by_phase(records: Iterable[Record]) -> dict[str, list[Record]]:
    phases: dict[str, list[Record]] = {phase: [] for phase in PHASES}
    for record in records:
        phases.setdefault(record["phase"], []).append(record)
    kinds = list(PHASES)
    return dict(sorted(phases.items(), key=lambda phase: kinds.index(phase[0].partition("-seed")[0])))


def phase_title(phase: str) -> str:
    kind, _, seed = phase.partition("-seed")
    return f"{PHASES[kind]}, seed {seed}" if seed else PHASES[kind]


def _ends(values: Mapping[str, list[float]], quantity: str) -> str:
    ends = [f"{name} from {curve[0]:.4g} to {curve[-1]:.4g}" for name, curve in values.items()]
    return f"{quantity} by epoch, {', '.join(ends)}"
