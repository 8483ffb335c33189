"""Markdown that GitHub and MkDocs both render."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ASSETS = "assets:"
"""How the path of a picture begins; `site` knows where that is, seen from the page."""


def table(headings: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first `left` columns are text; the others are flush right."""
    rules = ["---" if i < left else "---:" for i in range(len(headings))]
    rows = (headings, rules, *lines)
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def folded(title: str, content: str) -> str:
    """Return what opens when its title is clicked on."""
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{content}\n\n</details>'


def picture(name: str, alt: str) -> str:
    """Return a chart, in the version for the page's colours."""
    alt = alt.replace('"', "&quot;")
    return "\n".join(
        (
            "<picture>",
            f'<source media="(prefers-color-scheme: dark)" srcset="{ASSETS}{name}-dark.png">',
            f'<img alt="{alt}" src="{ASSETS}{name}.png">',
            "</picture>",
        )
    )


def paragraphs(*parts: str) -> str:
    """Return what there is, with blank lines between."""
    return "\n\n".join(part for part in parts if part)


def bullets(sentences: Iterable[str]) -> str:
    """Return a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def code(text: object) -> str:
    """Return an identifier."""
    return f"`{text}`"
