"""Memory for time: what a module keeps for its backward pass is computed again there."""

import contextvars
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuroexapt.core.buffers import buffers_copied


def recomputed(module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, of whose intermediate tensors nothing is kept but ``inputs``.

    Its backward pass runs it once more, with the choices of backend that hold now. ``module`` owns its
    BatchNorms, whose running statistics see only the first run. Nothing in it may be random.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    # The backward pass may run in a thread of its own, where context variables have their defaults.
    run = partial(contextvars.copy_context().run, function)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), buffers_copied(module)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
