"""The figures of a search show the numbers they were given, in the same styles everywhere."""

from math import log

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from neuroexapt.report.figures import alpha_heat_map, alpha_history, curves, edge_names, entropy_history
from neuroexapt.report.style import THEME, op_style, state_name
from neuroexapt.spaces import SPACES

PRIMITIVES = ["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5"]


def random_weights(*shape: int) -> np.ndarray:
    weights = np.exp(np.random.default_rng(0).normal(size=shape))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_heat_map_annotates_every_weight_and_marks_the_strongest():
    weights = random_weights(5, 6)
    figure = alpha_heat_map(weights, [f"edge {i}" for i in range(5)], PRIMITIVES, "Normal")
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == [f"{weight:.2f}" for weight in weights.ravel()]
    bold = [i for i, text in enumerate(texts) if text.get_weight() == "bold"]
    assert bold == [6 * row + column for row, column in enumerate(weights.argmax(axis=1))]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == PRIMITIVES
    assert figure.axes[0].get_title(loc="left") == "Normal"


@pytest.mark.parametrize(("edges", "ops"), [(1, 1), (14, 8), (2, 20)])
def test_heat_map_fits_its_labels(edges, ops):
    primitives = [f"an_operation_with_a_rather_long_name_{op}" for op in range(ops)]
    figure = alpha_heat_map(random_weights(edges, ops), [f"cₖ₋₂ → {i}" for i in range(edges)], primitives)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        extent = label.get_window_extent(canvas.get_renderer())
        assert figure.bbox.x0 <= extent.x0 <= extent.x1 <= figure.bbox.x1, label.get_text()
        assert figure.bbox.y0 <= extent.y0 <= extent.y1 <= figure.bbox.y1, label.get_text()
    rows = axes.get_window_extent().height / figure.dpi / edges
    assert rows > 0.2, "a row must have room for its numbers"


def test_heat_map_colours_compare_between_epochs():
    (uniform,) = alpha_heat_map([[0.25] * 4], ["e"], PRIMITIVES[:4]).axes[0].collections
    (decided,) = alpha_heat_map([[0.05, 0.05, 0.4, 0.5]], ["e"], PRIMITIVES[:4]).axes[0].collections
    assert uniform.get_clim() == decided.get_clim() == (0, 0.5)


def test_alpha_history_draws_a_line_an_operation_in_its_style():
    history = random_weights(7, 6)
    lines = alpha_history(history, PRIMITIVES, 0.9).axes[0].lines
    np.testing.assert_array_equal([line.get_ydata() for line in lines], history.T)
    assert [line.get_color() for line in lines] == [op_style(op).colour for op in PRIMITIVES]
    assert lines[0].get_xdata()[0] == 1


def test_entropy_history_shows_edges_mean_and_maximum():
    history = np.array([[1.0, 2.0], [0.5, 1.5], [0.0, 1.0]])
    axes = entropy_history(history, 8).axes[0]
    drawn = [np.asarray(line.get_ydata()).tolist() for line in axes.lines]
    assert [1.5, 1.0, 0.5] in drawn
    assert [log(8)] * 2 in drawn
    assert len([values for values in drawn if values in history.T.tolist()]) == 2


def test_single_epoch_is_visible():
    for figure in (
        alpha_history(random_weights(1, 6), PRIMITIVES, 1.0),
        entropy_history([[1.0, 2.0]], 8),
        curves({"train": [0.5], "test": [0.4]}, "loss"),
    ):
        lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
        assert lines
        assert all(line.get_marker() == "o" for line in lines)


def test_curves_are_named_and_accuracies_are_per_cent():
    axes = curves({"train": [0.5, 0.75], "test": [0.4, 0.6]}, "test accuracy").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "test"]
    assert axes.yaxis.get_major_formatter()(0.5).endswith("%")
    loss = curves({"train": [2.0, 1.0]}, "loss").axes[0]
    assert not loss.yaxis.get_major_formatter()(0.5).endswith("%")


@pytest.mark.parametrize("values", [[0.8, 1.0], [0.99875, 1.0], [0.1234, 0.1236]])
@pytest.mark.parametrize("quantity", ["loss", "test accuracy"])
def test_curves_have_room_for_their_labels(values, quantity):
    figure = curves({"train": values}, quantity)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert figure.axes[0].yaxis.label.get_window_extent(canvas.get_renderer()).x0 >= 0


def test_edge_names():
    assert edge_names([(0, 2), (1, 2)], ["c_{k-2}", "c_{k-1}", "0"]) == ["cₖ₋₂ → 0", "cₖ₋₁ → 0"]
    assert state_name("out_1") == "out_1"


def primitives_of_every_space():
    for name, space in SPACES.items():
        for cell in space.describe(layers=8)["edges"]:
            yield pytest.param(space.primitives_of(cell), id=f"{name}-{cell}")


@pytest.mark.parametrize(
    "ops",
    [
        pytest.param(
            [*PRIMITIVES, "dil_conv_3x3", "dil_conv_5x5", "sep_conv_7x7", "conv_7x1_1x7"], id="published"
        ),
        *primitives_of_every_space(),
    ],
)
def test_styles_tell_operations_apart(ops):
    styles = [op_style(op) for op in ops]
    assert len({(style.colour, style.line) for style in styles}) == len(ops)


def test_styles_follow_from_names():
    assert op_style("sep_conv_3x3").colour == op_style("sep_conv_7x7").colour
    assert op_style("my_own_op") == op_style("my_own_op")
    assert op_style("my_own_op").family == "my_own_op"


def test_colours_of_the_theme_do_not_stand_for_each_other():
    light = [colours[0] for colours in THEME.values()]
    assert len(set(light)) == len(light)
