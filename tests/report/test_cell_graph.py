"""The drawing of cells: every label readable, on every published cell and on other topologies."""

from itertools import combinations, pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from neuroexapt.core.genotypes import GENOTYPES
from neuroexapt.errors import UserError
from neuroexapt.report.cell_graph import draw_cell
from neuroexapt.report.cell_layout import lay_out


def published_cells():
    for name, genotype in GENOTYPES.items():
        for cell in ("normal", "reduce"):
            edges = genotype.edges(cell)
            names = ["c_{k-2}", "c_{k-1}", *map(str, range(len(edges) // 2))]
            yield pytest.param(edges, names, getattr(genotype, f"{cell}_concat"), id=f"{name}-{cell}")


NAS_BENCH_201 = pytest.param(
    [
        (0, 1, "nor_conv_3x3"),
        (0, 2, "none"),
        (1, 2, "nor_conv_1x1"),
        (0, 3, "skip_connect"),
        (1, 3, "avg_pool_3x3"),
        (2, 3, "nor_conv_3x3"),
    ],
    ["c_{k-1}", "1", "2", "3"],
    [3],
    id="nas-bench-201",
)
CHAIN = pytest.param(
    [(i, i + 1, "sep_conv_3x3") for i in range(8)], ["in", *map(str, range(8))], [8], id="chain"
)
COMPLETE = pytest.param(
    [(source, target, f"op_{source}") for target in range(2, 10) for source in range(target)],
    ["c_{k-2}", "c_{k-1}", *map(str, range(8))],
    range(2, 10),
    id="complete-8-nodes",
)
ONE_EDGE = pytest.param([(0, 1, "a_rather_long_operation_name")], ["in", "0"], [1], id="one-edge")
PARALLEL = pytest.param([(0, 1, "sep_conv_3x3")] * 3, ["in", "0"], [1], id="parallel-edges")
LONG_NAMES = pytest.param([(0, 1, "skip_connect")], ["the input", "the only state"], [1], id="long-names")
ALL_CELLS = [*published_cells(), NAS_BENCH_201, CHAIN, COMPLETE, ONE_EDGE, PARALLEL, LONG_NAMES]


def joins(names, concat) -> bool:
    """Whether the output is a state of its own and not the last one."""
    return list(concat) != [len(names) - 1]


def drawn(figure: Figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def rendered_labels(figure: Figure):
    """(text, extent in pixels) of every label that is drawn, the legend's and the title's included."""
    renderer = drawn(figure)
    texts = [*figure.axes[0].texts, *figure.axes[0].get_legend().get_texts()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]


@pytest.mark.parametrize(("edges", "names", "concat"), ALL_CELLS)
def test_labels_are_complete_apart_and_inside(edges, names, concat):
    figure = draw_cell(edges, names, concat, "A cell")
    labels = rendered_labels(figure)
    shown = [text for text, _ in labels]
    for _, _, op in edges:
        assert shown.count(op) >= sum(other == op for _, _, other in edges)
    assert ("cₖ" in shown) == joins(names, concat)
    for (text, extent), (other_text, other) in combinations(labels, 2):
        assert not extent.overlaps(other), f"{text} overlaps {other_text}"
    for text, extent in labels:
        assert figure.bbox.x0 <= extent.x0 <= extent.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= extent.y0 <= extent.y1 <= figure.bbox.y1, text


@pytest.mark.parametrize(("edges", "names", "concat"), ALL_CELLS)
def test_boxes_hold_their_labels_and_stay_apart(edges, names, concat):
    figure = draw_cell(edges, names, concat)
    renderer = drawn(figure)
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    boxes = [patch.get_window_extent(renderer) for patch in patches]
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == len(texts) == len(edges) + len(names) + joins(names, concat)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for box, text in zip(boxes, texts, strict=True):
        extent = text.get_window_extent(renderer)
        assert box.x0 < extent.x0 <= extent.x1 < box.x1, text.get_text()


@pytest.mark.parametrize(("edges", "names", "concat"), ALL_CELLS)
def test_slots_of_a_column_do_not_touch(edges, names, concat):
    for column in lay_out(edges, len(names), concat).columns:
        for above, below in pairwise(column):
            assert above.y + above.height / 2 < below.y - below.height / 2


def test_edges_run_from_left_to_right():
    layout = lay_out([(0, 2, "a"), (1, 2, "b"), (2, 3, "c"), (0, 3, "d")], 4, [2, 3])
    assert [state.column for state in layout.states] == [0, 0, 1, 2, 3]
    for wire in layout.wires:
        assert [slot.column for slot in wire.route] == list(
            range(wire.route[0].column, wire.route[-1].column + 1)
        )


def test_needless_crossings_are_undone():
    layout = lay_out([(0, 3, "a"), (1, 2, "b")], 4, [2, 3])
    first, second, above, below = layout.states[0], layout.states[1], layout.states[3], layout.states[2]
    assert (first.y < second.y) == (above.y < below.y)


@pytest.mark.parametrize(
    ("edges", "concat", "message"),
    [
        ([(1, 0, "skip_connect")], [1], "edge 1 → 0"),
        ([(0, 5, "skip_connect")], [1], "edge 0 → 5"),
        ([(-1, 1, "skip_connect")], [1], "edge -1 → 1"),
        ([(0, 1, "skip_connect")], [2], "state 2"),
    ],
)
def test_edges_and_outputs_that_do_not_exist(edges, concat, message):
    with pytest.raises(UserError, match=message):
        draw_cell(edges, ["in", "0"], concat)


def test_a_dollar_sign_is_no_mathematics():
    figure = draw_cell([(0, 1, "$x^$")], ["in", "0"], [1])
    drawn(figure)
    assert "$x^$" in [text.get_text() for text in figure.axes[0].texts]
