"""The search's networks, the ways to run them and their step: what the benchmarks of the search share."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroexapt.backend import use_backend
from neuroexapt.core.supernet import Supernet
from neuroexapt.engine.bilevel import Batch, BilevelStep
from neuroexapt.engine.config import SearchConfig
from neuroexapt.engine.device import place
from neuroexapt.engine.execution import set_execution
from neuroexapt.engine.search_phase import ARCH_BETAS
from neuroexapt.engine.training import make_optimizer
from neuroexapt.spaces import get_space
from neuroexapt.strategies import get_strategy

PRECISIONS = ("float32", "tf32", "bfloat16")
"""``float32``: exact products. ``tf32``: convolutions may round to TF32, as PyTorch ships it; the
classifier's matrix product may not. ``bfloat16``: the network under autocast, whose states kernels of ours
store in bf16 and multiply in TF32; the rest as ``float32``.
"""


@dataclass(frozen=True)
class Network:
    """The search network for one kind of pictures."""

    layers: int
    channels: int
    in_channels: int
    side: int
    space: str = "darts"

    def supernet(self, device: torch.device) -> Supernet:
        """The same for every seed of PyTorch's, whatever the device."""
        supernet = get_space(self.space).supernet(
            in_channels=self.in_channels, num_classes=10, channels=self.channels, layers=self.layers
        )
        return place(supernet, device)

    def batch(self, size: int, device: torch.device) -> Batch:
        """Noise, the same for every seed of PyTorch's, whatever the device."""
        images = torch.randn(size, self.in_channels, self.side, self.side)
        return Batch(images.to(device), torch.randint(10, (size,)).to(device))


NETWORKS = {
    "cifar10": Network(layers=8, channels=16, in_channels=3, side=32),
    "nb201": Network(layers=17, channels=16, in_channels=3, side=32, space="nas-bench-201"),
    "digits": Network(layers=4, channels=8, in_channels=1, side=8),
}


@dataclass(frozen=True)
class Implementation:
    """How the network is executed, by whose kernels, and whether a step is one CUDA graph."""

    execution: str
    tier: str
    captured: bool
    recompute: bool = False

    @contextlib.contextmanager
    def in_force(self, precision: str, device: torch.device) -> Iterator[None]:
        """Inside, calls run on this implementation's kernels and with these products."""
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = convolutions.fp32_precision
        convolutions.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            with use_backend("cpu" if device.type == "cpu" else f"cuda:{self.tier}"):
                yield
        finally:
            convolutions.fp32_precision = before

    def set_up(self, supernet: Supernet, precision: str) -> None:
        """Let ``supernet`` run this way."""
        # Kernels for exactly the shapes at hand: the compiler would make one for all after the second edge.
        torch._dynamo.config.automatic_dynamic_shapes = False
        set_execution(supernet, self.execution)
        supernet.set_recompute(self.recompute)
        supernet.set_precision("bf16" if precision == "bfloat16" else "fp32")


IMPLEMENTATIONS = {
    "eager": Implementation("reference", "torch", captured=False),
    "eager-graph": Implementation("reference", "torch", captured=True),
    "compile": Implementation("compile", "torch", captured=False),
    "compile-graph": Implementation("compile", "torch", captured=True),
    "plan": Implementation("fused", "torch", captured=False),
    "plan-graph": Implementation("fused", "torch", captured=True),
    "triton": Implementation("fused", "triton", captured=False),
    "triton-graph": Implementation("fused", "triton", captured=True),
    "ext": Implementation("fused", "ext", captured=False),
    "ext-graph": Implementation("fused", "ext", captured=True),
    "ext-graph-recompute": Implementation("fused", "ext", captured=True, recompute=True),
}
"""``eager``: module by module. ``compile``: every MixedOp through torch.compile. ``plan``: the cell's plan in
plain PyTorch. ``triton``: the plan in Triton. ``ext``: the plan in CUDA C++. ``recompute``: keeping only what
enters each cell.
"""


def make_step(supernet: Supernet, config: SearchConfig) -> BilevelStep:
    """The step of a search with these settings, and the optimizers that a search uses."""
    device = next(supernet.parameters()).device
    arch_optimizer = torch.optim.Adam(
        supernet.arch_parameters(),
        config.arch_learning_rate,
        betas=ARCH_BETAS,
        weight_decay=config.arch_weight_decay,
        capturable=device.type == "cuda",
    )
    strategy = get_strategy(config.strategy).to(device)
    supernet.set_drawn_only(strategy.single_path)
    return BilevelStep(
        supernet,
        strategy,
        make_optimizer(supernet.weights(), config),
        arch_optimizer,
        grad_clip=config.grad_clip,
    )


def take_step(step: BilevelStep) -> Callable[..., Tensor]:
    """The whole step as a function of tensors, training batch first, to its metrics [4]."""

    def take(images: Tensor, labels: Tensor, valid_images: Tensor, valid_labels: Tensor) -> Tensor:
        return torch.stack(step(Batch(images, labels), Batch(valid_images, valid_labels)))

    return take
