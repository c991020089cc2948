"""Executed notebooks as HTML to read: no script and nothing that is fetched, formulas as MathML."""

from __future__ import annotations

import posixpath
import re
from html import escape
from pathlib import Path

import nbformat
from jinja2 import pass_context
from jinja2.runtime import Context
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from selfrepair.store.files import unreadable, write_atomically

TEMPLATE = Path(__file__).with_name("notebook_page.html")

#: What is shown of an output that comes in several forms: the first of these that it has.
FORMS = ("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain")
#: Letters of a word in upright type, which the converter of formulas writes one by one.
UPRIGHT_LETTERS = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')
#: Addresses that a page of a results folder can lead to, and those of other notebooks.
ELSEWHERE, NEIGHBOUR = re.compile(r"^(\w+:|#)"), re.compile(r"^([\w.-]+)\.ipynb(?=#|$)")


def write_notebook_pages(out_dir: Path) -> list[Path]:
    """Writes each executed notebook of a results folder as HTML beside it, and returns those files.

    The same notebook gives the same bytes, whenever and in whatever folder it was run.

    Raises:
        UserError: a notebook that cannot be read.
    """
    sources = sorted((out_dir / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    read = [_read(path) for path in sources]
    titles = [_title(notebook, path.stem) for notebook, path in zip(read, sources, strict=True)]
    names = [f"{path.stem}.html" for path in sources]
    around = [None, *zip(names, titles, strict=True), None]
    exporter = _Exporter(
        raw_template=TEMPLATE.read_text(encoding="utf-8"),
        config=Config({"NbConvertBase": {"display_data_priority": list(FORMS)}}),
    )
    style = HtmlFormatter().get_style_defs(".highlight")
    for number, (path, notebook, title) in enumerate(zip(sources, read, titles, strict=True)):
        page = {"title": title, "before": around[number], "after": around[number + 2], "code_style": style}
        html, _ = exporter.from_notebook_node(_as_read(notebook), resources={"page": page})
        write_atomically(path.with_suffix(".html"), html.encode())
    return [path.with_suffix(".html") for path in sources]


def caption(figure: str) -> str:
    """What a figure shows, by its name: ``01_self_repair_by_depth``, or of a model ``07_multiverse-gpt2``."""
    name, _, model = re.sub(r"^\d\d_", "", figure).partition("-")
    return name.replace("_", " ").capitalize() + (f" of {model}" if model else "")


def _read(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # of many types
        raise unreadable(path, error) from error


def _title(notebook: nbformat.NotebookNode, stem: str) -> str:
    lines = (
        line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
    )
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), stem)


def _as_read(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what JupyterLab hides; pictures say what they show."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            hidden, tags = cell.metadata.get("jupyter", {}), cell.metadata.get("tags", [])
            if hidden.get("source_hidden") or "remove-input" in tags:  # as nbconvert's own preprocessor does
                cell.metadata["transient"] = {"remove_source": True}
            if hidden.get("outputs_hidden"):
                cell.outputs = []
            if "injected-parameters" in tags:  # the folder is where the reader is
                cell.source = re.sub(r"^out_dir = .*\n?", "", cell.source, flags=re.MULTILINE)
            _describe(cell)
        cells.append(cell)
    return nbformat.from_dict({**notebook, "cells": cells})


def _describe(cell: nbformat.NotebookNode) -> None:
    """Gives pictures the captions of the figures that the cell saves, in their order."""
    captions = [caption(name) for name in re.findall(r'"(\d\d_\w+)"', cell.source)]
    pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    for number, picture in enumerate(pictures):
        text = captions[number] if number < len(captions) else "Figure"
        picture.metadata["image/png"] = {"alt": text, **picture.metadata.get("image/png", {})}


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML, tables in boxes of their own, and links to notebooks as HTML."""

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{_mathml(body, "block")}</span>'

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def table(self, text: str) -> str:
        return f'<div class="scroll"><table>\n{text}</table></div>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if not (ELSEWHERE.match(url) or NEIGHBOUR.match(url)):  # a file of the repository, perhaps far away
            return f"{text} (<code>{escape(posixpath.normpath(f'notebooks/{url}'))}</code>)"
        return super().link(text, NEIGHBOUR.sub(r"\1.html", url), title)


class _Exporter(HTMLExporter):
    """nbconvert's, but for what :class:`_Renderer` does."""

    @pass_context
    def markdown2html(self, context: Context, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        return MarkdownWithMath(_Renderer(escape=False, attachments=attachments)).render(source)


def html_of(markdown: str) -> Markup:
    """Markdown with formulas as HTML for another page: links are their text, HTML in it is shown as text."""
    return Markup(re.sub(r"</?a\b[^>]*>", "", MarkdownWithMath(_Renderer(escape=True)).render(markdown)))


def _mathml(tex: str, display: str) -> str:
    """A formula of TeX as MathML; as it is written if the converter does not know it."""
    try:
        formula = convert(tex.replace("{aligned}", "{split}"), display=display)  # the one it knows of the two
    except Exception:  # of many types
        return f"<code>{escape(tex)}</code>"
    return UPRIGHT_LETTERS.sub(lambda letters: f"<mi>{re.sub('<.*?>', '', letters[0])}</mi>", formula)
