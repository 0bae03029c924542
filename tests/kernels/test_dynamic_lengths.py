"""Batches of any length run what ``torch.compile`` made of the kernels once, and not a graph each."""

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.held_to_reference import random_tensors, runs_kernels

HEADS = (2, 3)
# The features of an operator's sequences [B, N, …], and the shapes of its weights.
OPERATORS = {
    "fused_attention_layernorm": ([(6,), HEADS, HEADS, HEADS], [(6, 6), (6,), (6,), (6,)]),
    "hierarchical_sequence_fusion": ([(6,)], [(4, 6), (6, 12), (6,), (6, 6), (6,), (6,)]),
    "hstu_hierarchical_attention": ([HEADS, HEADS, HEADS], []),
    "sequence_recommendation_interaction": ([(6,)], [(2, 6), ()]),
}


@runs_kernels
@pytest.mark.parametrize("name", OPERATORS)
def test_lengths_share_graphs(name):
    op = getattr(importlib.import_module(f"neuroexapt.kernels.{name}_triton"), name)
    features, shapes = OPERATORS[name]
    weights = random_tensors(*shapes)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
    for length in (9, 11, 13):
        sequences = random_tensors(*((2, length, *shape) for shape in features))
        result = compiled(*(x.requires_grad_() for x in sequences), *weights)
        torch.testing.assert_close(result, op(*sequences, *weights))
        (result if isinstance(result, torch.Tensor) else result[0]).sum().backward()
    assert counter.frame_count < 3
