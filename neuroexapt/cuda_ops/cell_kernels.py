"""The functions that compute a fused cell in CUDA C++, on tensors, and how much they take.

``neuroexapt.cuda_ops.cell.run`` calls them; another module with the same functions is another tier.
"""

from neuroexapt.cuda_ops.branch import Branch
from neuroexapt.cuda_ops.conv_kernels import backward_first, backward_second, can_leave_out, convolve
from neuroexapt.cuda_ops.dense_kernels import (
    backward_dense,
    backward_multiply,
    backward_reduce,
    convolve_dense,
    multiply,
    reduce,
)
from neuroexapt.cuda_ops.node_kernels import (
    add_up,
    affine_gradients,
    backward_add_up,
    plane_moments,
    pool,
    reduce_partials,
    state_gradients,
    statistics,
)

__all__ = [
    "KEEPS_POOLS",
    "LEAVES_OUT",
    "Branch",
    "add_up",
    "affine_gradients",
    "backward_add_up",
    "backward_dense",
    "backward_first",
    "backward_multiply",
    "backward_reduce",
    "backward_second",
    "can_leave_out",
    "convolve",
    "convolve_dense",
    "multiply",
    "plane_moments",
    "pool",
    "reduce",
    "reduce_partials",
    "state_gradients",
    "statistics",
]

MAX_CONVS, MAX_EDGES, MAX_ADDENDS, MAX_WIDTH = 32, 16, 64, 1024
"""Of one state: convolutions and edges that leave it, parts of its gradient, columns of its pictures."""
MAX_TERMS, MAX_POOLED_EDGES = 96, 16
"""Of one node: terms, and edges with pools."""
LEAVES_OUT = True
"""What was not drawn."""
KEEPS_POOLS = False
"""For the backward pass, which forms them once more from their state."""
