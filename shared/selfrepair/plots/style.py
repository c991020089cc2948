"""What every figure shares: style, saving, and one look per model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from jaxtyping import Int
from matplotlib.figure import Figure
from PIL import Image

from selfrepair.store.files import slug

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Colour and marker of the embedded models and of those with released numbers: the same in every figure.
FIXED_LOOKS = {
    "pocket-gpt2": ("#0173b2", "o"),
    "pocket-gpt2-dropout": ("#3a92c9", "s"),
    "pocket-gpt2-headdrop": ("#6a3d9a", "P"),
    "pocket-pythia": ("#c2700a", "^"),
    "pocket-pythia-small": ("#a0522d", "v"),
    "pocket-llama": ("#029e73", "D"),
    "gpt2-small": ("#1f3b73", "o"),
    "gpt2-medium": ("#7f7f7f", "s"),
    "gpt2-large": ("#000000", "P"),
    "pythia-160m": ("#cc3311", "^"),
    "pythia-410m": ("#882255", "D"),
    "pythia-410m-deduped": ("#882255", "D"),
    "pythia-1b-deduped": ("#d55e9b", "v"),
    "opt-1.3b": ("#117733", "X"),
    "tiny-stories-instruct-33M": ("#8a7500", "s"),
}
#: Those of other models, in the order in which a figure has them.
OTHER_LOOKS = (
    *(("#0173b2", "o"), ("#c2700a", "s"), ("#029e73", "^"), ("#d55e00", "D"), ("#b0569f", "v")),
    *(("#a0522d", "P"), ("#3a92c9", "X"), ("#7f7f7f", "o"), ("#8a7500", "s"), ("#1f3b73", "^")),
)
#: Of every picture: about a dot for a pixel of a page. Pictures are most of what a run adds to the
#: repository; the PDFs beside them are as sharp as one likes.
DPI = 72
#: How many times finer pictures in results are than those in notebooks and in the repository.
SHARPER = 2
#: How far (of 255) fewer colours may change areas of one colour: those of heat maps are read.
MAY_DIFFER = 10
#: Colours for all that is no area.
BETWEEN = 48
#: Makes one number of a colour.
CODE = np.array([256**2, 256, 1])
#: What figures looked like when they were drawn: drawing takes most of a notebook's time.
_PICTURES: WeakKeyDictionary[Figure, Image.Image] = WeakKeyDictionary()


def use_style() -> None:
    """Sizes that stay readable at column width, and the colour-blind-safe palette.

    In a notebook, pictures are those of :func:`small_png`.
    """
    from IPython import get_ipython  # a second's work, and only notebooks need it

    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=1.1)
    plt.rcParams.update(
        {
            "figure.dpi": DPI,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.07,  # a title of the row below is not taken for a label
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    if (shell := get_ipython()) is not None:
        plt.switch_backend(plt.get_backend())  # else it takes the formatter away when first used
        shell.display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(figure: Figure) -> bytes:
    """A picture at the figure's own resolution, of few colours: a third of the bytes of all of them."""
    return _reduced(_drawn(figure))


def reduced_png(sharp: Path) -> bytes:
    """The same of a picture that :func:`save` wrote."""
    with Image.open(sharp) as picture:
        return _reduced(picture)


def _drawn(figure: Figure) -> Image.Image:
    """At :data:`SHARPER` times the figure's own resolution; once, unless something of it changes."""
    if figure.stale or figure not in _PICTURES:
        drawn = BytesIO()
        figure.savefig(drawn, dpi=SHARPER * figure.dpi, bbox_inches="tight")
        _PICTURES[figure] = Image.open(drawn).convert("RGB")
        figure.stale = False  # its resolution was another one meanwhile
    return _PICTURES[figure]


def _reduced(sharp: Image.Image) -> bytes:
    small = BytesIO()
    _of_few_colours(sharp.reduce(SHARPER)).save(small, "png", optimize=True)
    return small.getvalue()


def _of_few_colours(picture: Image.Image) -> Image.Image:
    """With a palette of the colours that fill areas, and :data:`BETWEEN` more for lines, text and edges.

    A picture with areas of more colours than a palette can hold keeps all of its colours.
    """
    pixels = np.asarray(picture, dtype=int)
    codes, which = np.unique(pixels @ CODE, return_inverse=True)
    colours = codes[:, None] // CODE % 256
    palette = _colours_of_areas(pixels)
    if len(palette) > 256 - BETWEEN:
        return picture
    others = colours[np.abs(colours[:, None] - palette).max(-1).min(1) > MAY_DIFFER / 2]
    if len(others):
        # Each counts once, however few its pixels: a thin line's colour is read as well as a bar's.
        covering = Image.fromarray(others[None].astype(np.uint8))
        covering = covering.quantize(BETWEEN, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        palette = np.concatenate([palette, np.reshape(covering.getpalette() or [], (-1, 3))])
    nearest = (np.square(palette).sum(-1) - 2.0 * colours @ palette.T.astype(float)).argmin(1)
    found = Image.fromarray(nearest[which].astype(np.uint8))
    found.putpalette(palette.astype(np.uint8).tobytes())
    return found


def _colours_of_areas(pixels: Int[np.ndarray, "row column 3"]) -> Int[np.ndarray, "colour 3"]:
    """The colours of more than single pixels, the most frequent first, less those that look like another."""
    here = pixels[1:, 1:]
    flat = (here == pixels[:-1, 1:]).all(-1) & (here == pixels[1:, :-1]).all(-1)
    codes, counts = np.unique(here[flat] @ CODE, return_counts=True)
    found = np.empty((0, 3), int)
    for colour in codes[np.argsort(-counts, kind="stable"), None] // CODE % 256:
        if (np.abs(found - colour).max(-1) > MAY_DIFFER / 2).all():
            found = np.append(found, [colour], axis=0)
    return found


def save(figure: Figure, out_dir: Path, name: str) -> None:
    """Writes ``figures/<name>.png`` under ``out_dir``, :data:`SHARPER` times as sharp as in notebooks, and
    ``.pdf``."""
    folder = out_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    _drawn(figure).save(folder / f"{name}.png")
    layout = figure.get_layout_engine()
    figure.set_layout_engine("none")  # what was laid out for the picture stays where it is
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.set_layout_engine(layout)
    figure.stale = False


def save_of_model(figure: Figure, out_dir: Path, name: str, model: str) -> None:
    """:func:`save` under ``<name>-<model>``, of a figure that every model has one of."""
    save(figure, out_dir, f"{name}-{slug(model)}")


def looks(models: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model; no two of a figure are alike unless it has more than there are."""
    names = list(dict.fromkeys(models))
    taken = {FIXED_LOOKS[name][0] for name in names if name in FIXED_LOOKS}
    free = itertools.cycle([look for look in OTHER_LOOKS if look[0] not in taken])
    return {name: FIXED_LOOKS[name] if name in FIXED_LOOKS else next(free) for name in names}
