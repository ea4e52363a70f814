"""What the passes of a target did to a graph, held against what the graph promised."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from qdm_deploy.errors import ExportError

__all__ = ["Found", "PassedBy", "Place", "Rewrite", "refuse_missed"]


class Place(NamedTuple):
    """Where a rewriting is expected: a node of the float graph, or a layer; ``module`` is empty for a layer."""

    name: str
    module: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.module})" if self.module else self.name


@dataclass
class Found:
    """What one run of a pass met, by the name of the place.

    Attributes:
        done: where it rewrote.
        missed: where it did not, though it looks like such a place, and why.
        left: where it did not because a rule says so, and which.
    """

    done: list[str] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PassedBy:
    """A place that stayed as it was, and why."""

    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class Rewrite:
    """One rewriting of a target.

    Attributes:
        name: what is counted, such as "norms".
        done: how many places were rewritten.
        expected: how many the float graph promises, less those that a rule leaves alone.
        missed: the promised places that were not rewritten.
        left: the places that a rule leaves alone.
    """

    name: str
    done: int
    expected: int
    missed: tuple[PassedBy, ...] = ()
    left: tuple[PassedBy, ...] = ()

    @classmethod
    def of(cls, name: str, promised: Iterable[Place], found: Found) -> "Rewrite":
        """Hold what was found against what was promised."""
        places = {place.name: place for place in promised}
        left = {place: reason for place, reason in found.left.items() if place not in found.done}
        # Promised nowhere: it only looked like such a place.
        left |= {place: reason for place, reason in found.missed.items() if place not in places}
        missing = [name for name in places if name not in found.done and name not in left]
        nowhere = "no pass met it: the node was removed or renamed before"
        return cls(
            name,
            done=len(found.done),
            expected=len(set(places).union(found.done) - set(left)),
            missed=tuple(PassedBy(places[name], found.missed.get(name, nowhere)) for name in missing),
            left=tuple(PassedBy(places.get(name, Place(name)), reason) for name, reason in left.items()),
        )

    @property
    def rules(self) -> tuple[str, ...]:
        """One sentence for each rule that left places alone: how many, the first of them, and the rule."""
        by_reason: dict[str, list[Place]] = {}
        for each in self.left:
            by_reason.setdefault(each.reason, []).append(each.place)
        return tuple(
            f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {reason}"
            for reason, places in by_reason.items()
        )

    def __str__(self) -> str:
        return f"{self.name} {self.done} of {self.expected}"


def refuse_missed(target: str, rewrites: Iterable[Rewrite]) -> None:
    """Refuse a graph in which a rewriting missed a place that was promised.

    Raises:
        ExportError: it names the first rewriting, its counts, the node and the reason.
    """
    for rewrite in rewrites:
        if rewrite.missed:
            first, *more = rewrite.missed
            others = f" (and {len(more)} more)" if more else ""
            raise ExportError(
                f"{rewrite.name}: {rewrite.done} of {rewrite.expected}; {first}{others}. The {target} graph would "
                "compute the same, more slowly: report the model, or allow what is missed"
            )
