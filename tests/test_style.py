"""One look per model, readable on white; small pictures in notebooks."""

from base64 import b64decode
from io import BytesIO
from itertools import combinations

import matplotlib.colors
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import papermill
import pytest
from PIL import Image

from selfrepair.paths import MODELS, PUBLISHED
from selfrepair.plots.style import (
    FIXED_LOOKS,
    MAY_DIFFER,
    OTHER_LOOKS,
    SHARPER,
    looks,
    reduced_png,
    save,
    small_png,
    use_style,
)


def contrast_with_white(colour):
    """By the formula of WCAG 2."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)
    ]
    return 1.05 / (sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05)


def test_embedded_and_released_models_look_the_same_everywhere():
    embedded = {folder.name for folder in MODELS.iterdir() if (folder / "config.json").is_file()}
    released = {
        line.split(",")[0] for file in PUBLISHED.glob("*.csv") for line in file.read_text().splitlines()[1:]
    }
    assert embedded | released <= FIXED_LOOKS.keys()
    alone = {name: looks([name])[name] for name in FIXED_LOOKS}
    assert alone == looks(FIXED_LOOKS) == looks(reversed(FIXED_LOOKS)) == FIXED_LOOKS
    assert len({FIXED_LOOKS[name] for name in embedded}) == len(embedded)


def test_other_models_look_different_and_stay_in_order():
    names = ["a", "pocket-gpt2", "b", "a", "c"]
    found = looks(names)
    assert list(found) == ["a", "pocket-gpt2", "b", "c"]
    assert len({colour for colour, _ in found.values()}) == 4


@pytest.mark.parametrize("look", sorted({*FIXED_LOOKS.values(), *OTHER_LOOKS}))
def test_every_colour_is_readable_on_white(look):
    assert contrast_with_white(look[0]) >= 3


@pytest.fixture(autouse=True)
def style():
    """Of the project's figures, whatever tests before this one set."""
    with plt.rc_context():
        use_style()
        yield


def saved_and_reduced(figure, folder):
    """One drawing (the next one's layout can differ by a dot): each square of its dots averaged, and reduced."""
    save(figure, folder, "a")
    plt.close(figure)
    sharp = folder / "figures" / "a.png"
    wanted = Image.open(sharp).convert("RGB").reduce(SHARPER)
    found = Image.open(BytesIO(reduced_png(sharp))).convert("RGB")
    return np.asarray(wanted, int), np.asarray(found, int)


def test_pictures_in_notebooks_are_small_and_look_the_same(tmp_path):
    figure, axis = plt.subplots(figsize=(3, 2), dpi=100)
    axis.scatter(*np.random.default_rng(0).normal(size=(2, 500)), c=np.linspace(0, 1, 500), alpha=0.5)
    plain = BytesIO()
    figure.savefig(plain, dpi=100, bbox_inches="tight")
    assert len(small_png(figure)) < 0.6 * len(plain.getvalue())
    wanted, found = saved_and_reduced(figure, tmp_path)
    assert found.shape == wanted.shape and abs(found - wanted).max(-1).mean() < 3
    assert np.abs(np.subtract(found.shape[1::-1], Image.open(plain).size)).max() <= 1


