"""A search over an operation of your own: register it, list it, search.

python examples/custom_search_space.py
"""

import sys
from typing import Any

from torch import Tensor, nn

import neuroexapt
from neuroexapt import OPS, SPACES, CellSpace


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate that looks at the whole picture (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())
        self.reduce = nn.Conv2d(channels, channels, 1, stride, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduce(x * self.gate(x)))


OPS["squeeze_excite"] = SqueezeExcite
SPACES["gated"] = CellSpace(
    "gated", ("none", "skip_connect", "sep_conv_3x3", "max_pool_3x3", "squeeze_excite")
)


def main(**settings: Any) -> neuroexapt.Genotype:
    found = neuroexapt.search(space="gated", **{"dataset": "digits", "epochs": 15, **settings})
    print(found.genotype)
    return found.genotype


if __name__ == "__main__":
    try:
        main()
    except neuroexapt.UserError as error:
        sys.exit(f"error: {error}")
