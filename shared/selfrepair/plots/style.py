"""What every figure shares: style, saving, and one look per model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
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
DPI = 80
#: How many times finer pictures in results are than those in notebooks and in the repository.
SHARPER = 2
#: How far (of 255) fewer colours may change areas of one colour: those of heat maps are read.
MAY_DIFFER = 10


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
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    if (shell := get_ipython()) is not None:
        plt.switch_backend(plt.get_backend())  # else it takes the formatter away when first used
        shell.display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(figure: Figure) -> bytes:
    """A picture at the figure's own resolution, of few colours: a third of the bytes of all of them."""
    return _png(_drawn(figure).reduce(SHARPER))


def reduced_png(sharp: Path) -> bytes:
    """The same of a picture that :func:`save` wrote."""
    with Image.open(sharp) as picture:
        return _png(picture.convert("RGB").reduce(SHARPER))


def _drawn(figure: Figure) -> Image.Image:
    """At :data:`SHARPER` times the figure's own resolution."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=SHARPER * figure.dpi, bbox_inches="tight")
    return Image.open(drawn).convert("RGB")


def _png(picture: Image.Image) -> bytes:
    small = BytesIO()
    _of_few_colours(picture).save(small, "png", optimize=True)
    return small.getvalue()


def _of_few_colours(picture: Image.Image) -> Image.Image:
    """With the smallest palette that leaves areas of one colour as they are; all its colours if none does."""
    pixels = np.asarray(picture, dtype=int)
    here = pixels[1:, 1:]
    flat = (here == pixels[:-1, 1:]).all(-1) & (here == pixels[1:, :-1]).all(-1)
    for colours in (32, 64, 128, 256):
        # By what is covered: of few pixels of their own colour, a line's or a point's, that is kept.
        found = picture.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        change = np.abs(np.asarray(found.convert("RGB"), dtype=int)[1:, 1:] - here)
        if change[flat].max(initial=0) <= MAY_DIFFER:
            return found
    return picture


def save(figure: Figure, out_dir: Path, name: str) -> None:
    """Writes ``figures/<name>.png``, :data:`SHARPER` than in notebooks, and ``.pdf`` under ``out_dir``."""
    folder = out_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(_png(_drawn(figure)))
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def save_of_model(figure: Figure, out_dir: Path, name: str, model: str) -> None:
    """:func:`save` under ``<name>-<model>``, of a figure that every model has one of."""
    save(figure, out_dir, f"{name}-{slug(model)}")


def looks(models: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model; no two of a figure are alike unless it has more than there are."""
    names = list(dict.fromkeys(models))
    taken = {FIXED_LOOKS[name][0] for name in names if name in FIXED_LOOKS}
    free = itertools.cycle([look for look in OTHER_LOOKS if look[0] not in taken])
    return {name: FIXED_LOOKS[name] if name in FIXED_LOOKS else next(free) for name in names}
