"""PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search (Xu et al.; ICLR 2020)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from neuroexapt.core.partial_channels import use_partial_channels
from neuroexapt.core.supernet import ALPHA_INIT_STD, Supernet
from neuroexapt.strategies.darts import Darts

SHARE = 4
"""K of the paper: candidates see 1/K of the channels."""
OF_EDGES = "_edges"
"""What the name of a cell type ends in where β is meant."""


class PcDarts(Darts):
    """Candidates on a quarter of the channels, and mixing weights ``softmax(α)_ek · β'_e``.

    Edge normalisation: β' is the softmax of β over the edges that enter a node. β [E] is learned with α.
    """

    paper = "Xu, Xie, Zhang, Chen, Qi, Tian, Xiong: PC-DARTS: Partial Channel Connections, ICLR 2020"
    defaults: ClassVar = {
        "epochs": 50,
        "warmup_epochs": 15,
        "batch_size": 256,
        "learning_rate": 0.1,
        "learning_rate_min": 0.0,
        "arch_learning_rate": 6e-4,
    }
    # As all others there: the code behind the published accuracy in that space is not known.
    defaults_of_space: ClassVar = {
        "nas-bench-201": {"batch_size": 64, "learning_rate": 0.025, "learning_rate_min": 0.001}
    }
    not_fused = "its edges pass most channels by, which the plan of a cell does not know"
    _entering: Tensor

    def shape(self, supernet: Supernet) -> None:
        supernet.require_cells("pc-darts")
        use_partial_channels(supernet, SHARE)
        targets = torch.tensor([target for _, target in supernet.topology.edges])
        device = next(supernet.parameters()).device
        self.register_buffer("_entering", (targets[:, None] == targets).to(device), persistent=False)
        names = {name.removesuffix(OF_EDGES) + OF_EDGES for name in supernet.alphas}
        for name in sorted(names - set(supernet.alphas)):
            supernet.alphas[name] = nn.Parameter(ALPHA_INIT_STD * torch.randn(len(targets)))

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            cell: alpha.softmax(dim=-1) * self._share_of_edges(alphas[cell + OF_EDGES])[:, None]
            for cell, alpha in alphas.items()
            if not cell.endswith(OF_EDGES)
        }

    def _share_of_edges(self, beta: Tensor) -> Tensor:
        """Softmax of β over the edges with the same target."""
        among = beta.expand(len(beta), -1).masked_fill(~self._entering, -torch.inf)  # [E, E], a row an edge
        return among.softmax(dim=-1).diagonal()
