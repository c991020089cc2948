"""Where the repository keeps what ships with it, independent of the working directory."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHARED = PACKAGE.parent
MODELS = SHARED / "models"
#: What notebook 08 compares: models trained alike but for dropout and seed, and their table.
ARMS = MODELS / "arms"
HELD_OUT_TEXT = SHARED / "text"
PUBLISHED = SHARED / "published"
REPOSITORY = SHARED.parent
PROFILES = REPOSITORY / "profiles"
NOTEBOOKS = REPOSITORY / "notebooks"
FIGURES = REPOSITORY / "figures"
#: A folder for each run, and one for what is done by hand.
RUNS = REPOSITORY / "results"
BY_HAND = RUNS / "by-hand"
README = REPOSITORY / "README.md"


def cache_dir() -> Path:
    """Folder for what can be made again: ``$SELFREPAIR_CACHE``, else the user's cache folder."""
    if "SELFREPAIR_CACHE" in os.environ:
        return Path(os.environ["SELFREPAIR_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "selfrepair"
