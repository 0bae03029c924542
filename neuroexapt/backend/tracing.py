"""The look-up of candidates as ``torch.compile`` sees it: a constant, found while it traces.

Apart from the dispatch because the decorator imports PyTorch's compiler, which takes seconds.
"""

import torch

from neuroexapt.backend import candidates as eager


@torch.compiler.assume_constant_result
def candidates(op: str, dtype: torch.dtype, operands: int) -> tuple[tuple, tuple]:
    """``neuroexapt.backend.candidates.candidates``."""
    return eager.candidates(op, dtype, operands)
