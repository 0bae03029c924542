"""How the search network is executed: fused, module by module, or through torch.compile."""

import logging
from collections.abc import Callable

import torch

from neuroexapt.backend.config import load_config, save_config
from neuroexapt.core.operations import MixedOp
from neuroexapt.core.supernet import Supernet
from neuroexapt.errors import UserError

EXECUTIONS = ("fused", "reference", "compile")
"""``fused``: cell by cell as its plan groups it. ``reference``: module by module, every kernel launched by
itself. ``compile``: every edge through torch.compile. On a GPU the first and the last run as one CUDA graph.
"""


def set_execution(supernet: Supernet, execution: str) -> None:
    """Let ``supernet`` run as ``execution``, one of ``EXECUTIONS``."""
    supernet.set_execution("fused" if execution == "fused" else "reference")
    if execution == "compile":
        compile_edges(supernet)


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


def choose_execution(measure_ms: Callable[[str], float], key: str, say: Callable[[str], None]) -> str:
    """The fastest of ``EXECUTIONS``, measured once by ``measure_ms`` and remembered under ``key``."""
    remembered = load_config().get("fastest_execution", {})
    if key not in remembered:
        say("measuring a step of the search in every way once; the result is remembered")
        remembered[key] = _measure(measure_ms)
        try:
            save_config({"fastest_execution": remembered})
        except UserError as error:
            say(f"the result is not remembered: {error}")
    entry = remembered[key]
    say(f"execution: {entry['choice']} ({entry['reason']})")
    return entry["choice"]


def _measure(measure_ms: Callable[[str], float]) -> dict[str, str]:
    times, remarks = {}, []
    for execution in EXECUTIONS:
        try:
            times[execution] = measure_ms(execution)
            remarks.append(f"{execution} {times[execution]:.0f} ms a step")
        except Exception as error:  # whatever a compiler or its toolchain raises
            if execution == "reference":
                raise
            remarks.append(f"{execution} failed: {' '.join(str(error).split())[:200]}")
    return {"choice": min(times, key=times.__getitem__), "reason": ", ".join(remarks)}
