"""Small pieces of the page: tables, figures, pictures, numbers with units. Plain text is escaped here."""

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

from pydantic import JsonValue

__all__ = [
    "MARKS",
    "Html",
    "breakable",
    "decibels",
    "figure",
    "image",
    "megabytes",
    "milliseconds",
    "pairs",
    "percent",
    "plain",
    "precision_name",
    "script_safe",
    "section",
    "span_of",
    "table",
    "words",
]

MARKS = {True: '<span class="mark good">✓</span>', False: '<span class="mark bad">✗</span>'}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def breakable(name: str) -> Html:
    """A module path that a narrow table may break behind its dots."""
    return Html(escape(name).replace(".", ".<wbr>"))


def section(title: str, content: str) -> str:
    """A section of the page; ``content`` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def figure(title: str, about: str, chart: str, legend: str = "") -> str:
    """A chart with its heading and a line about it; ``chart`` and ``legend`` are HTML."""
    return f"<figure><h3>{escape(title)}</h3><p>{escape(about)}</p>{chart}{legend}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """A table whose cells are escaped unless they are HTML already."""
    titles = "".join(f"<th scope=col>{escape(title)}</th>" for title in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if isinstance(cell, Html) else escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    rows_of_all = f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{style}">{rows_of_all}</table></div>'


def pairs(items: Iterable[tuple[str, JsonValue]], style: str = "") -> str:
    """Names and JSON values below each other."""
    each = "".join(f"<div><dt>{escape(words(k))}</dt><dd>{escape(plain(v))}</dd></div>" for k, v in items)
    return f'<dl class="{style}">{each}</dl>'


def plain(value: JsonValue) -> str:
    """A JSON value as a reader would write it."""
    if value is None:
        return "–"
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def image(png: bytes, alternative: str) -> str:
    """A picture within the page."""
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{b64encode(png).decode()}">'


def words(name: str) -> str:
    """An identifier as words."""
    return name.replace("_", " ")


def precision_name(precision: str) -> str:
    """A precision as readers know it."""
    return "INT8" if precision == "int8" else precision


def decibels(value: float | None) -> str:
    """Decibels to a tenth, or a dash."""
    return "–" if value is None else f"{value:.1f} dB"


def span_of(values: tuple[float, float] | None) -> str:
    """Smallest and largest value, or a dash."""
    return "–" if values is None else f"{values[0]:.3g} to {values[1]:.3g}"


def percent(share: float | None) -> str:
    """A share of 1 in percent, to about two digits, or a dash."""
    if share is None:
        return "–"
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def milliseconds(value: float) -> str:
    """A time, to about three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f} ms"


def megabytes(size: int) -> str:
    """A number of bytes in units of 10⁶."""
    return f"{size / 1e6:.{0 if size >= 100e6 else 1 if size >= 1e6 else 3}f} MB"


def script_safe(text: str) -> str:
    """JSON that can stand in a script element: no ``<`` could end it or open a comment."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
