"""Edges whose candidate operations see a share of the channels (PC-DARTS, Xu et al., ICLR 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.core.operations import MixedOp
from neuroexapt.core.supernet import Supernet
from neuroexapt.errors import UserError


class PartialMixedOp(nn.Module):
    """``y = shuffle([MixedOp(x₁, weights), (Σ_k weights[k]) · x₂])``, x₁ the first 1/``share`` of channels.

    ``x``: [B, C, H, W], ``weights``: [K]. The rest x₂ passes by, at stride 2 through a 2x2 max pool, and has
    the weight of the whole edge. The shuffle deals the channels out to ``share`` places in turn, so that
    the next edge's first ones come from both.
    """

    def __init__(self, edge: MixedOp, share: int) -> None:
        super().__init__()
        if edge.channels % share:
            raise UserError(
                f"candidates see 1/{share} of the channels, and {edge.channels} cannot be divided so; choose "
                f"--init-channels of a multiple of {share}"
            )
        self.share, self.stride = share, edge.stride
        self.mixed = MixedOp(edge.channels // share, edge.stride, edge.primitives, edge.norm_pools)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        active = x.shape[1] // self.share
        rest = x[:, active:]
        if self.stride == 2:
            rest = F.max_pool2d(rest, 2, ceil_mode=True)
        mixed, passed = self.mixed(x[:, :active], weights), weights.sum() * rest
        # [B, C / share, share, H, W]: put together and shuffled at once
        dealt = [mixed.unsqueeze(2), passed.unflatten(1, (self.share - 1, active)).transpose(1, 2)]
        return torch.cat(dealt, dim=2).flatten(1, 2)


def use_partial_channels(supernet: Supernet, share: int) -> None:
    """Let the candidates of all edges see 1/``share`` of the channels; new ones, with new weights."""
    for cell in supernet.search_cells():
        for i, edge in enumerate(cell.edges):
            if isinstance(edge, MixedOp):
                cell.edges[i] = PartialMixedOp(edge, share)
