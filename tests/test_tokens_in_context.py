"""Tokens coloured by a number each: as HTML, and as a figure."""

import re
import warnings
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from test_style import contrast_with_white

from selfrepair.analysis.passages import AFTER, BEFORE, Passage, around, colour_limit, of_next_tokens
from selfrepair.plots.style import save, use_style
from selfrepair.plots.tokens_in_context import COLOURS, COLUMNS, passages_figure, passages_html


class Spans(HTMLParser):
    """Text, style and title of every span that has a title, as a browser reads them."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "span" and "title" in attributes:
            self.open = [attributes["style"], attributes["title"], ""]

    def handle_endtag(self, tag):
        if tag == "span" and self.open:
            self.found.append(tuple(self.open))
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.open[2] += data


def passage(tokens, values, heading="", marked=None):
    return Passage(heading, tokens, np.array(values), marked)


def background(style):
    return re.search("background:(#[0-9a-f]{6})", style)[1]


def test_every_token_says_its_value_and_has_its_colour():
    page = passages_html(
        [passage(["A", " cat", "\n", " sat"], [np.nan, 0.5, -0.25, 0.0], marked=2)], limit=0.5
    )
    none, high, low, zero = Spans(page).found
    assert [span[2] for span in (none, high, low, zero)] == ["A", " cat", "↵", " sat"]
    assert [span[1] for span in (none, high, low, zero)] == [
        "no value",
        "+0.500 logits",
        "−0.250 logits",
        "+0.000 logits",
    ]
    assert "background" not in none[0]
    red, blue = (to_rgb(background(span[0])) for span in (low, high))
    assert red[0] > red[2] and blue[2] > blue[0]
    assert min(to_rgb(background(zero[0]))) > 0.9
    assert [span for span in (none, high, low, zero) if "outline" in span[0]] == [low]
    assert "−0.50 <span" in page and "+0.50 logits" in page


def test_text_is_never_read_as_html():
    nasty = ["<script>alert(1)</script>", "&amp;", '"><b>', "<|endoftext|>"]
    page = passages_html([passage(nasty, [0.1] * 4, heading="<i>&amp;")], limit=1)
    assert [text for _, _, text in Spans(page).found] == nasty
    assert "<script" not in page and page.count("<b>") == 1 and "<i>" not in page


def test_beyond_the_limit_the_colour_stays():
    at, beyond = Spans(passages_html([passage(["a", "b"], [1.0, 9.0])], limit=1)).found
    assert background(at[0]) == background(beyond[0])
    assert beyond[1] == "+9.000 logits"


def test_black_text_is_readable_on_every_colour():
    """By WCAG 2: a contrast of 4.5 at least."""
    assert all(21 / contrast_with_white(colour[:3]) >= 4.5 for colour in COLOURS(np.linspace(0, 1, 101)))


@pytest.mark.parametrize("draw", ["html", "figure"])
@pytest.mark.parametrize(("tokens", "limit"), [(["a", "b"], 1.0), (["a"], 0.0), (["a"], float("nan"))])
def test_what_has_no_colour_is_refused(draw, tokens, limit):
    with pytest.raises(ValueError):
        one = [passage(tokens, [0.1])]
        passages_html(one, limit) if draw == "html" else passages_figure(one, limit, "logits")


def drawn(figure):
    """Of the figure's first axes: every text with its place, and every box with its colour."""
    axis = figure.axes[0]
    texts = [(*text.get_position(), text.get_text()) for text in axis.texts]
    boxes = {
        (box.get_x(), round(box.get_y())): (box.get_width(), box.get_facecolor()) for box in axis.patches
    }
    return texts, boxes


def test_figure_has_the_tokens_on_their_colours_and_the_unit():
    shown = [
        passage(["A", " $x", "\n"], [np.nan, 0.5, -0.5], "first", marked=2),
        passage([" b$"], [0.0], "second"),
    ]
    figure = passages_figure(shown, 0.5, "self-repair")
    texts, boxes = drawn(figure)
    assert [text for _, _, text in texts] == ["first", "A", " $x", "↵", "second", " b$"]
    places = {text: (x, int(y)) for x, y, text in texts}
    assert "A" in places and places["A"] not in boxes
    for text, value in {" $x": 0.5, "↵": -0.5, " b$": 0.0}.items():
        width, colour = boxes[places[text]]
        assert width == len(text)
        np.testing.assert_allclose(colour, COLOURS(value / 1.0 + 0.5), atol=0.01)
    assert [box.get_linewidth() > 1 for box in figure.axes[0].patches] == [False, True, False]
    assert places["↵"][0] == places["A"][0] + len("A $x") and places["↵"][1] == places["A"][1]
    assert places["second"][1] > places["A"][1]
    (unit,) = figure.texts
    assert unit.get_text() == "self-repair"
    bar = figure.axes[1].get_tightbbox(figure.canvas.get_renderer())
    assert unit.get_window_extent().x0 > bar.x1, "clear of the bar and its arrow"
    assert figure.axes[1].get_xlim() == (-0.5, 0.5)
    figure.canvas.draw()  # a dollar sign is no formula
    plt.close(figure)


def test_figure_wraps_and_nothing_leaves_it():
    words = [f" word{number}" for number in range(100)] + ["x" * (2 * COLUMNS + 5)]
    figure = passages_figure([passage(words, [0.1] * len(words), "long")], 1.0, "logits")
    texts, boxes = drawn(figure)
    assert "".join(text for _, _, text in texts) == "long" + "".join(words)
    assert all(x + width <= COLUMNS for (x, _), (width, _) in boxes.items())
    assert len({y for _, y in boxes}) > 5
    figure.canvas.draw()
    whole = figure.bbox
    inside = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 for box in inside)
    assert max(box.y1 for box in inside) <= whole.y1
    plt.close(figure)


def test_figure_is_saved_without_a_warning_in_the_style_of_notebooks(tmp_path):
    """Its places are its own, whatever lays out other figures: twice, for each file has it drawn."""
    with plt.rc_context(), warnings.catch_warnings():
        use_style()
        warnings.simplefilter("error")
        save(passages_figure([passage(["a", " b"], [0.1, -0.2], "one")], 1.0, "logits"), tmp_path, "one")
    assert {file.suffix for file in (tmp_path / "figures").iterdir()} == {".png", ".pdf"}


@pytest.mark.parametrize("position", [3, 60, 126])
def test_what_stands_around_a_token_has_the_values_of_the_positions_that_predict_it(position):
    tokens, values = [f" {i}" for i in range(128)], np.arange(127) + 0.5
    found = around("here", tokens, values, position)
    first, last = max(0, position + 1 - BEFORE), min(128, position + 2 + AFTER)
    assert found.tokens == tokens[first:last] and found.tokens[found.marked] == f" {position + 1}"
    for token, value in zip(found.tokens, found.values, strict=True):
        assert np.isnan(value) if token == " 0" else value == int(token) - 0.5
    np.testing.assert_array_equal(of_next_tokens(np.array([1.0, 2.0])), [np.nan, 1, 2])


def test_colours_end_where_few_values_lie_beyond():
    values = np.r_[np.nan, np.random.default_rng(0).normal(size=400)]
    limit = colour_limit([passage([], values[:100]), passage([], values[100:])])
    assert limit == pytest.approx(np.quantile(np.abs(values[1:]), 0.95))
    assert colour_limit([passage([], [0.0] * 99 + [3.0])]) == 3
    assert colour_limit([]) == colour_limit([passage([], [0.0, np.nan])]) == 1
