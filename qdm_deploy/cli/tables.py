"""Values as people read them, and tables of them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_deploy.report.model import EngineRow

__all__ = ["db", "print_engines", "print_table", "share", "size", "span"]

_DASH = "-"


def db(value: float | None) -> str:
    """Decibels with one decimal."""
    return _DASH if value is None else f"{value:.1f} dB"


def share(value: float | None) -> str:
    """A share of 1 in percent: "0.3 %", "12.5 %"."""
    return _DASH if value is None else f"{100 * value:.1f} %"


def size(count: int) -> str:
    """Bytes with the unit that fits: "812 B", "35.1 MB"."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1e3, "kB"
    for larger in ("MB", "GB", "TB"):
        if value >= 999.95:
            value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"


def span(values: tuple[float, float] | None) -> str:
    """A range of factors: "0.25-4"; a dash where there are none."""
    if values is None:
        return _DASH
    low, high = (f"{value:.3g}" for value in values)
    return low if low == high else f"{low}-{high}"


def print_table(console: "Console", heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table without lines; a column is right-aligned when its name starts with ">". Nothing for no rows."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=not console.is_terminal,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if table.row_count:
        console.print(f"\n{heading}", style="bold")
        console.print(table, soft_wrap=False)


def print_engines(console: "Console", engines: Iterable["EngineRow"]) -> None:
    """The audit of TensorRT engines, and every layer in them that is not INT8 as planned."""
    engines = tuple(engines)
    print_table(
        console,
        "TensorRT engines",
        ("library", ">SM", ">INT8 layers", ">built in"),
        (
            (
                row.backend,
                row.sm,
                f"{row.int8} of {row.planned}",
                f"{row.build_seconds:.1f} s",
            )
            for row in engines
        ),
    )
    for row in engines:
        for failure in row.failures:
            console.print(f"  not INT8 on SM {row.sm}: {failure}", style="red")
