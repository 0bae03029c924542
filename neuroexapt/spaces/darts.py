"""The CIFAR-10 search space of DARTS (Liu et al., ICLR 2019)."""

from neuroexapt.core.operations import PRIMITIVES
from neuroexapt.spaces.cell_space import CellSpace

DARTS = CellSpace("darts", PRIMITIVES)
