"""One row of a table, and where its results are kept."""

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdm_deploy.artifacts.files import new_file

if TYPE_CHECKING:
    from lab.laboratory import Laboratory

__all__ = ["Row", "RowCache", "Skipped", "code_version"]


class Skipped(Exception):
    """A row that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Row:
    """A line of a table before it is measured.

    Attributes:
        letter: of its table.
        name: its first column.
        options: everything that decides its numbers beside the seeds (JSON values).
        measure: its numbers by column, from the laboratory of one calibration seed; raises ``Skipped``.
        cost: about how many network evaluations it takes, for the estimate of the time left.
    """

    letter: str
    name: str
    options: Mapping[str, Any]
    measure: "Callable[[Laboratory], dict[str, float]]"
    cost: int = field(compare=False)


class RowCache:
    """Finished rows, one JSON file each; nothing is kept without a folder."""

    def __init__(self, folder: Path | None, common: Mapping[str, Any]) -> None:
        """``common``: what all rows depend on: weights, code, sizes of the run (JSON values)."""
        self.folder, self.common = folder, dict(common)

    def key(self, row: Row, seed: int) -> str:
        """Hex digest of everything that the row's numbers depend on."""
        identity = {
            **self.common,
            "letter": row.letter,
            "row": row.name,
            "options": dict(row.options),
            "calibration_seed": seed,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]

    def read(self, row: Row, seed: int) -> dict[str, float] | None:
        """The numbers of a finished row; None if it is not there."""
        path = self._path(row, seed)
        if path is None or not path.is_file():
            return None
        numbers: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["numbers"]
        return numbers

    def write(self, row: Row, seed: int, numbers: Mapping[str, float]) -> None:
        """Keep a finished row; the file appears whole or not at all."""
        path = self._path(row, seed)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"letter": row.letter, "row": row.name, "calibration_seed": seed, "numbers": dict(numbers)}
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")

    def _path(self, row: Row, seed: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{row.letter}-{self.key(row, seed)}.json"


def code_version(sources: "list[Path]") -> str:
    """Digest of what those modules do: a change of comments, docstrings or layout does not change it."""
    digest = hashlib.sha256()
    for path in sorted(sources):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                ast.get_docstring(node, clean=False) is not None
            ):
                node.body = node.body[1:]
        digest.update(f"{path.name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()
