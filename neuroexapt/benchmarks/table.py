"""Tabular benchmarks: the accuracy of every architecture of a space, trained once by somebody else.

``load_table`` reads either of

* a CSV file, ``.csv`` or ``.csv.gz``, with a row an architecture: a column ``arch`` for the arch string, and
  any of the columns in ``COLUMNS`` (accuracies in per cent); further columns are left aside;
* what NATS-Bench (Dong et al., TPAMI 2021) distributes for its topology space, file or folder, through the
  package ``nats_bench``.

Nothing of a table may be used by a search: it tells how good the search is.
"""

import csv
import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.errors import UserError

DATASETS = {"cifar10": "c10", "cifar100": "c100", "imagenet16": "in16"}
EPOCHS = {"": 200, "_12": 12}
"""Of training in the benchmark, by the end of a figure's name."""
COLUMNS = {
    f"{dataset}_{part}{end}": f"{short}_{part}_{epochs}"
    for dataset, short in DATASETS.items()
    for part in ("test", "valid")
    for end, epochs in EPOCHS.items()
}
"""A figure's name, such as ``cifar10_test`` or ``cifar10_valid_12``, and the column that holds it."""
PARAMETERS_COLUMN = "params_c10"


class Table(ABC):
    """``query`` tells what is known of a genotype."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def query(self, genotype: AnyGenotype) -> dict[str, float]:
        """Top-1 accuracies in 0..1 by the names in ``COLUMNS``, and ``parameters``, as far as known.

        ``test`` is after training on all training pictures of CIFAR-10 or on the training part of the others,
        ``valid`` after training on the training part; ``_12`` after 12 epochs instead of 200.

        Raises:
            UserError: the table does not hold the genotype.
        """
        found = self._find(str(genotype))
        if found is None:
            raise UserError(
                f"{self.path} is not a table of this search space, or is incomplete: give another --table or "
                f"none. It lacks {genotype}"
            )
        return found

    @abstractmethod
    def _find(self, arch: str) -> dict[str, float] | None: ...


class CsvTable(Table):
    """A table in a CSV file, read at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            open_text = gzip.open if path.suffix == ".gz" else open
            with open_text(path, "rt", encoding="utf-8-sig") as file:
                self._rows = dict(self._read(file))
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read the table {path}: {error}") from error

    def _read(self, file: TextIO) -> Iterator[tuple[str, dict[str, float]]]:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        known = {name: column for name, column in COLUMNS.items() if column in columns}
        if "arch" not in columns or not known:
            raise UserError(
                f"{self.path} is no table: it needs a column arch and some of {', '.join(COLUMNS.values())}"
            )
        for row in reader:
            try:
                figures = {name: _percent(row[column]) / 100 for name, column in known.items()}
                if PARAMETERS_COLUMN in columns:
                    figures["parameters"] = float(row[PARAMETERS_COLUMN])
            except (TypeError, ValueError) as error:
                raise UserError(f"{self.path}, line {reader.line_num}: {error}") from error
            yield row["arch"], figures

    def _find(self, arch: str) -> dict[str, float] | None:
        return self._rows.get(arch)


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError(f"{text!r} is no accuracy in per cent")
    return value


class NatsTable(Table):
    """NATS-Bench's own files, asked one architecture at a time; means over the seeds that it trained."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import nats_bench
        except ImportError as error:
            raise UserError(
                f"reading {path} takes the package nats_bench: pip install nats_bench; or give a CSV file"
            ) from error
        try:
            self._api = nats_bench.create(str(path), "topology", fast_mode=path.is_dir(), verbose=False)
        except Exception as error:  # whatever unpickling another file raises
            raise UserError(f"nats_bench cannot read {path}: {error}") from error

    def _find(self, arch: str) -> dict[str, float] | None:
        index = self._api.query_index_by_arch(arch)
        if index == -1:
            return None
        parameters = self._api.get_cost_info(index, "cifar10", hp="200")["params"] * 1e6
        return {**dict(self._accuracies(index)), "parameters": parameters}

    def _accuracies(self, index: int) -> Iterator[tuple[str, float]]:
        for end, epochs in EPOCHS.items():

            def figures(dataset: str, epochs: int = epochs) -> dict[str, Any]:
                return self._api.get_more_info(index, dataset, hp=str(epochs), is_random=False)

            yield f"cifar10_test{end}", figures("cifar10")["test-accuracy"] / 100
            yield f"cifar10_valid{end}", figures("cifar10-valid")["valid-accuracy"] / 100
            for name, dataset in {"cifar100": "cifar100", "imagenet16": "ImageNet16-120"}.items():
                for part in ("test", "valid"):
                    yield f"{name}_{part}{end}", figures(dataset)[f"{part}-accuracy"] / 100


def load_table(path: str | Path) -> Table:
    """The table at ``path``; see this module for what may be there."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no table {path}; give a CSV file, or the files of NATS-Bench")
    return CsvTable(path) if path.name.endswith((".csv", ".csv.gz")) else NatsTable(path)
