"""How the search step is executed: eagerly, through torch.compile, or whichever was measured faster here."""

import copy
import logging
from collections.abc import Callable

import torch

from neuroexapt.backend.config import load_config, save_config
from neuroexapt.backend.measure import time_calls
from neuroexapt.core.operations import MixedOp
from neuroexapt.core.supernet import Supernet
from neuroexapt.errors import UserError

MEASURED_SECONDS = 5.0

logger = logging.getLogger(__name__)


def compile_edges(supernet: Supernet) -> None:
    """Run every MixedOp through torch.compile, in place; names and states stay as they are.

    The whole network at once takes too long to compile to be of use in a search.
    """
    # The compiler warns, edge by edge, of shapes that it cannot bound; nothing follows from it.
    logging.getLogger("torch.utils._sympy.interp").setLevel(logging.ERROR)
    # One graph for every kind of edge, in training and in evaluation; the default limit is eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    for module in supernet.modules():
        if isinstance(module, MixedOp):
            module.compile()


def choose_execution(
    wanted: str,
    supernet: Supernet,
    take_step: Callable[[Supernet], None],
    key: str,
    say: Callable[[str], None],
) -> str:
    """``eager`` or ``compile`` for ``wanted``; ``fastest`` measures both once and remembers it under ``key``.

    ``take_step(network)`` takes one step of the search with a copy of ``supernet``, which stays as it is.
    """
    if wanted != "fastest":
        return wanted
    remembered = load_config().get("execution", {})
    if key not in remembered:
        say("measuring the eager and the compiled step once; the result is remembered")
        remembered[key] = _measure(supernet, take_step)
        try:
            save_config({"execution": remembered})
        except UserError as error:
            say(f"the result is not remembered: {error}")
    entry = remembered[key]
    say(f"execution: {entry['choice']} ({entry['reason']})")
    return entry["choice"]


def _measure(supernet: Supernet, take_step: Callable[[Supernet], None]) -> dict[str, str]:
    eager = _median_ms(copy.deepcopy(supernet), take_step)
    compiled_network = copy.deepcopy(supernet)
    compile_edges(compiled_network)
    try:
        compiled = _median_ms(compiled_network, take_step)
    except Exception as error:  # whatever the compiler or its toolchain raises
        reason = " ".join(str(error).split())[:200]
        logger.warning("torch.compile failed, the search runs eagerly: %s", reason)
        return {"choice": "eager", "reason": f"torch.compile failed: {reason}"}
    choice = "compile" if compiled < eager else "eager"
    return {"choice": choice, "reason": f"measured {eager:.0f} ms eager, {compiled:.0f} ms compiled a step"}


def _median_ms(network: Supernet, take_step: Callable[[Supernet], None]) -> float:
    device = next(network.parameters()).device
    return time_calls(lambda: take_step(network), device, MEASURED_SECONDS).median_ms
