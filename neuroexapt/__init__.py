"""Differentiable neural architecture search: labelled data in, a trained architecture out.

>>> import neuroexapt
>>> found = neuroexapt.search(dataset="digits", epochs=20)
>>> print(found.genotype, found.result["test_accuracy"])
"""

import importlib
from typing import Any

from neuroexapt.version import __version__

# Public names are imported on first use: `import neuroexapt` stays light and compiles nothing.
_PUBLIC = {
    "CellSpace": "neuroexapt.spaces.cell_space",
    "EvaluateConfig": "neuroexapt.engine.config",
    "Genotype": "neuroexapt.core.genotypes",
    "MixedOp": "neuroexapt.core.operations",
    "OPS": "neuroexapt.core.operations",
    "SPACES": "neuroexapt.spaces",
    "STRATEGIES": "neuroexapt.strategies",
    "SearchConfig": "neuroexapt.engine.config",
    "Space": "neuroexapt.spaces.space",
    "UserError": "neuroexapt.errors",
    "derive": "neuroexapt.engine.search",
    "evaluate": "neuroexapt.engine.evaluate",
    "export": "neuroexapt.exporting.export",
    "load_genotype": "neuroexapt.core.genotypes",
    "load_table": "neuroexapt.benchmarks",
    "search": "neuroexapt.engine.search",
    "write_report": "neuroexapt.report.html",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'neuroexapt' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
