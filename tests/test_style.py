"""One look per model, readable on white."""

import matplotlib.colors
import pytest

from selfrepair.paths import MODELS, PUBLISHED
from selfrepair.plots.style import FIXED_LOOKS, OTHER_LOOKS, looks


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
