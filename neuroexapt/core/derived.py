"""The network that a genotype describes, and how it inherits what the search network has learned."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from neuroexapt.core.cells import CellInputs, SearchCell, edge_stride
from neuroexapt.core.genotypes import Genotype
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
    """The cell of a genotype: every node adds two operations; the output joins the states of ``concat``."""

    def __init__(
        self,
        edges: Sequence[tuple[int, int, str]],
        concat: Sequence[int],
        channels_s0: int,
        channels_s1: int,
        channels: int,
        reduction: bool,
        reduction_prev: bool,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.concat = tuple(concat)
        self.inputs = CellInputs(channels_s0, channels_s1, channels, reduction_prev, affine=True)
        self.endpoints = tuple((source, target) for source, target, _ in edges)
        self.op_names = tuple(op for _, _, op in edges)
        self.edges = nn.ModuleList(
            make_op(op, channels, edge_stride(source, reduction), affine=True) for source, _, op in edges
        )
        self.channels_out = len(self.concat) * channels

    def forward(self, s0: Tensor, s1: Tensor, drop_path_probability: float | Tensor | None) -> Tensor:
        states = self.inputs(s0, s1)
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
    """The evaluation network of DARTS for one genotype.

    ``forward`` maps [B, in_channels, H, W] to logits [B, num_classes]. While training,
    ``drop_path_probability`` (None: off) drops operations, and ``forward_with_auxiliary`` also returns the
    auxiliary head's logits.
    """

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
        super().__init__()
        self.genotype = genotype
        self.drop_path_probability: float | Tensor | None = None
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
                channels_s0,
                channels_s1,
                channels,
                reduction,
                reduction_prev,
            )
            self.cells.append(cell)
            channels_s0, channels_s1 = channels_s1, cell.channels_out
            reduction_prev = reduction
            if layer == self.auxiliary_layer:
                channels_auxiliary = channels_s1

        self.auxiliary_head = AuxiliaryHead(channels_auxiliary, num_classes) if auxiliary else None
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels_s1, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the classifier and, if the network has an auxiliary head, of that."""
        logits, features = self._run(x)
        return logits, self.auxiliary_head(features) if self.auxiliary_head is not None else None

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        drop = self.drop_path_probability if self.training else None
        s0 = s1 = self.stem(x)
        features = s1
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, drop)
            if layer == self.auxiliary_layer:
                features = s1
        return self.classifier(self.global_pooling(s1).flatten(1)), features


def check_auxiliary_size(image_size: Sequence[int]) -> None:
    """The auxiliary head sits after both reductions and pools 5x5 windows there."""
    smallest = min(-(-size // 4) for size in image_size)
    if smallest < AUXILIARY_MIN_SIZE:
        raise UserError(
            f"the auxiliary head needs pictures of at least {4 * AUXILIARY_MIN_SIZE - 3} pixels, these have "
            f"{min(image_size)}; switch it off with --no-auxiliary or enlarge with --image-size"
        )


@torch.no_grad()
def inherit_weights(network: DerivedNetwork, supernet: Supernet) -> None:
    """Copy what the search network has learned into the derived network of the same width and depth.

    Stem, cell inputs, the kept operations and the classifier are taken over, running statistics included.
    The search network's BatchNorms have no scale and shift: the derived ones start at 1 and 0.
    """
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (network.stem, supernet.stem),
        (network.classifier, supernet.classifier),
    ]
    edge_index = {endpoints: i for i, endpoints in enumerate(supernet.topology.edges)}
    for cell, search_cell in zip(network.cells, supernet.cells, strict=True):
        assert isinstance(cell, DerivedCell)
        assert isinstance(search_cell, SearchCell)
        pairs.append((cell.inputs, search_cell.inputs))
        for endpoints, name, op in zip(cell.endpoints, cell.op_names, cell.edges, strict=True):
            mixed = search_cell.edges[edge_index[endpoints]]
            assert isinstance(mixed, MixedOp)
            if any(True for _ in op.parameters()):
                pairs.append((op, mixed.candidate(name)))
    for target, source in pairs:
        # Not strict: scale and shift exist in the target only.
        target.load_state_dict(source.state_dict(), strict=False)


def count_parameters(network: DerivedNetwork) -> int:
    """Parameters at inference: without the auxiliary head, as papers count them."""
    named = network.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith("auxiliary_head."))
