"""``neuroexapt export``: the trained network of a run as a file that is known to compute the same."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroexapt.core.operations import Noise
from neuroexapt.engine.checkpoint import write_atomically
from neuroexapt.engine.progress import Progress
from neuroexapt.engine.session import load_data
from neuroexapt.engine.trained import TrainedRun, load_trained
from neuroexapt.errors import UserError
from neuroexapt.exporting.formats import FORMATS, Format, trace
from neuroexapt.exporting.networks import KINDS, ExportedNetwork, Inputs
from neuroexapt.recommend.failures import in_one_line
from neuroexapt.version import __version__

EXAMPLES = 256
"""Inputs on which a file is compared with PyTorch."""
TOLERANCE = 1e-4
"""Largest difference, relative to the largest output. Rounding in another order stays far below."""


@dataclass(frozen=True)
class Exported:
    """A file that was written: on ``examples`` (so many, and which) its outputs, up to ``largest``, differed
    from PyTorch's by no more than ``difference``. ``metadata`` are in the file, ``usage`` is Python.
    """

    path: Path
    title: str
    difference: float
    largest: float
    examples: str
    metadata: dict[str, Any]
    usage: str

    def __str__(self) -> str:
        described = {**self.metadata["inputs"], **self.metadata["outputs"]}
        lines = "\n".join(f"{name}: {text}" for name, text in described.items())
        return (
            f"wrote {self.path}: {self.title}, batches of any size; on {self.examples} it differs from "
            f"PyTorch by {self.difference:.1e} at most, in outputs up to {self.largest:.3g}\n"
            f"{lines}\n\n{self.usage}"
        )


def export(
    run: Path | str,
    *,
    format: str | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
    data_root: Path | str | None = None,
) -> Exported:
    """Write the trained network of a run to one file that needs no neuroexapt, once it has been compared with
    the network in PyTorch.

    A classifier takes pictures uint8 [B, C, H, W] as they are and gives logits; a recommender takes item ids
    int64 [B, N] (and, if it was trained with times, those) and gives a score for every item. The file's
    metadata has ``classes`` or ``item_names`` and what else its users must know.

    Args:
        run: folder of a search or an evaluation. Exported are the weights that its last test figures are of;
            of several seeds the first one's.
        format: ``onnx`` or ``pt2`` (``torch.export``); default: by the ending of ``out``, else ``onnx``.
        out: file to write; default: ``model.onnx`` or ``model.pt2`` in the folder.
        overwrite: replace a file of that name.
        data_root: where to look for a standard data set; default: where the run did. The file is compared on
            examples of the test, and if they cannot be read on random ones.

    Raises:
        UserError: there is no trained network, the file exists, a package is missing, or the file computes
            something else than PyTorch beyond rounding.
    """
    path, kind = _destination(Path(run), format, Path(out) if out else None, overwrite)
    kind.require()
    trained = load_trained(run)
    if any(isinstance(module, Noise) for module in trained.network.modules()):
        raise UserError(
            f"the network of {run} adds noise, another one each time, so no file computes the same"
        )
    network = KINDS[trained.data["kind"]](trained.network, trained.data).eval()
    metadata = _metadata(trained, network)
    Progress(trained.config.quiet).say(f"writing {path}; a deep network takes a minute or two")
    content, computes = _write(kind, network, metadata)
    inputs, examples = _examples(trained, network, data_root)
    difference, largest = _compare(_in_two_batches(computes, inputs), _in_two_batches(network, inputs))
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"as {kind.title} the network gives {network.output_name} that differ from PyTorch's by "
            f"{difference:.1e} on {examples}, which is no rounding of outputs up to {largest:.3g}; no file "
            "was written. Try another --format"
        )
    write_atomically(path, content)
    usage = kind.usage(str(path), network.input_names, network.output_name, network.names) + network.call
    return Exported(path, kind.title, difference, largest, examples, metadata, usage)


def _destination(run: Path, name: str | None, out: Path | None, overwrite: bool) -> tuple[Path, Format]:
    """The file to write and its format."""
    if name is None:
        ending = out.suffix[1:] if out else ""
        name = ending if ending in FORMATS else "onnx"
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; choose {' or '.join(FORMATS)}")
    path = out or run / f"model.{name}"
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; replace it with --overwrite, or choose another file with --out")
    return path, FORMATS[name]


def _examples(trained: TrainedRun, network: ExportedNetwork, root: Path | str | None) -> tuple[Inputs, str]:
    """Inputs to compare on, and which they are."""
    config = dataclasses.replace(trained.config, download=False, quiet=True)
    if root is not None:
        config = dataclasses.replace(config, data_root=Path(root))
    kind = trained.data["kind"]
    try:
        data = load_data(config, max_resident_bytes=0)  # decodes the chosen pictures of a folder, not all
        inputs = network.examples(data, EXAMPLES)
    except UserError as error:
        return network.made_up(EXAMPLES), f"{EXAMPLES} random {kind} ({error})"
    return inputs, f"{len(inputs[0])} {kind} of the test"


def _metadata(trained: TrainedRun, network: ExportedNetwork) -> dict[str, Any]:
    return {
        "task": network.task,
        **network.contract,
        "dataset": Path(trained.config.dataset).name,
        **trained.figures,
        "space": trained.config.space,
        "genotype": trained.network.genotype.to_dict(),
        "neuroexapt": __version__,
        "torch": torch.__version__,
    }


def _write(
    kind: Format, network: ExportedNetwork, metadata: dict[str, Any]
) -> tuple[bytes, Callable[..., Tensor]]:
    """The content of the file, and what runs it."""
    try:
        program = trace(network, network.made_up(1))
        content = kind.write(program, network.input_names, network.output_name, metadata)
        return content, kind.load(content, network.input_names)
    except Exception as error:  # whatever exporters raise for operations that they do not know
        raise UserError(f"the network cannot be written as {kind.title}: {in_one_line(error)}") from error


@torch.no_grad()
def _in_two_batches(run: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """Outputs for the first example by itself, then for all at once."""
    return torch.cat([run(*(x[:1] for x in inputs)), run(*inputs)])


def _compare(computed: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest of what is finite in ``expected``."""
    differences = torch.where(computed == expected, 0.0, (computed - expected).abs())
    return differences.max().item(), expected.abs().masked_fill(expected.isinf(), 0).max().item()
