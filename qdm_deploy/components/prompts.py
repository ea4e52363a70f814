r"""Weights in prompts, as Stable Diffusion's user interfaces write them.

``(word)`` multiplies the weight of what it holds by 1.1, ``[word]`` divides it by 1.1, ``(word:1.2)`` multiplies it by
1.2. Brackets may stand in each other; ``\(``, ``\)``, ``\[``, ``\]`` and ``\\`` are the characters themselves.
A bracket that is not closed reaches to the end; one that was not opened is a character.
"""

import math
import re
from dataclasses import dataclass

from qdm_deploy.errors import InputError

__all__ = ["PromptOptions", "weighted_parts"]

_FACTOR = 1.1
_LARGEST = 100.0
_PIECE = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.0-9]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How prompts are read.

    Attributes:
        clip_skip: layers of the text encoders to leave out at their end: none (0 or None), or one.
        weighting: brackets in prompts are weights (``weighted_parts``) and not text.

    Raises:
        InputError: another number of layers.
    """

    clip_skip: int | None = None
    weighting: bool = False

    def __post_init__(self) -> None:
        """Refuse what no text encoder can do."""
        if self.clip_skip not in (None, 0, 1):
            raise InputError(f"clip_skip {self.clip_skip!r} is not supported; choose 0 or 1")


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """A prompt as texts with their weights, in order; neighbours of the same weight are one.

    Raises:
        InputError: a weight is no number from -100 to 100.
    """
    parts: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        parts[start:] = [(text, weight * factor) for text, weight in parts[start:]]

    for found in _PIECE.finditer(prompt):
        piece, number = found[0], found[1]
        if piece in opened:
            opened[piece].append(len(parts))
        elif number is not None and opened["("]:
            weigh(opened["("].pop(), _number(number))
        elif piece == ")" and opened["("]:
            weigh(opened["("].pop(), _FACTOR)
        elif piece == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / _FACTOR)
        else:
            parts.append((piece[1:] if piece[0] == "\\" and len(piece) == 2 else piece, 1.0))
    for start in opened["("]:
        weigh(start, _FACTOR)
    for start in opened["["]:
        weigh(start, 1 / _FACTOR)
    return _joined(parts)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _LARGEST:
        raise InputError(f"{text!r} is no weight of a prompt; give a number from {-_LARGEST:g} to {_LARGEST:g}")
    return value


def _joined(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined
