"""The dot interaction's definition and, through Triton's interpreter, its kernels at tiny sizes."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from neuroexapt import functional
from neuroexapt.errors import UserError
from neuroexapt.kernels import interaction_operator as definition
from tests.kernels.held_to_reference import largest_error, random_tensors, runs_kernels

# Batch, fields and width: several samples a program, several tiles of the width, no field at all.
SHAPES = [(3, 4, 8), (5, 7, 33), (3, 16, 20), (2, 33, 130), (5, 1, 1), (1, 0, 5)]


def by_hand(dense: Tensor, fields: Tensor) -> Tensor:
    rows = []
    for x, e in zip(dense, fields, strict=True):
        vectors = [x, *e]
        pairs = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        rows.append(torch.cat([x, torch.stack(pairs)]))
    return torch.stack(rows)


def test_pairs_come_row_by_row_after_the_dense_vector():
    dense, fields = random_tensors((3, 5), (3, 4, 5), dtype=torch.float64)
    torch.testing.assert_close(functional.interaction_operator(dense, fields), by_hand(dense, fields))


def test_gradients():
    dense, fields = random_tensors((2, 3), (2, 4, 3), dtype=torch.float64)
    assert gradcheck(functional.interaction_operator, (dense.requires_grad_(), fields.requires_grad_()))


def test_one_tensor_of_all_vectors_gives_the_same():
    dense, fields = random_tensors((2, 3), (2, 4, 3))
    together = torch.cat([dense[:, None], fields], dim=1)
    assert torch.equal(
        functional.interaction_operator(together), functional.interaction_operator(dense, fields)
    )


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 4, 5)), ((2, 3), (3, 4, 3)), ((2, 1, 3), (2, 4, 3)), ((2, 3),), ((2, 0, 3),)]
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(UserError, match=r"\[B, F"):
        functional.interaction_operator(*(torch.zeros(shape) for shape in shapes))


@runs_kernels
@pytest.mark.parametrize(("batch", "fields", "width"), SHAPES)
def test_kernels_match_the_definition(batch, fields, width, nan_filled_empty):
    from neuroexapt.kernels import interaction_operator_triton as triton

    inputs = random_tensors((batch, width), (batch, fields, width))
    error = largest_error(definition.interaction_operator, triton.interaction_operator, inputs)
    assert error < 1e-5
    together = [torch.cat([inputs[0][:, None], inputs[1]], dim=1)]
    assert largest_error(definition.interaction_operator, triton.interaction_operator, together) < 1e-5


@runs_kernels
def test_kernels_pass_opcheck():
    from neuroexapt.kernels import interaction_operator_triton  # noqa: F401

    dense, fields = random_tensors((2, 5), (2, 3, 5))
    arguments = dense.requires_grad_(), fields.requires_grad_()
    torch.library.opcheck(torch.ops.neuroexapt.interaction_operator.default, arguments)


def test_calls_that_the_kernels_cannot_take_are_named():
    from neuroexapt.kernels.interaction_operator_triton import supports

    assert supports(torch.zeros(2, 8), torch.zeros(2, 127, 8)).ok
    assert "vectors" in supports(torch.zeros(2, 8), torch.zeros(2, 128, 8)).reason
    assert "float64" in supports(torch.zeros(2, 3, 8, dtype=torch.float64)).reason
    assert "several" in supports(torch.zeros(2, 8), torch.zeros(2, 3, 8, dtype=torch.float16)).reason
    assert "empty" in supports(torch.zeros(0, 8), torch.zeros(0, 3, 8)).reason
