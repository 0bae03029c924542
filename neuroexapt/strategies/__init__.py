"""Search strategies by name. To add one, write its file and add one line here."""

from neuroexapt.engine.bilevel import Strategy
from neuroexapt.errors import UserError
from neuroexapt.strategies.darts import Darts, SecondOrderDarts

STRATEGIES: dict[str, type[Strategy]] = {"darts": Darts, "darts-2nd": SecondOrderDarts}


def get_strategy(name: str) -> Strategy:
    if name not in STRATEGIES:
        raise UserError(f"unknown strategy {name!r}; known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]()
