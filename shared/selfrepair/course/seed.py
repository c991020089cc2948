"""The instructor's seed, which the models of hidden tests are made from."""

from __future__ import annotations

import os
import secrets

from selfrepair.errors import UserError
from selfrepair.paths import REPOSITORY

COURSE = REPOSITORY / "course"
SEED_FILE = COURSE / "seed"
VARIABLE = "SELFREPAIR_COURSE_SEED"
#: Seeds are below this.
LARGEST = 10**9


def hidden_seed() -> int:
    """The number in ``$SELFREPAIR_COURSE_SEED``, else in ``course/seed``.

    Raises:
        UserError: there is none, or it is no whole number from 0 to a thousand million.
    """
    if VARIABLE in os.environ:
        where, text = f"${VARIABLE}", os.environ[VARIABLE]
    elif SEED_FILE.is_file():
        where, text = str(SEED_FILE), SEED_FILE.read_text(encoding="utf-8").strip()
    else:
        raise UserError(
            f"hidden tests need the instructor's seed: run ./run_all.sh --course once, which writes "
            f"{SEED_FILE}, or set {VARIABLE}"
        )
    if not (text.isascii() and text.isdigit() and int(text) < LARGEST):
        raise UserError(f"{where} must be a whole number from 0 to {LARGEST - 1}, not {text[:40]!r}")
    return int(text)


def make_seed() -> bool:
    """Writes a random seed to ``course/seed`` if there is none; returns whether it did."""
    try:
        with SEED_FILE.open("x", encoding="utf-8") as file:
            file.write(f"{secrets.randbelow(LARGEST)}\n")
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    done = "made" if make_seed() else "kept"
    print(f"{SEED_FILE}: {done}; it decides the models of hidden tests, keep it to yourself")
