"""The section on layers: what stays in float and why, and the numbers of each layer."""

from collections.abc import Mapping, Sequence
from html import escape

from pydantic import JsonValue

from qdm_deploy.report.markup import breakable, decibels, percent, plain, precision_name, section, span_of, table, words
from qdm_deploy.report.model import LayerRow

__all__ = ["layer_section"]

_OPEN_ROWS = 12
_HEAD = (
    "layer",
    "noise share",
    "precision",
    "scale s",
    "offset z",
    "branch factors k",
    "step gains r",
    "weight SQNR",
    "why",
)


def layer_section(layers: Sequence[LayerRow], summary: Mapping[str, JsonValue]) -> str:
    """Tables of the layers, those that add most noise first where that was measured; empty without layers."""
    if not layers:
        return ""
    floats = [layer for layer in layers if layer.precision == "float"]
    kept = _kept(floats)
    about = " · ".join(f"{words(name)}: {plain(value)}" for name, value in summary.items())
    measured = [layer for layer in layers if layer.noise_share is not None]
    ordered = sorted(layers, key=lambda layer: -1.0 if layer.noise_share is None else layer.noise_share, reverse=True)
    noisiest = ""
    if measured:
        rows = [_layer(layer)[:-1] for layer in ordered[:_OPEN_ROWS] if layer.noise_share is not None]
        noisiest = f"<h3>The layers that add most noise</h3>{table(_HEAD[:-1], rows, style='noisiest')}"
    every = table(_HEAD, [_layer(layer) for layer in ordered], style="layers")
    order = ", most noise first" if measured else ""
    return section(
        "Layers",
        f"<p>{escape(about)}</p>{noisiest}"
        + (f"<h3>In floating point</h3>{kept}" if floats else "")
        + f'<details class="long"><summary>All {len(layers)} layers{order}</summary>{every}</details>',
    )


def _kept(floats: Sequence[LayerRow]) -> str:
    """Layers by the reason why they stay in floating point; a model has dozens of them for one reason."""
    reasons: dict[str, list[str]] = {}
    for layer in floats:
        reasons.setdefault(layer.reason, []).append(layer.name)
    rows = [
        (reason, breakable(names[0]) if len(names) == 1 else f"{len(names)} layers: {names[0]} to {names[-1]}")
        for reason, names in reasons.items()
    ]
    return table(("why", "stays in floating point"), rows, style="kept")


def _layer(layer: LayerRow) -> tuple[str, ...]:
    return (
        breakable(layer.name),
        percent(layer.noise_share),
        precision_name(layer.precision),
        "–" if layer.scale is None else f"{layer.scale:.4g}",
        "–" if layer.scale is None else str(layer.zero_offset),
        span_of(layer.branch_factors),
        span_of(layer.step_gains),
        decibels(layer.weight_sqnr_db),
        layer.reason or " ".join(f"{name}: {note}" for name, note in layer.notes.items()),
    )
