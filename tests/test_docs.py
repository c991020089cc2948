"""README and the pages for people: short, every link leads somewhere, every command is one."""

import re
from pathlib import Path

import pytest

from selfrepair.paths import REPOSITORY

PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "course").glob("*.md")),
    *(REPOSITORY / name for name in ("tests/README.md", "shared/models/README.md", "benchmarks/RESULTS.md")),
]
of_each = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@of_each
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


@of_each
def test_options_of_run_all_are_those_of_its_help(page):
    known = set(re.findall(r"--[a-z]+", (REPOSITORY / "run_all.sh").read_text(encoding="utf-8")))
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"\./run_all\.sh((?: --[a-z]+(?:[= ][A-Za-z0-9._/-]+)?)*)", text):
        for option, value in re.findall(r"(--[a-z]+)(?:[= ]([A-Za-z0-9._/-]+))?", command):
            assert option in known, command
            if option == "--profile" and value.islower():
                assert (REPOSITORY / "profiles" / f"{value}.yaml").is_file(), command


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
