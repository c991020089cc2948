"""Text of others, such as a model's name, in the Markdown that we write."""

from __future__ import annotations

#: What means something to Markdown, HTML or MathJax.
SPECIAL = frozenset("&<>`*~[]|\\$")


def plain(text: str) -> str:
    """The text as one line of Markdown that shows it as it is: no tag, link or formula comes of it."""
    return "".join(f"&#{ord(c)};" if c in SPECIAL else c for c in " ".join(text.split()))
