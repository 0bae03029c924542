"""What is known of architectures without training them, and what searches that ask for it find."""

from neuroexapt.benchmarks.discrete import OBJECTIVE, random_search, regularized_evolution
from neuroexapt.benchmarks.table import Table, load_table

__all__ = ["OBJECTIVE", "Table", "load_table", "random_search", "regularized_evolution"]
