"""One training step of a derived network, forward, backward and optimizer: every way to run it.

``python benchmarks/train_step.py [--implementations graph ...] [--precisions bfloat16] [--batch 256]`` takes
a minute or two on one GPU. The network is DARTS' second-order cell as published for CIFAR-10 (20 cells, 36
channels, auxiliary head), on noise. ``eager`` launches PyTorch's own operations one by one, ``eager-graph``
as one CUDA graph; ``graph`` is the same with the kernels that dispatch chooses for convolutions and pools,
as ``neuroexapt evaluate`` runs it. ``compile-nhwc-graph`` has every cell through torch.compile, which takes
minutes, and the whole step in one graph. ``-nhwc``: channels-last.

Before it is timed, the loss of the first step is held to that of the same network in fp32; one that is off is
reported, not timed, and makes the exit code 1. ``step_ms`` is the time from the end of a step to the end of
the next; ``peak_bytes`` is everything allocated, parameters and graphs included.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from _harness import Results, Spread, open_results, paced_ms, results_parser
from torch import Tensor

from neuroexapt.backend import use_backend
from neuroexapt.core.genotypes import DARTS_V2
from neuroexapt.data import make_loader
from neuroexapt.data.parts import ResidentImages
from neuroexapt.engine.config import EvaluateConfig
from neuroexapt.engine.device import peak_memory_bytes, place, reset_peak_memory
from neuroexapt.engine.training import TrainPhase
from neuroexapt.spaces import DARTS

TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 3e-2}


class Implementation(NamedTuple):
    """Whose kernels a network of which layout runs on, whether a step is one CUDA graph and its cells are
    compiled.
    """

    tier: str
    captured: bool
    channels_last: bool
    compiled: bool = False


IMPLEMENTATIONS = {
    "eager": Implementation("cuda:torch", captured=False, channels_last=False),
    "eager-nhwc": Implementation("cuda:torch", captured=False, channels_last=True),
    "eager-graph": Implementation("cuda:torch", captured=True, channels_last=False),
    "eager-nhwc-graph": Implementation("cuda:torch", captured=True, channels_last=True),
    "compile-nhwc-graph": Implementation("cuda:torch", captured=True, channels_last=True, compiled=True),
    "graph": Implementation("cuda", captured=True, channels_last=False),
    "nhwc-graph": Implementation("cuda", captured=True, channels_last=True),
}


@dataclass(frozen=True)
class Case:
    """The network and its batches: the published ones, or small ones where there is no GPU."""

    device: torch.device
    batch: int
    layers: int
    channels: int
    side: int

    @property
    def name(self) -> str:
        return f"darts-l{self.layers}-c{self.channels}-{self.side}x{self.side}-b{self.batch}"

    def phase(self, implementation: Implementation, precision: str) -> TrainPhase:
        """A training whose weights and pictures are the same for every implementation."""
        torch.manual_seed(0)
        auxiliary = self.side >= 32
        network = DARTS.network(
            DARTS_V2,
            in_channels=3,
            num_classes=10,
            channels=self.channels,
            layers=self.layers,
            auxiliary=auxiliary,
        )
        images = torch.randint(256, (self.batch, 3, self.side, self.side), dtype=torch.uint8)
        loader = make_loader(
            ResidentImages(images, torch.arange(self.batch) % 10),
            batch_size=self.batch,
            device=self.device,
            seed=0,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        )
        phase = TrainPhase(
            "evaluate",
            place(network, self.device, implementation.channels_last),
            loader,
            loader,
            EvaluateConfig(
                precision="bf16" if precision == "bfloat16" else "fp32", compile=implementation.compiled
            ),
            epochs=1,
            auxiliary_weight=0.4 if auxiliary else 0.0,
            label_smoothing=0.1,
            ema=0.999,
        )
        if not implementation.captured:
            phase._take_step = phase._step
        phase.network.train()
        return phase

    def pictures(self, phase: TrainPhase) -> tuple[Tensor, Tensor]:
        return next(phase._loader.epoch(0))


@contextlib.contextmanager
def in_force(tier: str, precision: str, device: torch.device) -> Iterator[None]:
    """Inside, calls run on these kernels, and convolutions of fp32 round to TF32 only where that is meant."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        with use_backend("cpu" if device.type == "cpu" else tier):
            yield
    finally:
        convolutions.fp32_precision = before


def first_loss(case: Case) -> float:
    """Of the network in fp32 on PyTorch's own kernels."""
    with in_force("cuda:torch", "float32", case.device):
        phase = case.phase(IMPLEMENTATIONS["eager"], "float32")
        return phase._step(*case.pictures(phase))[0].item()


def measure(case: Case, name: str, precision: str, expected: float, results: Results, seconds: float) -> bool:
    """Record the figures of one implementation; whether its first loss was right."""
    implementation = IMPLEMENTATIONS[name]
    with in_force(implementation.tier, precision, case.device):
        phase = case.phase(implementation, precision)
        pictures = case.pictures(phase)
        phase.prepare(*pictures)
        reset_peak_memory(case.device)
        error = abs(phase._take_step(*pictures)[0].item() / expected - 1)
        if not error <= TOLERANCES[precision]:
            results.add_status(case.name, name, precision, f"failed: the loss is off by {error:.1e}")
            return False
        spread = paced_ms(lambda: phase._take_step(*pictures), seconds, case.device)
    results.add(case.name, name, precision, "step_ms", "ms", spread, error)
    peak = Spread.exactly(peak_memory_bytes(case.device))
    results.add(case.name, name, precision, "peak_bytes", "bytes", peak, error)
    return True


def arguments_from_command_line() -> argparse.Namespace:
    parser = results_parser("train_step", __doc__)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=[*IMPLEMENTATIONS])
    parser.add_argument("--precisions", nargs="+", choices=TOLERANCES, default=["tf32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[96, 256], help="batch sizes")
    parser.add_argument("--seconds", type=float, default=3.0, help="to time each for")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--channels", type=int, default=36)
    parser.add_argument("--side", type=int, default=32, help="of the pictures")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser.parse_args()


def main() -> int:
    arguments = arguments_from_command_line()
    results = open_results("train_step", arguments, arguments.device)
    device, right = torch.device(arguments.device), True
    for batch in arguments.batch:
        case = Case(device, batch, arguments.layers, arguments.channels, arguments.side)
        expected = first_loss(case)
        for precision in arguments.precisions:
            for name in arguments.implementations:
                right &= measure(case, name, precision, expected, results, arguments.seconds)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
