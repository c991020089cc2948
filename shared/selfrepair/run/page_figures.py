"""The figures of the results page: by the notebook that draws them, with captions that say what to see."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import nbformat
from markupsafe import Markup, escape
from PIL import Image

from selfrepair.paths import NOTEBOOKS
from selfrepair.run.notebook_page import caption, html_of
from selfrepair.store.files import unreadable

#: How the text about a figure begins, in the notebook that draws it.
WHAT_TO_SEE = re.compile(r"\*\*What to see[^*]*\*\*\s*(.*?)(?:\n\s*\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Figure:
    """An image of ``width`` × ``height`` pixels; ``uri`` holds it, or names the file beside the page."""

    name: str
    uri: str
    width: int
    height: int
    what_to_see: str = ""

    @property
    def caption(self) -> str:
        return caption(self.name)


@dataclass(frozen=True)
class Section:
    """The figures of one notebook, grouped under its headings, and where to read it."""

    number: str
    title: str
    question: Markup
    groups: dict[str, list[Figure]]
    notebook: str | None


def figure(path: Path, held: bool) -> Figure:
    """The image, if it is ``held`` as lossless WebP: the same pixels in fewer bytes.

    Raises:
        UserError: it cannot be read.
    """
    content = io.BytesIO()
    try:
        with Image.open(path) as image:
            width, height = image.size
            if not held:
                return Figure(path.stem, quote(path.name), width, height)
            image.save(content, "WEBP", lossless=True)
    except Exception as error:  # Pillow raises many types for a damaged image
        raise unreadable(path, error) from error
    uri = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
    return Figure(path.stem, uri, width, height)


def sections(figures: list[Figure], out_dir: Path, target: Path | None) -> list[Section]:
    """Figures by the notebook that draws them, in the order in which it does; the others last.

    What there is to see is said as in the notebook that was run, where it is in the results folder.
    """
    left = {figure.name: figure for figure in figures}
    found = []
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        title = heading = question = introduction = ""
        groups: dict[str, list[Figure]] = {}
        executed = out_dir / "notebooks" / path.name
        cells = _cells(executed if executed.is_file() else path)
        for number, cell in enumerate(cells):
            if cell.cell_type == "markdown":
                lines = cell.source.splitlines()
                title = title or _after("# ", lines)
                question = question or _after("**Question.** ", lines)
                heading = _after("## ", lines) or heading
                introduction = _first_paragraph(cell.source) or introduction
                continue
            drawn = [name for name in left if f'"{name.partition("-")[0]}"' in cell.source]
            said = _what_to_see(cells[number:], {f'"{name.partition("-")[0]}"' for name in left})
            for place, name in enumerate(drawn):
                text = (said or html_of(introduction)) if place == len(drawn) - 1 else ""
                groups.setdefault(heading, []).append(replace(left.pop(name), what_to_see=text))
        link = _link(path, out_dir, target)
        if groups or link:
            found.append(Section(path.name[:2], title, with_emphasis(question), groups, link))
    if left:
        found.append(Section("other", "Other figures", Markup(""), {"": list(left.values())}, None))
    return found


def _cells(path: Path) -> list[nbformat.NotebookNode]:
    try:
        return nbformat.read(path, as_version=4).cells
    except Exception as error:  # of many types
        raise unreadable(path, error) from error


def _what_to_see(cells: list[nbformat.NotebookNode], figures: set[str]) -> Markup:
    """What is said of the figures of the first cell, before the next figure or heading."""
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            texts = [cell.source]
        else:
            if number and any(name in cell.source for name in figures):
                break
            shown = (output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", []))
            texts = ["".join(text) for text in shown]
        for text in texts:
            if match := WHAT_TO_SEE.search(text):
                return html_of(match[1])
        if number and cell.cell_type == "markdown" and re.search(r"^## ", cell.source, re.MULTILINE):
            break
    return Markup("")


def _first_paragraph(markdown: str) -> str:
    """The first that is no heading, list, table or formula, and has no heading of its own (in bold)."""
    paragraphs = (part.strip() for part in markdown.split("\n\n"))
    return next((part for part in paragraphs if part and not re.match(r"[#*|<$>-]|\d+\.", part)), "")


def _link(notebook: Path, out_dir: Path, target: Path | None) -> str | None:
    """Where a page finds a notebook: its HTML beside the page of its run, if it was made."""
    if target is not None:
        return Path(os.path.relpath(notebook, target.parent)).as_posix()
    beside = Path("notebooks", f"{notebook.stem}.html")
    return beside.as_posix() if (out_dir / beside).is_file() else None


def _after(beginning: str, lines: list[str]) -> str:
    """The rest of the first line that begins so."""
    return next((line.removeprefix(beginning) for line in lines if line.startswith(beginning)), "")


def with_emphasis(markdown: str) -> Markup:
    return Markup(re.sub(r"\*(.+?)\*", r"<em>\1</em>", str(escape(markdown))))
