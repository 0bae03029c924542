"""Ways to execute a recommender's scoring of the catalogue, and the choice between them by measurement."""

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.backend import PersistentKernel, Timing
from neuroexapt.backend.candidates import without_kernels
from neuroexapt.backend.measure import time_calls
from neuroexapt.errors import BackendUnavailableError, UserError
from neuroexapt.exporting.formats import FORMATS, trace
from neuroexapt.recommend.config import OPERATORS
from neuroexapt.recommend.failures import in_one_line
from neuroexapt.recommend.manager import TritonOperatorManager

Inputs = tuple[Tensor, ...]
"""items [B, N], lengths [B] and, for models that look at times, timestamps [B, N]; all int64."""
Run = Callable[..., Tensor]
"""Scores [B, num_items + 1] of ``Inputs``."""

_MEASURED_SECONDS = 0.1


class Scorer(nn.Module):
    """Scores [B, num_items + 1] of every item as the next one; those of padding, column 0, are −∞."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, items: Tensor, lengths: Tensor, timestamps: Tensor | None = None) -> Tensor:
        return self.model.scores(self.model(items, lengths, timestamps))


def eager(scorer: Scorer, samples: Sequence[Inputs]) -> Run:
    """Operation by operation, each on the implementation that the dispatch chooses."""
    return scorer


def compiled(scorer: Scorer, samples: Sequence[Inputs]) -> Run:
    """By ``torch.compile``, for all batch sizes."""
    # Code is compiled once for all modules of a kind; a copy's has the kernels that are in force now.
    code = Scorer.forward.__code__.replace()
    forward = types.FunctionType(code, Scorer.forward.__globals__, argdefs=Scorer.forward.__defaults__)
    run = functools.partial(torch.compile(forward, dynamic=True), scorer)
    for sample in samples:
        run(*sample)
    return run


def captured(scorer: Scorer, samples: Sequence[Inputs]) -> Run:
    """As one CUDA graph for each batch size."""
    kernels = {len(sample[0]): PersistentKernel(scorer, sample) for sample in samples}
    for kernel in kernels.values():
        if not kernel.captured:
            raise BackendUnavailableError(kernel.reason)
    return lambda *inputs: kernels[len(inputs[0])](*inputs)


def onnxruntime(scorer: Scorer, samples: Sequence[Inputs]) -> Run:
    """By ONNX Runtime, from an export that takes any batch size."""
    if samples[0][0].device.type != "cpu":
        raise BackendUnavailableError(
            "ONNX Runtime serves from the CPU here, and the recommender is on a GPU"
        )
    onnx = FORMATS["onnx"]
    onnx.require()
    sample = samples[-1]
    names = INPUT_NAMES[: len(sample)]
    return onnx.load(onnx.write(trace(scorer, sample), names, "scores", {}), names)


STRATEGIES = {"eager": eager, "compiled": compiled, "captured": captured, "onnxruntime": onnxruntime}
"""What makes of a scorer, and of one batch of every size, a function that scores batches of those sizes.

They raise whatever keeps them from running here.
"""
REFERENCE = "reference"
"""Plain PyTorch, without the kernels of the operators: what remains where a strategy fails."""
INPUT_NAMES = ("items", "lengths", "timestamps")


def check_names(names: Sequence[str]) -> None:
    """Raise a UserError for what is no strategy's name."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError(f"strategies must be a list of names, not {names!r}")
    for name in names:
        if name not in STRATEGIES:
            raise UserError(f"unknown strategy {name!r}; choose of {', '.join(STRATEGIES)}")


