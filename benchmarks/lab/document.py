"""docs/paper-tables.md from a result: medians and spreads, the papers' numbers, and whether their ordering holds."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from lab.papers import FINDINGS, Finding

__all__ = ["Spread", "document", "merged", "spreads", "verdict"]

_HEAD = """# The papers' tables on the demo model

Made by `python benchmarks/paper_tables.py --document` from {names}; do not edit it here.

The papers measured other models, and judged by the distribution of many images (FID, sFID: lower is better; IS: higher
is better). Here one small model is measured against its own float run, so what can be compared is the order of the
rows, not the numbers."""

_NOT_NUMBERS = ("letter", "row", "calibration_seed")


class Spread(NamedTuple):
    """A number over the calibration seeds."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """The median, and the spread where there is one."""
        return f"{self.median:.2f}" + (f" ({self.low:.2f} to {self.high:.2f})" if self.count > 1 else "")


def spreads(rows: Sequence[Mapping[str, Any]], letter: str) -> dict[str, dict[str, Spread]]:
    """Of one letter: row name to column to spread, in the order of the result."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["letter"] == letter:
            columns = values.setdefault(row["row"], {})
            for name, number in row.items():
                if name not in _NOT_NUMBERS:
                    columns.setdefault(name, []).append(float(number))
    return {
        row: {name: Spread(median(found), min(found), max(found), len(found)) for name, found in columns.items()}
        for row, columns in values.items()
    }


def verdict(finding: Finding, found: Mapping[str, Mapping[str, Spread]]) -> str:
    """One line: whether what the paper says holds for the medians here, and what speaks against it."""
    if finding.at_least is not None:
        below = [row for row, columns in found.items() if columns[finding.metric].median < finding.at_least]
        question = f"Holds here ({finding.metric} of at least {finding.at_least:g} in every row)"
        if not found:
            return f"**{question}: not measured.**"
        return f"**{question}: {'no' if below else 'yes'}.**" + (f" Below it: {', '.join(below)}." if below else "")
    pairs = [pair for chain in finding.chains for pair in pairwise([row for row in chain if row in found])]
    missing = [row for chain in finding.chains for row in chain if row not in found]
    if not pairs:
        return "**Ordering holds here: not measured.**"
    wrong, close = [], []
    for better, worse in pairs:
        first, second = found[better][finding.metric], found[worse][finding.metric]
        if first.median <= second.median:
            wrong.append(f"{better} is not above {worse} ({first.median:.2f} and {second.median:.2f})")
        if first.low <= second.high and second.low <= first.high:
            close.append(f"{better} and {worse}")
    parts = [f"**Ordering holds here: {'no' if wrong else 'yes'}.**"]
    if wrong:
        parts.append(f"{'; '.join(wrong)}.")
    if close:
        parts.append(f"The spreads overlap: {'; '.join(close)}.")
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    return " ".join(parts)


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results as one: the first, with those letters replaced that a later one has.

    ``other_weights`` are those of the letters that were measured with others than the first result's.
    """
    rows, weights = list(results[0]["rows"]), results[0]["weights"]
    others: dict[str, str] = {}
    for result in results[1:]:
        letters = {row["letter"] for row in result["rows"]}
        rows = [row for row in rows if row["letter"] not in letters] + list(result["rows"])
        others = {letter: digest for letter, digest in others.items() if letter not in letters}
        others |= dict.fromkeys(sorted(letters), result["weights"]) if result["weights"] != weights else {}
    return {**results[0], "rows": rows, "other_weights": others}


def document(result: Mapping[str, Any], comments: Mapping[str, str], names: Sequence[str]) -> str:
    """The page in Markdown; ``names`` are the files of the result."""
    files = ", ".join(f"`benchmarks/results/{name}`" for name in names)
    lines = [_HEAD.format(names=files), "", _setting(result)]
    for letter, finding in FINDINGS.items():
        found = spreads(result["rows"], letter)
        lines += ["", f"## ({letter}) {finding.title}", ""]
        if found:
            columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
            lines += _table(
                ["here", *columns],
                [[row, *(str(cells.get(column, "")) for column in columns)] for row, cells in found.items()],
            )
        else:
            lines.append("Not measured.")
        lines += ["", f"Source: {finding.source}", ""]
        if finding.rows:
            lines += _table(
                ["paper", *finding.columns[1:]], [[_paper_cell(cell) for cell in row] for row in finding.rows]
            )
            lines.append("")
        lines += [
            f"The paper: {finding.says}" if finding.rows else f"Expected: {finding.says}",
            "",
            verdict(finding, found),
        ]
        if letter in comments:
            lines += ["", comments[letter].strip()]
    skipped = result.get("skipped") or {}
    if skipped:
        lines += ["", "## Left out", ""] + [f"- {row}: {why}" for row, why in skipped.items()]
    return "\n".join(lines) + "\n"


def _setting(result: Mapping[str, Any]) -> str:
    """How ours were measured."""
    seeds, slow = (", ".join(map(str, result[name])) for name in ("calibration_seeds", "reconstruct_seeds"))
    weights = f"weights `{result['weights'][:12]}`"
    for letter, digest in result.get("other_weights", {}).items():
        weights += f"; in ({letter}) `{digest[:12]}`"
    return f"""Ours: the embedded model as it was then ({weights}), DDIM with {result["steps"]} steps,
{result["seeds"]} unseen seeds, {result["calibration_samples"]} calibration trajectories of
{result["calibration_steps"]} steps. `eps SQNR dB` is the teacher-forced signal-to-noise ratio of the network's output,
the mean over the steps; `last step` is that of the last step. INT8 is the simulation of the target `tensorrt`; in (h)
ModelOpt computes as it does itself, its own fake-quantized network with all its layers, and `onnxruntime` and
`quantize_static` are graphs that ONNX Runtime runs. (d) runs the ancestral sampler and compares images and
states with the float run on the same noise. `Frechet distance` is that of {result["frechet_images"]} pictures to real
ones in the features of the shipped classifier, DDIM with {result["frechet_steps"]} steps, made by the compiled INT8
graph on OpenVINO under calibration seed 0, and `over float` what the float graph on the same seeds has less.
Numbers are medians over the calibration seeds {seeds}
((e): {slow}), with the smallest and the largest behind them. Where a table does not say otherwise, plans have
static scales, ranges by the squared error, and else what `make_plan` does by itself: no searched factors per channel
and no layers kept in float but those that always are."""


def _paper_cell(cell: str | float) -> str:
    return cell if isinstance(cell, str) else f"{cell:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("_", "\\_") for cell in row] for row in [head, *rows]]
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return [f"| {' | '.join(escaped[0])} |", rule, *(f"| {' | '.join(row)} |" for row in escaped[1:])]
