"""The page: complete, honest about unfinished runs, self-contained, safe, the same bytes every time."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from neuroexapt.core.genotypes import genotype_from_text
from neuroexapt.errors import UserError
from neuroexapt.report.html import write_report
from tests.report.made_up_run import CONFIG, GENOTYPE, PRIMITIVES, RESULT, space

SECTIONS = {"genotype", "alpha", "comparison", "curves", "timing", "settings"}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What the tests ask of a page; it fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.attributes if name in attributes]

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.attributes if tag == name]


def page_of(run) -> Page:
    return Page(write_report(run.path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(finished_run) -> Page:
    return page_of(finished_run)


def test_finished_run_has_every_section(page):
    assert {section["id"] for section in page.tags("section")} == SECTIONS
    assert "has not finished" not in page.text
    for number in ("98.76 %", "90.00 %", "75.00 %", "123 k", "1 min 15 s", "12.5", "3 GiB"):
        assert number in page.text
    for setting in ("learning_rate", "0.025", "Some GPU", "2.11.0"):
        assert setting in page.text


def test_finished_run_has_every_figure(page):
    # Per cell: its graph, heat map, entropy and 5 edges over time; 3 phases of 2 curves; the comparison.
    assert len(page.tags("svg")) == 2 * (1 + 1 + 1 + 5) + 3 * 2 + 1
    labels = [svg["aria-label"] for svg in page.tags("svg")]
    assert all(labels)
    assert "sep_conv_3x3 from c_{k-1} to 0" in labels[0]
    assert [svg["role"] for svg in page.tags("svg")] == ["img"] * len(labels)


def test_summary_says_how_good_how_sure_and_what_next(page, finished_run):
    assert "98.76 % of 400 test examples are right" in page.text
    assert "answer “seven” every time would be right for 12.50 %" in page.text
    assert "strongest operation 1.80 times the weight of its mean one." in page.text
    command = f"evaluate --genotype {finished_run.path} --dataset digits --recipe fast --seeds 3"
    assert f"<code>neuroexapt {command}" in page.html.replace("'", "")
    assert "400 test examples, +7.00 points is more than chance explains" in page.text


def test_unfinished_run_says_how_to_go_on(new_run):
    assert f"neuroexapt search --resume {new_run.path}" in page_of(new_run).text


def test_comparison_is_at_equal_epochs(new_run):
    new_run.search(1)
    new_run.train("inherit", [0.9, 0.95, 0.99])
    new_run.train("scratch", [0.5, 0.85])
    text = page_of(new_run).text
    assert "After 2 epochs each: 95.00 % with inherited weights, 85.00 % from scratch" in text
    assert "a difference of +10.00 points" in text


def test_a_choice_by_validation_is_told_where_weights_are_shown(new_run):
    new_run.write("config.json", {**CONFIG, "selection": "shrink"})
    new_run.search(1)
    assert "The genotype is chosen by validation ( --selection shrink )" in page_of(new_run).text


def test_genotype_can_be_copied_and_read_back(page, finished_run):
    shown = re.findall(r"<pre>(.*?)</pre>", page.html, re.DOTALL)
    texts = [text.replace("&#34;", '"').replace("&#39;", "'") for text in shown]
    saved = genotype_from_text((finished_run.path / "genotype.json").read_text())
    assert [genotype_from_text(text) for text in texts] == [saved, saved]


def test_run_without_an_epoch(new_run):
    page = page_of(new_run)
    assert {section["id"] for section in page.tags("section")} == SECTIONS
    assert "This run has not finished" in page.text
    assert "Search: 0 of 3 epochs" in page.text
    assert page.tags("svg") == []


def test_run_that_stopped_in_the_search(new_run):
    new_run.search(2)
    with open(new_run.path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "search", "ep')
    page = page_of(new_run)
    assert "Search: 2 of 3 epochs" in page.text
    assert "after epoch 2; it may still change" in page.text
    assert "55.00 %" in page.text


def test_run_that_stopped_in_training(new_run):
    new_run.search(3)
    new_run.write("genotype.json", GENOTYPE)
    new_run.train("inherit", [0.93])
    page = page_of(new_run)
    assert "Derived network, inherited weights: 1 of 2 epochs" in page.text
    assert "may still change" not in page.text
    assert "93.00 %" in page.text
    assert "once both trainings" in page.text


def test_search_without_control_says_so(new_run):
    new_run.write("config.json", {**CONFIG, "control": False})
    assert "without a training from scratch" in page_of(new_run).text


def test_evaluation_has_no_search_sections(new_run):
    new_run.write("config.json", {"dataset": "digits", "genotype": "DARTS_V2", "epochs": 2})
    (new_run.path / "space.json").unlink()
    new_run.train("evaluate", [0.9, 0.97])
    page = page_of(new_run)
    assert "DARTS_V2 on digits" in page.text
    assert {section["id"] for section in page.tags("section")} == SECTIONS - {"alpha", "comparison"}
    assert "Given genotype, from scratch: 2 of 2 epochs" in page.text


def test_evaluation_stands_next_to_its_controls(new_run):
    new_run.write("config.json", {"dataset": "digits", "genotype": "DARTS_V2", "epochs": 2})
    for phase in ("evaluate", "resnet18", "evaluate-seed7", "resnet18-seed7"):
        new_run.train(phase, [0.9, 0.97])
    outcome = {
        "test_accuracy": 0.97,
        "test_accuracy_deviation": 0.0123,
        "epochs": 2,
        "training_seconds": 90.0,
    }
    control = {**outcome, "test_accuracy": 0.875, "test_accuracy_deviation": None, "parameters": 11_000_000}
    new_run.write("genotype.json", GENOTYPE)
    new_run.write(
        "result.json", {**RESULT, **outcome, "test_accuracy": 0.97, "controls": {"resnet18": control}}
    )
    page = page_of(new_run)
    assert "Given genotype, from scratch 97.00 % 1.23 % 123 k 2 1 min 30 s" in page.text
    assert "ResNet-18, from scratch 87.50 % – 11 M 2 1 min 30 s" in page.text
    own, resnet = "Given genotype, from scratch", "ResNet-18, from scratch"
    assert re.findall("<h3>(.*from scratch.*)</h3>", page.html) == [
        own, f"{own}, seed 7", resnet, f"{resnet}, seed 7"
    ]  # fmt: skip


def test_page_loads_nothing_from_elsewhere(page):
    for name in ("src", "srcset", "data", "action", "poster"):
        assert page.values(name) == []
    assert all(link.startswith("#") for link in page.values("href") + page.values("xlink:href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.html))
    assert not page.tags("script")
    assert not page.tags("link")
    assert "@import" not in page.html


def test_ids_are_unique_and_references_resolve(page):
    ids = page.values("id")
    assert [name for name, uses in Counter(ids).items() if uses > 1] == []
    references = re.findall(r"url\(#([^)]*)\)", page.html)
    references += [link[1:] for link in page.values("href") + page.values("xlink:href")]
    assert references
    assert set(references) <= set(ids)


def test_figures_follow_the_colours_of_the_page(page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.html, re.DOTALL))
    assert re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{3,6}|black|white)", drawings) == []
    for name in set(re.findall(r"var\((--\w+)\)", page.html)):
        assert page.html.count(f"{name}: #") == 2, f"{name} needs a light and a dark colour"


def test_same_run_gives_same_bytes(finished_run, tmp_path):
    first, second = (write_report(finished_run.path, tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


def test_hostile_text_stays_text(new_run):
    hostile = "</svg><script>alert(\"1\")</script>--><b onload='x'>${{7*7}}"
    primitives = [PRIMITIVES[0], hostile, PRIMITIVES[2]]
    new_run.write("space.json", {**space(), "primitives": primitives, "nodes": ["a", "b", hostile, "d"]})
    new_run.write("config.json", {**CONFIG, "dataset": hostile, hostile: hostile})
    new_run.search(1)
    new_run.write("genotype.json", {**GENOTYPE, "normal": [[hostile, 0], *GENOTYPE["normal"][1:]]})
    page = page_of(new_run)
    assert not page.tags("script")
    assert not page.tags("b")
    assert hostile in page.text
    assert len(page.tags("svg")) == 18


def test_report_lies_in_the_run_or_where_it_is_told(new_run, tmp_path):
    assert write_report(new_run.path) == new_run.path / "report.html"
    out = tmp_path / "page.html"
    assert write_report(str(new_run.path), out) == out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_folder_without_a_run(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"nothing.*config\.json"):
        write_report(tmp_path / "nothing")


def test_page_that_cannot_be_written(new_run):
    with pytest.raises(UserError, match="cannot write"):
        write_report(new_run.path, new_run.path / "no" / "such" / "folder.html")
