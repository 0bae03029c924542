"""What the engine asks of a search space."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuroexapt.core.derived import DerivedNetwork
from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.core.operations import make_op
from neuroexapt.core.supernet import Supernet
from neuroexapt.core.task import CLASSIFICATION, Task
from neuroexapt.errors import UserError

REDUCTIONS = 2
"""How often the published networks halve the resolution."""


class Space(ABC):
    """What may be chosen, and how a choice becomes a network. The engine knows nothing else of a space."""

    name: str
    primitives: tuple[str, ...]
    """The candidate operations, in the order of the columns of α."""
    task: Task = CLASSIFICATION
    """What its networks are trained for."""
    may_choose_none = False
    """Whether ``none`` can be an edge's operation in a genotype."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings of a run that differ from the usual ones here."""
        return {}

    @abstractmethod
    def check(self, input_size: Sequence[int], channels: int, layers: int, batch_size: int) -> None:
        """Refuse, with one clear line, what no network of this space can take; ``input_size``: height and
        width of pictures, or length of histories.
        """

    @abstractmethod
    def supernet(self, *args: Any, **facts: Any) -> Supernet:
        """The search network, by keywords alone: ``channels``, ``layers`` and the ``facts`` of the data, of
        pictures ``in_channels`` and ``num_classes``.
        """

    @abstractmethod
    def derive(self, weights: Mapping[str, Tensor]) -> Any:
        """The genotype that mixing weights, [E, K] for each type of cell, stand for."""

    @abstractmethod
    def network(self, genotype: Any, *args: Any, **facts: Any) -> DerivedNetwork:
        """The network of a genotype, by the keywords of ``supernet`` and ``auxiliary``: whether it has a
        second classifier. A UserError if the genotype belongs to another space.
        """

    @abstractmethod
    def describe(self, layers: int) -> dict[str, Any]:
        """What a report needs to draw α: ``name``, ``primitives``, ``edges`` (source, target) of each type of
        cell, ``nodes`` (the states' names), ``primitives_of`` types of cells that have others.
        """

    def random_genotype(self, generator: torch.Generator, layers: int) -> Any:
        """What random mixing weights stand for."""
        edges = self.describe(layers)["edges"]
        shapes = {cell: (len(rows), len(self.primitives_of(cell))) for cell, rows in edges.items()}
        return self.derive({cell: torch.rand(shape, generator=generator) for cell, shape in shapes.items()})

    def primitives_of(self, cell: str) -> tuple[str, ...]:
        """The candidate operations of a type of cells."""
        return self.primitives

    def _check_kind(self, genotype: AnyGenotype, kind: type) -> None:
        if not isinstance(genotype, kind):
            raise UserError(
                f"this genotype is none of {self.name}; name its --space or another --genotype: {genotype}"
            )


def check_pictures(image_size: Sequence[int], batch_size: int) -> None:
    """Whether pictures survive the reductions, and BatchNorm has more than one value a channel there."""
    smallest = 2**REDUCTIONS
    if min(image_size) < smallest:
        raise UserError(
            f"pictures of {image_size[0]}x{image_size[1]} pixels are too small for {REDUCTIONS} "
            f"reductions; give at least {smallest}x{smallest}, for instance with --image-size 8"
        )
    if batch_size == 1 and max(image_size) <= smallest:
        raise UserError("batches of 1 leave BatchNorm one value a channel here; raise --batch-size")


def check_operation(primitive: str, strides: Sequence[int]) -> None:
    """An operation keeps the width and divides the resolution by its stride, rounding up."""
    for stride in strides:
        shape = make_op(primitive, 2, stride, affine=False)(torch.zeros(2, 2, 5, 5)).shape
        expected = (2, 2, *(-(-5 // stride),) * 2)
        if shape != expected:
            raise UserError(
                f"operation {primitive!r} turns [2, 2, 5, 5] at stride {stride} into {[*shape]}; it must be "
                f"{[*expected]}"
            )
