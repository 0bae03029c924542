import json
import sys

import pytest

from neuroexapt.cuda_ops.build import SOURCES

sys.path.insert(0, str(SOURCES.parents[2] / "benchmarks"))
import make_tables

FIGURE = {
    "benchmark": "sums",
    "case": "small",
    "dtype": "float32",
    "metric": "device_ms",
    "unit": "ms",
    "p20": 0.9,
    "p80": 1.1,
    "device": "Some GPU",
    "torch": "2.11",
    "triton": "3.6",
    "cuda": "13.0",
    "commit": "abc",
    "date": "2026-01-01",
}


def test_the_document_holds_what_the_results_say():
    document = make_tables.DOCUMENT.read_text()
    assert make_tables.render(document) == document, "run python benchmarks/make_tables.py"


def test_a_table_shows_the_last_medians_and_what_they_amount_to(tmp_path):
    medians = [("ext", 9.0), ("eager", 4.0), ("floor", 0.9), ("ext", 1.0)]
    lines = [json.dumps(FIGURE | {"implementation": name, "median": median}) for name, median in medians]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    marked = "before\n<!-- table: sums device_ms -->\nold\n<!-- end -->\nafter\n"
    rendered = make_tables.render(marked, tmp_path)
    assert "| case | dtype | eager | ext | floor | eager / ext | floor / ext |" in rendered
    assert "| small | float32 | 4,000 | 1,000 | 900 | 4.00 | 0.90 |" in rendered
    assert "Some GPU" in rendered
    assert "old" not in rendered
    assert rendered.startswith("before\n")
    assert rendered.endswith("after\n")
    assert make_tables.render(rendered, tmp_path) == rendered


def test_ratios_of_two_commits_are_marked(tmp_path):
    figures = [("eager", 4.0, "old"), ("compile", 3.0, "new"), ("ext", 1.0, "new"), ("compile", 5.0, "other")]
    lines = [
        json.dumps(FIGURE | {"implementation": name, "median": median, "commit": commit})
        for name, median, commit in figures
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    rendered = make_tables.render("<!-- table: sums device_ms -->\n<!-- end -->", tmp_path)
    assert "| small | float32 | 4,000 | 3,000 | 1,000 | 4.00† | 3.00 |" in rendered
    assert "commits old, new" in rendered
    assert "†: of two commits, so not of one run." in rendered


def test_a_table_shows_the_cases_that_its_marker_names(tmp_path):
    lines = [
        json.dumps(FIGURE | {"case": case, "implementation": "ext", "median": 1.0})
        for case in ("small", "large")
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    rendered = make_tables.render("<!-- table: sums device_ms la|xla -->\n<!-- end -->", tmp_path)
    assert "| large |" in rendered
    assert "| small |" not in rendered


def test_the_plan_is_held_to_eager_pytorch_and_counts_have_no_unit(tmp_path):
    medians = [("eager", 30.0), ("plan", 10.0)]
    lines = [
        json.dumps(FIGURE | {"implementation": name, "median": median, "metric": "ops", "unit": ""})
        for name, median in medians
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    rendered = make_tables.render("<!-- table: sums ops -->\n<!-- end -->", tmp_path)
    assert "| case | dtype | eager | plan | eager / plan |" in rendered
    assert "Medians; p20" in rendered


@pytest.mark.parametrize("marker", ["sums step_ms", "others device_ms", "sums device_ms large"])
def test_a_table_without_results_says_so(tmp_path, marker):
    (tmp_path / "sums.jsonl").write_text(json.dumps(FIGURE | {"implementation": "ext", "median": 1.0}))
    rendered = make_tables.render(f"<!-- table: {marker} -->\n<!-- end -->", tmp_path)
    assert rendered == f"<!-- table: {marker} -->\nNot measured yet.\n<!-- end -->"


@pytest.mark.parametrize(
    ("unit", "medians", "shown"),
    [
        ("ms", (20.0, 400.0), "| small | float32 | 400 | 20.0 | 20.00 |"),
        ("ms", (2.0, 40.0), "| small | float32 | 40,000 | 2,000 | 20.00 |"),
        ("relative", (2e-4, 4e-4), "| small | float32 | 4.0e-04 | 2.0e-04 | 2.00 |"),
        ("share", (0.25, 0.0), "| small | float32 | 0.00 | 0.25 | 0.00 |"),
    ],
)
def test_units_and_digits_suit_what_is_shown(tmp_path, unit, medians, shown):
    lines = [
        json.dumps(FIGURE | {"implementation": name, "median": median, "unit": unit})
        for name, median in zip(("ext-graph", "eager"), medians, strict=True)
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    rendered = make_tables.render("<!-- table: sums device_ms -->\n<!-- end -->", tmp_path)
    assert "| case | dtype | eager | ext-graph | eager / ext-graph |" in rendered
    assert shown in rendered
