"""Writes the tables of TRITON_CUDA_OPTIMIZATION_SUITE.md from benchmarks/results.

``python benchmarks/make_tables.py`` rewrites what stands between ``<!-- table: BENCHMARK METRIC [CASES] -->``
and ``<!-- end -->``, where CASES is a regular expression that the cases' names begin with; a test holds the
document to its files. Of figures measured twice the last one counts, of baselines the last one at the commit
of ours where there is one. Ratios of figures from two commits are marked.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "TRITON_CUDA_OPTIMIZATION_SUITE.md"
RESULTS = Path(__file__).parent / "results"
# From the unit of the files to the one shown; others are shown as they are.
SHOWN_UNITS = {"ms": ("µs", 1e3), "bytes": ("MiB", 2**-20)}
# Tables in which anything takes so long show milliseconds.
LONG_MS = 100.0
OURS = ("ext-graph", "ext-graph-recompute", "ext", "triton-graph", "fused", "graph", "triton", "plan")
APART = "†"
BASELINES = ("eager", "eager-graph", "stack", "compile", "compile-graph", "floor")


def render(document: str, results: Path = RESULTS) -> str:
    """``document`` with its tables made anew."""
    pattern = re.compile(r"(<!-- table: (\S+) (\S+) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(
        lambda match: match[1] + _tables(results, match[2], match[3], match[4]) + match[5], document
    )


def _tables(results: Path, benchmark: str, metric: str, cases: str) -> str:
    """One table for each device, or a line that says that there is none."""
    path = results / f"{benchmark}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    figures = [
        figure
        for figure in map(json.loads, lines)
        if figure["metric"] == metric and re.match(cases, figure["case"])
    ]
    if not figures:
        return "Not measured yet.\n"
    devices = dict.fromkeys(figure["device"] for figure in figures)
    return "\n".join(_table([f for f in figures if f["device"] == device]) for device in devices)


def _table(figures: list[dict]) -> str:
    last = figures[-1]
    unit, factor = SHOWN_UNITS.get(last["unit"], (last["unit"], 1.0))
    if last["unit"] == "ms" and max(figure["median"] for figure in figures) >= LONG_MS:
        unit, factor = "ms", 1.0
    implementations = list(dict.fromkeys(figure["implementation"] for figure in figures))
    implementations.sort(key=lambda name: (name == "floor", name in OURS))
    ratios = _ratios(implementations)
    rows: dict[tuple[str, str], list[dict]] = {}
    for figure in figures:
        rows.setdefault((figure["case"], figure["dtype"]), []).append(figure)
    chosen = {row: _choose(of_row) for row, of_row in rows.items()}
    header = ["case", "dtype", *implementations, *(f"{a} / {b}" for a, b in ratios)]
    body = [
        [
            case,
            dtype,
            *(_number(row[name]["median"] * factor) if name in row else "" for name in implementations),
            *(_ratio(row, *r) for r in ratios),
        ]
        for (case, dtype), row in chosen.items()
    ]
    spread = max((f["p80"] - f["p20"]) / f["median"] for f in figures if f["median"])
    versions = f"torch {last['torch']}, triton {last['triton']}, CUDA {last['cuda']}"
    commits = ", ".join(dict.fromkeys(f["commit"][:7] for row in chosen.values() for f in row.values()))
    apart = f" {APART}: of two commits, so not of one run." if APART in str(body) else ""
    return "\n".join(
        [
            f"{last['device']}, {versions}, commit{'s' * (',' in commits)} {commits}, {last['date']}. "
            f"Medians{f' in {unit}' if unit else ''}; p20 to p80 span at most {spread:.0%} of them.{apart}",
            "",
            _line(header),
            _line(["---"] * 2 + ["---:"] * (len(header) - 2)),
            *map(_line, body),
            "",
        ]
    )


def _choose(figures: list[dict]) -> dict[str, dict]:
    """The figure of each implementation."""
    last = {figure["implementation"]: figure for figure in figures}
    best = next((last[name] for name in OURS if name in last), figures[-1])
    beside = [f for f in figures if f["implementation"] in BASELINES and f["commit"] == best["commit"]]
    return last | {figure["implementation"]: figure for figure in beside}


def _ratios(implementations: list[str]) -> list[tuple[str, str]]:
    """Everything that our best implementation is held to, over that implementation."""
    best = next((name for name in OURS if name in implementations), None)
    baselines = [name for name in BASELINES if name in implementations]
    return [(name, best) for name in baselines if best]


def _ratio(row: dict[str, dict], numerator: str, denominator: str) -> str:
    if numerator not in row or denominator not in row:
        return ""
    above, below = row[numerator], row[denominator]
    mark = APART if above["commit"] != below["commit"] else ""
    return f"{above['median'] / below['median']:.2f}{mark}"


def _number(value: float) -> str:
    if 0 < value < 0.05:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 1 else f"{value:.1f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text()))
