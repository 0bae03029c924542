"""What brings a cell's inputs to its width, with BatchNorms in Triton and products by PyTorch.

As ``neuroexapt.cuda_ops.preprocess``, by the functions of the fused cell in Triton.
"""

import torch
from torch import Tensor, nn

from neuroexapt.backend import Support, register_impl
from neuroexapt.core.operations import FactorizedReduce
from neuroexapt.cuda_ops import preprocess
from neuroexapt.kernels import cell_kernels_triton


def relu_conv_bn(x: Tensor, op: nn.Sequential) -> Tensor:
    """What ``functional.relu_conv_bn`` computes for a 1x1 convolution."""
    with torch.cuda.device_of(x):
        return preprocess.run_relu_conv_bn(x, op, cell_kernels_triton)


def supports_relu_conv_bn(x: Tensor, op: nn.Sequential) -> Support:
    """Whether the kernels take these arguments."""
    reason = next(preprocess.relu_conv_bn_refusals(x, op), "")
    return Support(not reason, reason)


def factorized_reduce(x: Tensor, op: FactorizedReduce) -> Tensor:
    """What ``functional.factorized_reduce`` computes."""
    with torch.cuda.device_of(x):
        return preprocess.run_factorized_reduce(x, op, cell_kernels_triton)


register_impl("relu_conv_bn", "triton", relu_conv_bn, supports_relu_conv_bn)
register_impl("factorized_reduce", "triton", factorized_reduce, preprocess.supports_factorized_reduce)
