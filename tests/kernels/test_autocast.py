"""Under autocast, definitions compute in the dtypes that their kernels would."""

import pytest
import torch
from torch import Tensor

from neuroexapt import functional
from neuroexapt.kernels.autocast import autocast_dtype
from tests.kernels.held_to_reference import random_tensors

CALLS = {
    "hstu_hierarchical_attention": 3 * [(2, 9, 2, 4)],
    "sequence_recommendation_interaction": [(2, 9, 8), (2, 8), ()],
    "interaction_operator": [(2, 8), (2, 5, 8)],
}


def results(op, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    result = op(*tensors)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", CALLS)
def test_operands_keep_their_dtype(name):
    op = getattr(functional, name)
    tensors = random_tensors(*CALLS[name])
    device = tensors[0].device.type
    expected = results(op, tensors)
    with torch.autocast(device, torch.bfloat16):
        for actual, wanted in zip(results(op, tensors), expected, strict=True):
            assert torch.equal(actual, wanted)
        assert torch.is_autocast_enabled(device)


@pytest.mark.parametrize("name", CALLS)
def test_devices_without_autocast_are_taken(name):
    tensors = [x.to("meta") for x in random_tensors(*CALLS[name])]
    assert results(getattr(functional, name), tensors)[0].is_meta


def test_is_asked_within_one_compiled_graph():
    @torch.compile(fullgraph=True, backend="eager")
    def cast(x: Tensor) -> Tensor:
        return x.to(autocast_dtype(x.device) or x.dtype)

    x = torch.ones(2)
    assert cast(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert cast(x).dtype == torch.bfloat16
