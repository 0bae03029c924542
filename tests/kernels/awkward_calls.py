"""Calls every kernel forward and backward at shapes that fill no tile: a program for a memory checker.

``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m tests.kernels.awkward_calls``
"""

import itertools

import torch

from neuroexapt.core.cells import CellTopology, SearchCell, TwoInputs
from neuroexapt.core.operations import PRIMITIVES, FactorizedReduce, ReLUConvBN
from neuroexapt.core.plan import plan_cell
from neuroexapt.cuda_ops import cell as cell_ext
from neuroexapt.cuda_ops import preprocess
from neuroexapt.cuda_ops import sepconv as sepconv_ext
from neuroexapt.cuda_ops import softmax_sum as softmax_sum_ext
from neuroexapt.kernels import (
    cell_triton,
    fused_attention_layernorm_triton,
    hierarchical_sequence_fusion_triton,
    hstu_hierarchical_attention_triton,
    interaction_operator_triton,
    pool_triton,
    sepconv_triton,
    sequence_recommendation_interaction_triton,
    softmax_sum_triton,
)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", requires_grad=True)


def backward(y: torch.Tensor) -> None:
    y.backward(torch.randn_like(y))


def call_cells_in_triton() -> None:
    """Of channels and pixels that fill no tile, stored in fp32 and in bf16."""
    for reduction, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        inputs = TwoInputs(20, 20, 20, False, affine=False)
        cell = SearchCell(CellTopology(2), PRIMITIVES, inputs, 20, reduction=reduction).cuda()
        states = [tensor(3, 20, 13, 11).to(dtype) for _ in range(2)]
        backward(cell_triton.cell(plan_cell(cell), states, tensor(5, len(PRIMITIVES))))


def call_separable_convolutions() -> None:
    for k, stride, dilation in ((3, 1, 1), (5, 2, 1), (7, 1, 2)):
        arguments = tensor(3, 20, 13, 11), tensor(20, 1, k, k), tensor(36, 20, 1, 1)
        y, _mean, _var = sepconv_triton.sepconv_with_stats(*arguments, stride=stride, dilation=dilation)
        backward(y)
    for k, stride, dilation in itertools.product((3, 5), (1, 2), (1, 2)):
        arguments = tensor(3, 32, 7, 16), tensor(32, 1, k, k), tensor(48, 32, 1, 1)
        backward(sepconv_ext.sepconv(*arguments, stride=stride, dilation=dilation))


def call_pools() -> None:
    for k, stride, layout in ((3, 1, torch.contiguous_format), (5, 2, torch.channels_last)):
        x = tensor(5, 20, 13, 11).to(memory_format=layout)
        backward(pool_triton.avg_pool(x, k, stride))
        backward(pool_triton.max_pool(x, k, stride))
        backward(pool_triton.global_avg_pool(x))


def call_sums() -> None:
    for tier, operands in itertools.product((softmax_sum_triton, softmax_sum_ext), (1, 5)):
        for op in (tier.softmax_sum, tier.weighted_sum):
            backward(op([tensor(1001) for _ in range(operands)], tensor(operands)))


def call_interactions() -> None:
    """Of fields and of sequences, padded and jagged, of one and several chunks of 64 items."""
    for fields, width in ((0, 3), (5, 16), (33, 70)):
        backward(interaction_operator_triton.interaction_operator(tensor(5, width), tensor(5, fields, width)))
    interaction = sequence_recommendation_interaction_triton.sequence_recommendation_interaction
    for length, width in ((7, 5), (150, 70)):
        lengths = torch.tensor([length, 0, length // 2], device="cuda")
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows, times = tensor(int(offsets[-1]), width), torch.arange(int(offsets[-1]), device="cuda")
        padded = interaction(tensor(3, length, width), tensor(3, width), tensor(), lengths=lengths)
        place = {"timestamps": times, "offsets": offsets, "max_length": length}
        for results in (padded, interaction(rows, tensor(3, width), tensor(), **place)):
            torch.autograd.backward(results, [torch.randn_like(y) for y in results])


def call_cells() -> None:
    """Whole fused cells, whose kernels take wide and narrow rows, one plane a block and several."""
    sizes = ((16, 7, 9), (32, 36, 40), (64, 5, 4))
    for (channels, height, width), reduction in itertools.product(sizes, (False, True)):
        inputs = TwoInputs(channels, channels, channels, False, affine=False)
        cell = SearchCell(CellTopology(2), PRIMITIVES, inputs, channels, reduction=reduction).cuda()
        states = [tensor(3, channels, height, width) for _ in range(2)]
        backward(cell_ext.cell(plan_cell(cell), states, tensor(5, len(PRIMITIVES))))


def call_preprocessing() -> None:
    conv, reduction = ReLUConvBN(48, 32, 1, affine=False), FactorizedReduce(48, 32, affine=False)
    for height, width in ((7, 12), (1, 24), (18, 40)):
        backward(preprocess.relu_conv_bn(tensor(3, 48, height, width), conv.cuda().op))
        backward(preprocess.factorized_reduce(tensor(3, 48, height, width), reduction.cuda()))


def call_hstu_attention() -> None:
    """In fp32 and bf16, whose loops differ, padded and jagged; the longest sequence fills no block."""
    lengths = torch.tensor([77, 0, 30], device="cuda")
    offsets = torch.tensor([0, 77, 77, 107], device="cuda")
    layouts = (((3, 77), {"lengths": lengths}), ((107,), {"offsets": offsets, "max_length": 77}))
    for (rows, layout), dtype, width in itertools.product(layouts, (torch.float32, torch.bfloat16), (20, 72)):
        query, key, value = (tensor(*rows, 2, width).to(dtype) for _ in range(3))
        times = {"time_bias": tensor(30), "timestamps": torch.randint(10**6, rows, device="cuda")}
        for biases in ({}, {"position_bias": tensor(153)}, {"position_bias": tensor(153)} | times):
            attend = hstu_hierarchical_attention_triton.hstu_hierarchical_attention
            backward(attend(query, key, value, windows=(None, 9), **biases, **layout))


def call_operators_of_sequences() -> None:
    """Attention with what follows, and fused windows; rows that kernels multiply themselves, and wider."""
    lengths = torch.tensor([77, 0, 30], device="cuda")
    offsets = torch.tensor([0, 77, 77, 107], device="cuda")
    layouts = (((3, 77), {"lengths": lengths}), ((107,), {"offsets": offsets, "max_length": 77}))
    for (rows, layout), width in itertools.product(layouts, (20, 300)):
        vectors = [tensor(width) for _ in range(3)]
        heads = [tensor(*rows, 2, 24) for _ in range(3)]
        attend = fused_attention_layernorm_triton.fused_attention_layernorm
        backward(attend(tensor(*rows, width), *heads, tensor(width, 48), *vectors, dropout=0.1, **layout))
        matrices = tensor(4, width), tensor(width, 2 * width), vectors[0], tensor(width, width)
        fuse = hierarchical_sequence_fusion_triton.hierarchical_sequence_fusion
        backward(fuse(tensor(*rows, width), *matrices, *vectors[1:], **layout))


if __name__ == "__main__":
    call_cells()
    call_cells_in_triton()
    call_preprocessing()
    call_separable_convolutions()
    call_pools()
    call_sums()
    call_interactions()
    call_hstu_attention()
    call_operators_of_sequences()
    torch.cuda.synchronize()
