"""Search strategies by name. To add one, write its file and add one line here."""

from typing import Any

from neuroexapt.engine.bilevel import Strategy
from neuroexapt.errors import UserError
from neuroexapt.strategies.beta_darts import BetaDarts
from neuroexapt.strategies.darts import Darts, SecondOrderDarts
from neuroexapt.strategies.drnas import DrNas, ProgressiveDrNas
from neuroexapt.strategies.fair_darts import FairDarts
from neuroexapt.strategies.gdas import Gdas
from neuroexapt.strategies.lambda_darts import LambdaDarts
from neuroexapt.strategies.p_darts import PDarts
from neuroexapt.strategies.pc_darts import PcDarts
from neuroexapt.strategies.random_paths import RandomPaths
from neuroexapt.strategies.sdarts import AdversariallySmoothed, RandomlySmoothed
from neuroexapt.strategies.snas import Snas

STRATEGIES: dict[str, type[Strategy]] = {
    "darts": Darts,
    "darts-2nd": SecondOrderDarts,
    "gdas": Gdas,
    "drnas": DrNas,
    "drnas-progressive": ProgressiveDrNas,
    "beta-darts": BetaDarts,
    "pc-darts": PcDarts,
    "fair-darts": FairDarts,
    "snas": Snas,
    "sdarts-rs": RandomlySmoothed,
    "sdarts-adv": AdversariallySmoothed,
    "lambda-darts": LambdaDarts,
    "random": RandomPaths,
    "p-darts": PDarts,
}


def get_strategy(name: str) -> Strategy:
    return _find(name)()


def against_collapse() -> list[str]:
    """Names of the strategies that were made to keep skip connections from winning."""
    return [name for name, strategy in STRATEGIES.items() if strategy.against_collapse]


def published_settings(name: str, space: str) -> dict[str, Any]:
    """Published settings of a search by strategy ``name`` in ``space`` that are not the usual ones."""
    strategy = _find(name)
    return {**strategy.defaults, **strategy.defaults_of_space.get(space, {})}


def _find(name: str) -> type[Strategy]:
    if name not in STRATEGIES:
        raise UserError(f"unknown strategy {name!r}; known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