def test_saved_pictures_are_those_of_notebooks_and_sharper(tmp_path):
    figure, axis = plt.subplots(figsize=(3, 2))
    axis.plot([1, 2])
    save(figure, tmp_path, "01_a")
    saved, shown = tmp_path / "figures" / "01_a.png", small_png(figure)
    sides = [Image.open(one).size for one in (saved, BytesIO(shown))]
    assert sides[1] == tuple(-(-side // SHARPER) for side in sides[0])
    assert reduced_png(saved) == shown
    assert (tmp_path / "figures" / "01_a.pdf").read_bytes().startswith(b"%PDF")
    plt.close(figure)


def test_a_figure_is_drawn_again_only_if_it_changes(tmp_path, monkeypatch):
    """Axes stay where the first drawing laid them out: a second one can move them by a dot."""
    figure, axis = plt.subplots(figsize=(3, 2))
    (line,) = axis.plot([1, 2])
    figure.colorbar(axis.scatter([0, 1], [1, 2], c=[0, 1]))
    pictures = []
    savefig = type(figure).savefig

    def counted(self, *target, **settings):
        pictures.append(target)
        savefig(self, *target, **settings)

    monkeypatch.setattr(type(figure), "savefig", counted)
    save(figure, tmp_path, "01_a")
    drawn, places = len(pictures), [one.bbox.bounds for one in figure.axes]
    shown = small_png(figure)
    assert len(pictures) == drawn and small_png(figure) == shown
    assert [one.bbox.bounds for one in figure.axes] == places
    line.set_color("black")
    assert small_png(figure) != shown and len(pictures) == drawn + 1
    save(figure, tmp_path, "01_b")
    assert reduced_png(tmp_path / "figures" / "01_b.png") == small_png(figure)
    plt.close(figure)


@pytest.mark.parametrize("layout", ["constrained", "tight"])
def test_saving_leaves_a_figure_its_layout(layout, tmp_path):
    figure, _ = plt.subplots(layout=layout)
    before = figure.get_layout_engine()
    for name in ("a", "b"):
        save(figure, tmp_path, name)
        assert figure.get_layout_engine() is before
    plt.close(figure)


def test_thin_lines_keep_the_colours_of_their_models(tmp_path):
    """Of which there are few pixels, and hardly any of the pure colour."""
    figure, axis = plt.subplots(figsize=(6, 3))
    x = np.linspace(-3, 3, 200)
    for i, (name, (colour, _)) in enumerate(FIXED_LOOKS.items()):
        axis.plot(x, np.tanh(x + i / 9), color=colour, lw=1, label=name)
    axis.legend(fontsize=7, ncol=2)
    wanted, found = saved_and_reduced(figure, tmp_path)
    coloured = np.ptp(wanted, axis=-1) > 30
    assert coloured.sum() > 1000
    colours = {matplotlib.colors.to_rgb(colour) for colour, _ in FIXED_LOOKS.values()}
    apart = min(np.abs(np.subtract(one, other)).max() for one, other in combinations(colours, 2))
    assert np.abs(found - wanted).max(-1)[coloured].mean() < 255 * apart / 2


@pytest.mark.parametrize("size_of_points", [4, 36, 100, 400])
def test_areas_of_a_heat_map_keep_their_colours(size_of_points, tmp_path):
    """Beside so many points that a small palette would be theirs; weak values are not taken for none."""
    figure, (cells, points) = plt.subplots(1, 2, figsize=(6, 3), dpi=90)
    cells.imshow(np.linspace(-0.2, 1, 49).reshape(7, 7), cmap="RdBu", vmin=-1, vmax=1)
    where = np.random.default_rng(0).normal(size=(2, 300))
    points.scatter(*where, size_of_points, c=np.linspace(0, 1, 300), cmap="hsv")
    wanted, found = saved_and_reduced(figure, tmp_path)
    flat = (wanted[1:, 1:] == wanted[:-1, 1:]).all(-1) & (wanted[1:, 1:] == wanted[1:, :-1]).all(-1)
    assert abs(found - wanted)[1:, 1:][flat].max() <= MAY_DIFFER


@pytest.mark.slow("a notebook's pictures are the small ones")
def test_a_notebook_shows_these_pictures(tmp_path):
    """Though the inline backend sets its own when it is first used."""
    source = "import matplotlib.pyplot as plt\nfrom selfrepair.plots.style import use_style\nuse_style()"
    cells = [nbformat.v4.new_code_cell(text) for text in (source, "plt.plot([1, 2])")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "a.ipynb")
    done = papermill.execute_notebook(
        str(tmp_path / "a.ipynb"), str(tmp_path / "b.ipynb"), progress_bar=False
    )
    (picture,) = [
        output.data["image/png"] for output in done.cells[1].outputs if output.output_type == "display_data"
    ]
    assert Image.open(BytesIO(b64decode(picture))).mode == "P"
