"""A bilevel step on a network and batches so small that a strategy shows what it does in a moment."""

from typing import Any

import torch

from neuroexapt.core.cells import CellTopology
from neuroexapt.core.supernet import Supernet
from neuroexapt.data import make_loader
from neuroexapt.data.augment import Augmentation
from neuroexapt.data.parts import ResidentImages
from neuroexapt.engine.bilevel import Batch, BilevelStep, Strategy
from neuroexapt.engine.config import SearchConfig, make_config
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.spaces import CellSpace

PRIMITIVES = ("none", "skip_connect", "sep_conv_3x3", "avg_pool_3x3")
SPACE = CellSpace("small", PRIMITIVES, CellTopology(nodes=2))


def make_supernet(channels: int, layers: int = 3) -> Supernet:
    return SPACE.supernet(in_channels=2, num_classes=3, channels=channels, layers=layers)


def make_loader_of(seed: int, device: str = "cpu") -> Any:
    """Batches of 8 of 24 pictures of 6x6."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (24, 2, 6, 6), dtype=torch.uint8, generator=generator)
    return make_loader(
        ResidentImages(images, torch.arange(24) % 3),
        batch_size=8,
        device=torch.device(device),
        seed=seed,
        mean=(0.5,) * 2,
        std=(0.25,) * 2,
        augmentation=Augmentation(crop_padding=1),
        drop_last=True,
    )


def make_step(strategy: Strategy, channels: int = 4) -> tuple[BilevelStep, Batch, Batch]:
    """With training and validation batch."""
    torch.manual_seed(0)
    supernet = make_supernet(channels)
    strategy.shape(supernet)
    train, valid = (Batch(torch.randn(6, 2, 6, 6), torch.randint(3, (6,))) for _ in range(2))
    step = BilevelStep(
        supernet,
        strategy,
        torch.optim.SGD(supernet.weights(), 0.05, momentum=0.9),
        torch.optim.Adam(supernet.arch_parameters(), 1e-2),
        grad_clip=5.0,
    )
    return step, train, valid


def values_by_epoch(strategy: Strategy, name: str, epochs: int) -> list[float]:
    """What a strategy's buffer is in each epoch of a search."""
    step, *_ = make_step(strategy)
    values = []
    for epoch in range(epochs):
        strategy.start_epoch(step.supernet, epoch, epochs)
        values.append(strategy.get_buffer(name).item())
    return values


def some_alphas(rows: int = 5, columns: int = 4) -> dict[str, torch.Tensor]:
    """Of two cell types, far from uniform."""
    generator = torch.Generator().manual_seed(0)
    return {
        cell: torch.randn(rows, columns, generator=generator, requires_grad=True)
        for cell in ("normal", "reduce")
    }


def make_phase(device: str = "cpu", channels: int = 8, layers: int = 3, **settings: Any) -> SearchPhase:
    """A search of 4 epochs in the small space, which has to be registered."""
    torch.manual_seed(0)
    usual = {
        "space": SPACE.name,
        "layers": layers,
        "init_channels": channels,
        "epochs": 4,
        "batch_size": 8,
        "arch_learning_rate": 0.1,
    }
    supernet = make_supernet(channels, layers).to(device)
    loaders = (make_loader_of(seed, device) for seed in (1, 2))
    config = make_config(SearchConfig, {**usual, **settings})
    return SearchPhase(supernet, *loaders, config, facts={"in_channels": 2, "num_classes": 3})
