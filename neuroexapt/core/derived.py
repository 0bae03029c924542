"""The network that a genotype describes, and how it inherits what the search network has learned."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from neuroexapt.core.cells import SearchCell, TwoInputs
from neuroexapt.core.genotypes import AnyGenotype, Genotype
from neuroexapt.core.operations import Identity, MixedOp, make_op
from neuroexapt.core.supernet import STEM_MULTIPLIER, Supernet, make_stem, reduction_layers
from neuroexapt.errors import UserError

AUXILIARY_MIN_SIZE = 6


def drop_path(x: Tensor, drop_probability: float | Tensor) -> Tensor:
    """Zero whole pictures of [B, C, H, W] with ``drop_probability`` and rescale the rest (Larsson et al.,
    2017).
    """
    keep = 1 - drop_probability
    mask = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < keep
    return x / keep * mask


class DerivedCell(nn.Module):
    """The cell of a genotype: every node adds its operations; the output joins the states of ``concat``.

    ``inputs`` makes the first states of what earlier cells gave; the edges that leave those have
    ``input_stride``.
    """

    def __init__(
        self,
        edges: Sequence[tuple[int, int, str]],
        concat: Sequence[int],
        inputs: nn.Module,
        channels: int,
        *,
        input_stride: int = 1,
    ) -> None:
        super().__init__()
        self.concat = tuple(concat)
        self.inputs = inputs
        first_node = min(target for _, target, _ in edges)
        self.endpoints = tuple((source, target) for source, target, _ in edges)
        self.op_names = tuple(op for _, _, op in edges)
        self.edges = nn.ModuleList(
            make_op(op, channels, input_stride if source < first_node else 1, affine=True)
            for source, _, op in edges
        )
        self.channels_out = len(self.concat) * channels

    def forward(self, *outputs_before: Tensor, drop_path_probability: float | Tensor | None) -> Tensor:
        states = self.inputs(*outputs_before)
        for (source, target), op in zip(self.endpoints, self.edges, strict=True):
            h = op(states[source])
            if drop_path_probability is not None and not isinstance(op, Identity):
                h = drop_path(h, drop_path_probability)
            if target == len(states):
                states.append(h)
            else:
                states[target] = states[target] + h
        return torch.cat([states[i] for i in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier at two thirds of the depth, used while training (Szegedy et al., CVPR 2015).

    Identical to the published head at 8x8; the pooling's last window may be cut at other sizes, and several
    positions are averaged where the pictures are larger.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=3, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class DerivedNetwork(nn.Module):
    """The network of one genotype; each space has one of its own.

    ``forward`` maps [B, in_channels, H, W] to logits [B, num_classes]. While training,
    ``drop_path_probability`` (None: off) drops operations, and ``forward_with_auxiliary`` also returns the
    auxiliary head's logits. ``cells`` may hold other blocks between the cells of the genotype.
    """

    cells: nn.ModuleList

    def __init__(self, genotype: AnyGenotype) -> None:
        super().__init__()
        self.genotype = genotype
        self.drop_path_probability: float | Tensor | None = None
        self.auxiliary_head: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the classifier and, if the network has an auxiliary head, of that."""
        logits, features = self._run(x)
        return logits, self.auxiliary_head(features) if self.auxiliary_head is not None else None

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and what the auxiliary head reads."""
        raise NotImplementedError

    def inherited(self, number: int, searched: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """The modules of ``cells[number]``, each with the one that it was in the search network."""
        cell = self.cells[number]
        if isinstance(cell, DerivedCell) and isinstance(searched, SearchCell):
            return _kept(cell, searched)
        return [(cell, searched)]

    @property
    def _drop_path_now(self) -> float | Tensor | None:
        return self.drop_path_probability if self.training else None


class DartsNetwork(DerivedNetwork):
    """The evaluation network of DARTS."""

    def __init__(
        self,
        genotype: Genotype,
        *,
        in_channels: int,
        num_classes: int,
        channels: int,
        layers: int,
        auxiliary: bool = False,
    ) -> None:
        super().__init__(genotype)
        self.stem = make_stem(in_channels, STEM_MULTIPLIER * channels)

        self.cells = nn.ModuleList()
        self.auxiliary_layer = 2 * layers // 3
        channels_auxiliary = 0
        channels_s0 = channels_s1 = STEM_MULTIPLIER * channels
        reduction_prev = False
        for layer in range(layers):
            reduction = layer in reduction_layers(layers)
            channels = 2 * channels if reduction else channels
            name = "reduce" if reduction else "normal"
            cell = DerivedCell(
                genotype.edges(name),
                getattr(genotype, f"{name}_concat"),
                TwoInputs(channels_s0, channels_s1, channels, reduction_prev, affine=True),
                channels,
                input_stride=2 if reduction else 1,
            )
            self.cells.append(cell)
            channels_s0, channels_s1 = channels_s1, cell.channels_out
            reduction_prev = reduction
            if layer == self.auxiliary_layer:
                channels_auxiliary = channels_s1

        if auxiliary:
            self.auxiliary_head = AuxiliaryHead(channels_auxiliary, num_classes)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels_s1, num_classes)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s0 = s1 = self.stem(x)
        features = s1
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, drop_path_probability=self._drop_path_now)
            if layer == self.auxiliary_layer:
                features = s1
        return self.classifier(self.global_pooling(s1).flatten(1)), features


def auxiliary_fits(image_size: Sequence[int]) -> bool:
    """The auxiliary head sits after both reductions and pools 5x5 windows there."""
    return min(-(-size // 4) for size in image_size) >= AUXILIARY_MIN_SIZE


def check_auxiliary_size(image_size: Sequence[int]) -> None:
    """Refuse pictures that are too small for the auxiliary head."""
    if not auxiliary_fits(image_size):
        raise UserError(
            f"the auxiliary head needs pictures of at least {4 * AUXILIARY_MIN_SIZE - 3} pixels, these have "
            f"{min(image_size)}; switch it off with --no-auxiliary or enlarge with --image-size"
        )


@torch.no_grad()
def inherit_weights(network: DerivedNetwork, supernet: Supernet) -> None:
    """Copy what the search network has learned into the derived network of the same width and depth.

    Everything but the operations that were not chosen is taken over, running statistics included. The search
    cells' BatchNorms have no scale and shift: the derived ones start at 1 and 0. An auxiliary head starts
    anew, as do operations of edges with partial channels, which have another width.
    """
    searched = dict(supernet.named_children())
    pairs = [(child, searched[name]) for name, child in network.named_children() if name in searched]
    pairs = [(target, source) for target, source in pairs if target is not network.cells]
    for number, searched_cell in enumerate(supernet.cells):
        pairs += network.inherited(number, searched_cell)
    for target, source in pairs:
        # Not strict: scale and shift exist in the target only.
        target.load_state_dict(source.state_dict(), strict=False)


def _kept(cell: DerivedCell, search_cell: SearchCell) -> list[tuple[nn.Module, nn.Module]]:
    """The modules of a cell, each with the one that it was in the search."""
    pairs = [(cell.inputs, search_cell.inputs)]
    edge_index = {endpoints: i for i, endpoints in enumerate(search_cell.topology.edges)}
    for endpoints, name, op in zip(cell.endpoints, cell.op_names, cell.edges, strict=True):
        mixed = search_cell.edges[edge_index[endpoints]]
        if isinstance(mixed, MixedOp) and any(True for _ in op.parameters()):
            pairs.append((op, mixed.candidate(name)))
    return pairs


def count_parameters(network: nn.Module) -> int:
    """Parameters at inference: without the auxiliary head, as papers count them."""
    named = network.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith("auxiliary_head."))
