"""How the search network is executed, fused, module by module or through torch.compile, and whether derived
networks are trained through that.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neuroexapt.backend.config import load_config, save_config
from neuroexapt.core.operations import MixedOp
from neuroexapt.core.supernet import Supernet
from neuroexapt.errors import UserError

EXECUTIONS = ("fused", "reference", "compile")
"""``fused``: cell by cell as its plan groups it. ``reference``: module by module, every kernel launched by
itself. ``compile``: every edge through torch.compile. On a GPU the first and the last run as one CUDA graph.
"""

STEPS_THAT_PAY = 10_000
"""A training of so many steps is worth compiling the derived network first.

That takes a minute or two. Of a step of the published network in bf16 it saved 8 of 39 ms on an H200, where
15 of the 20 cells were compiled.
"""
COMPILATION: dict[str, Any] = {"dynamic": False, "options": {"fallback_random": True}}
"""Of a derived network's cells: for the shapes that they have, with PyTorch's random numbers. On a GPU the
compiler takes these in an order of its own, so other paths are dropped than without it.
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
    _allow_many_kinds()
    for module in supernet.modules():
        if isinstance(module, MixedOp):
            module.compile()


def compiled_copy(network: nn.Module, *, same_tensors: bool) -> nn.Module:
    """A copy of a network whose cells run through torch.compile, or as a whole where it has none.

    With ``same_tensors`` its parameters and buffers are those of ``network``, so that training the one trains
    the other, which can be tested, saved and copied as if nothing were compiled.
    """
    tensors = (*network.parameters(), *network.buffers()) if same_tensors else ()
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    _allow_many_kinds()
    for module in getattr(twin, "cells", [twin]):
        module.compile(**COMPILATION)
    return twin


def _allow_many_kinds() -> None:
    """Of edges or cells, in training and in evaluation, each with a graph of its own; the default limit is
    eight.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)


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
            remarks.append(f"{execution} failed: {in_one_line(error)}")
    return {"choice": min(times, key=times.__getitem__), "reason": ", ".join(remarks)}


def in_one_line(error: Exception) -> str:
    """The beginning of its first paragraph, or its kind where it says nothing."""
    return " ".join(str(error).partition("\n\n")[0].split())[:200] or type(error).__name__