class Execution:
    """A recommender on the strategies that run here, each measured at every batch size.

    Args:
        model: scores the catalogue; in evaluation mode.
        device: where it is.
        names: of the strategies to prepare.
        largest_batch: batches are padded to powers of two up to this one.
        manager: in charge of the operators, except of what ``REFERENCE`` runs.

    ``timings``: by strategy and batch size. ``optimizations``: by strategy, what it is more than PyTorch's
    operations one by one, with the kernels as ``tier:operator``. ``unavailable``: why a strategy cannot run.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        names: Sequence[str],
        largest_batch: int,
        manager: TritonOperatorManager,
    ) -> None:
        self.device = device
        self._manager = manager
        self.batch_sizes = _powers_of_two(largest_batch)
        self.unavailable: dict[str, str] = {}
        self.timings: dict[str, dict[int, Timing]] = {}
        self.optimizations: dict[str, tuple[str, ...]] = {}
        self._runs: dict[str, Run] = {REFERENCE: _reference(Scorer(model))}
        samples = [_sample(model, size, device) for size in self.batch_sizes]
        with torch.no_grad(), manager.uncounted():
            # Kernels that fail are found here and left out of what is compiled next.
            with contextlib.suppress(Exception), manager.in_charge():
                for sample in samples:
                    Scorer(model)(*sample)
            for name in names:
                with manager.in_charge():
                    self._prepare(name, Scorer(model), samples)

    def fastest(self, batch_size: int) -> str:
        """The strategy whose median was the lowest at this size; ``REFERENCE`` where none is left."""
        return min(self.timings, key=lambda name: self.timings[name][batch_size].median_ms, default=REFERENCE)

    def run(self, name: str, inputs: Inputs) -> Tensor:
        """Scores of a batch of one of ``batch_sizes``."""
        with torch.no_grad(), self._manager.in_charge():
            return self._runs[name](*(x.to(self.device) for x in inputs))

    def require(self, name: str) -> None:
        """Raise what keeps a strategy from running here."""
        if name in self._runs:
            return
        if name not in STRATEGIES:
            raise UserError(
                f"unknown strategy {name!r}; choose auto or of {', '.join([*STRATEGIES, REFERENCE])}"
            )
        reason = self.unavailable.get(name, "it was not among the strategies to prepare")
        raise BackendUnavailableError(f"strategy {name!r} cannot run here: {reason}")

    def withdraw(self, name: str, reason: str) -> None:
        """Run a strategy no more, for this reason."""
        self.unavailable[name] = reason
        del self._runs[name], self.timings[name]

    def stats(self) -> dict[str, Any]:
        """What the warm-up found, for ``get_comprehensive_stats``."""
        return {
            "warm_up": {
                name: {size: timing.median_ms for size, timing in of_sizes.items()}
                for name, of_sizes in self.timings.items()
            },
            "optimizations": dict(self.optimizations),
            "unavailable_strategies": dict(self.unavailable),
        }

    def _prepare(self, name: str, scorer: Scorer, samples: list[Inputs]) -> None:
        before = self._manager.kernels_used()
        try:
            run = STRATEGIES[name](scorer, samples)
            timings = {
                len(sample[0]): time_calls(lambda: run(*sample), self.device, _MEASURED_SECONDS)  # noqa: B023
                for sample in samples
            }
        except Exception as error:  # whatever an exporter or a compiler and its toolchain raise
            self.unavailable[name] = _reason(error)
            return
        self._runs[name], self.timings[name] = run, timings
        kernels = self._manager.kernels_used() - before
        self.optimizations[name] = (*([name] if name != "eager" else []), *sorted(kernels))


def _reference(scorer: Scorer) -> Run:
    def run(*inputs: Tensor) -> Tensor:
        with without_kernels(OPERATORS):
            return scorer(*inputs)

    return run


def _sample(model: Any, batch_size: int, device: torch.device) -> Inputs:
    """Full histories of made-up items, the case that takes longest."""
    ids = torch.arange(batch_size * model.max_length, device=device) % model.num_items + 1
    items = ids.reshape(batch_size, model.max_length).clone()  # what is compiled for views is for them alone
    lengths = items.new_full((batch_size,), model.max_length)
    return (items, lengths, items.sort().values) if model.has_times else (items, lengths)


def _powers_of_two(largest: int) -> list[int]:
    return list(itertools.takewhile(lambda size: size < 2 * largest, (2**i for i in itertools.count())))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else in_one_line(error)
