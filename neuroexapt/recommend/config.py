"""The sections that the configuration of manager and controller has, checked before anything is built."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from neuroexapt.errors import UserError

OPERATORS = (
    "fused_attention_layernorm",
    "hierarchical_sequence_fusion",
    "hstu_hierarchical_attention",
    "sequence_recommendation_interaction",
    "interaction_operator",
)
SWITCHES = {f"enable_{operator}": operator for operator in OPERATORS}
SECTIONS = ("triton_operators", "optimizations", "hstu", "model", "device", "serving")


def section(config: Mapping[str, Any], name: str, known: Iterable[str]) -> dict[str, Any]:
    """The mapping ``config[name]``, empty where there is none.

    Raises:
        UserError: it is no mapping, or has a key that is not in ``known``; the message names the closest.
    """
    content = config.get(name, {})
    refuse_unknown(content, known, f"config[{name!r}]")
    return dict(content)


def refuse_unknown(content: Mapping[str, Any], known: Iterable[str], place: str) -> None:
    """Raise a UserError for a key that is not in ``known``, naming the closest of them, or for no mapping."""
    if not isinstance(content, Mapping):
        raise UserError(f"{place} must be a mapping, not {content!r}")
    known = tuple(known)
    for key in content:
        if key not in known:
            closest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {closest[0]!r}?" if closest else f"it takes {', '.join(known)}"
            raise UserError(f"{place} has no key {key!r}; {hint}")


def switches(config: Mapping[str, Any]) -> dict[str, bool]:
    """Which operators are on, by operator: ``config['triton_operators']``, also inside ``optimizations``.

    All are on by default.
    """
    nested = section(config, "optimizations", ("triton_operators",))
    if "triton_operators" in config and nested:
        raise UserError("triton_operators is given twice; leave it out of optimizations")
    given = section(nested or config, "triton_operators", SWITCHES)
    for name, value in given.items():
        if not isinstance(value, bool):
            raise UserError(f"{name} must be True or False, not {value!r}")
    return {operator: given.get(name, True) for name, operator in SWITCHES.items()}
