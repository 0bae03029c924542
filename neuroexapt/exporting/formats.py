"""Modules as files: ONNX, and PyTorch's own exported programs."""

import contextlib
import io
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from neuroexapt.errors import BackendUnavailableError

OPSET = 18
"""Of ONNX; ONNX Runtime knows it since 1.14, of 2023."""
METADATA_FILE = "metadata.json"
"""Where a .pt2 file keeps its metadata."""


def trace(module: nn.Module, inputs: Sequence[Tensor]) -> ExportedProgram:
    """The graph of ``module`` for batches of any size; ``inputs``: one batch."""
    shapes = ({0: torch.export.Dim("batch", min=1)},) * len(inputs)
    two = tuple(torch.cat([x, x]) for x in inputs)  # since a size of 1 would be taken for a constant
    with _no_warnings():
        program = torch.export.export(module, two, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the paths of this machine
    return program


class Format(ABC):
    """A kind of file. ``input_names``: of the inputs that a graph was traced with, in their order."""

    title: ClassVar[str]

    @abstractmethod
    def require(self) -> None:
        """Raise a BackendUnavailableError where a package is missing."""

    @abstractmethod
    def write(
        self,
        program: ExportedProgram,
        input_names: Sequence[str],
        output_name: str,
        metadata: Mapping[str, Any],
    ) -> bytes:
        """The content of the file; ``metadata`` is anything that JSON can express, by name."""

    @abstractmethod
    def load(self, content: bytes, input_names: Sequence[str]) -> Callable[..., Tensor]:
        """What runs it on the CPU: inputs of one batch, of any size → the output."""

    @abstractmethod
    def usage(self, path: str, input_names: Sequence[str], output_name: str, names: str) -> str:
        """Python that computes ``output_name`` by the file and reads the metadata called ``names``."""


class Onnx(Format):
    """Metadata that is no text is kept as JSON."""

    title = f"ONNX, opset {OPSET}"

    def require(self) -> None:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401  what torch.onnx exports with
        except ImportError as error:
            raise BackendUnavailableError(f"{error}; pip install 'neuroexapt[export]'") from error

    def write(
        self,
        program: ExportedProgram,
        input_names: Sequence[str],
        output_name: str,
        metadata: Mapping[str, Any],
    ) -> bytes:
        import onnx

        with _no_warnings():
            exported = torch.onnx.export(
                program,
                input_names=input_names,
                output_names=[output_name],
                dynamic_shapes=({0: "batch"},) * len(input_names),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert exported is not None
        model = exported.model_proto
        graph = model.graph
        # How PyTorch came to each of them, which takes more room than small weights do.
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
            del part.metadata_props[:]
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        onnx.helper.set_model_props(model, texts)
        return model.SerializeToString()

    def load(self, content: bytes, input_names: Sequence[str]) -> Callable[..., Tensor]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait spinning take the cores from whoever answers requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

        def run(*inputs: Tensor) -> Tensor:
            given = {name: x.numpy() for name, x in zip(input_names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, given)[0])

        return run

    def usage(self, path: str, input_names: Sequence[str], output_name: str, names: str) -> str:
        feed = ", ".join(f'"{name}": {name}' for name in input_names)
        return (
            "import json, onnxruntime\n"
            f"session = onnxruntime.InferenceSession({json.dumps(path)})\n"
            f'{names} = json.loads(session.get_modelmeta().custom_metadata_map["{names}"])\n'
            f"({output_name},) = session.run(None, {{{feed}}})\n"
        )


class Pt2(Format):
    """Metadata are in ``METADATA_FILE`` of the archive."""

    title = "PyTorch's exported program"

    def require(self) -> None:
        """PyTorch is enough."""

    def write(
        self,
        program: ExportedProgram,
        input_names: Sequence[str],
        output_name: str,
        metadata: Mapping[str, Any],
    ) -> bytes:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
        return file.getvalue()

    def load(self, content: bytes, input_names: Sequence[str]) -> Callable[..., Tensor]:
        with _no_warnings():
            return torch.export.load(io.BytesIO(content)).module()

    def usage(self, path: str, input_names: Sequence[str], output_name: str, names: str) -> str:
        return (
            "import json, torch\n"
            f'files = {{"{METADATA_FILE}": ""}}\n'
            f"program = torch.export.load({json.dumps(path)}, extra_files=files)\n"
            f'{names} = json.loads(files["{METADATA_FILE}"])["{names}"]\n'
            f"{output_name} = program.module()({', '.join(input_names)})\n"
        )


FORMATS: dict[str, Format] = {"onnx": Onnx(), "pt2": Pt2()}
"""By the ending of their files."""


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """PyTorch's exporters warn of their own inner workings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
