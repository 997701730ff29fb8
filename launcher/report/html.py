"""Small pieces of HTML; every text that is not `Html` is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: str) -> str:
    """`value` as HTML."""
    return value if isinstance(value, Html) else escape(value)


def table(caption: str, heads: Sequence[str], looks: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names its rows.

    looks: the CSS class per column; n for numbers, t for what must not wrap, d for details.
    """
    head = "".join(
        f'<th scope="col" class="{look}">{text(name)}</th>' for name, look in zip(heads, looks, strict=True)
    )
    body = "".join(f"<tr>{_cells(row, looks)}</tr>" for row in rows)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def details(summary: str, body: str) -> str:
    """A part of the page that is folded away."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def section(title: str, *parts: str) -> str:
    """A titled part of the page."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def note(value: str, look: str = "soft") -> str:
    """A sentence in a quiet colour."""
    return f'<p class="{look}">{text(value)}</p>'


def _cells(row: Sequence[str], looks: Sequence[str]) -> str:
    first, *rest = (f'class="{look}">{text(cell)}' for cell, look in zip(row, looks, strict=True))
    return f'<th scope="row" {first}</th>' + "".join(f"<td {cell}</td>" for cell in rest)
