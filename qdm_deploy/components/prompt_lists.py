"""Lists of prompts, each with an optional negative one: those that come with the product, and those of a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from qdm_deploy.errors import InputError

__all__ = ["PromptList", "packaged_prompts", "read_prompts"]

_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class PromptList:
    """Prompts in order; ``negatives`` has a None where a prompt stands alone."""

    prompts: tuple[str, ...]
    negatives: tuple[str | None, ...]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def in_turn(self, count: int, first: int = 0) -> tuple[list[str], list[str | None]]:
        """Prompts and negatives of ``count`` images from number ``first`` on; after the last comes the first again."""
        index = [number % len(self) for number in range(first, first + count)]
        return [self.prompts[number] for number in index], [self.negatives[number] for number in index]

    def every_second(self, first: Literal[0, 1]) -> "PromptList":
        """Half of them: the even or the odd ones; a list of one stays whole."""
        if len(self) == 1:
            return self
        return PromptList(self.prompts[first::2], self.negatives[first::2])


@cache
def packaged_prompts(purpose: Literal["calibration", "measuring"]) -> PromptList:
    """The hundred prompts that come with the product for a purpose; no prompt serves both."""
    text = (files("qdm_deploy") / "data" / "prompts" / f"{purpose}.tsv").read_text(encoding="utf-8")
    return _parse(text.splitlines(), purpose)


def read_prompts(path: Path) -> PromptList:
    """Prompts from a text file: one a line, a negative one behind a tab; empty lines do not count.

    Raises:
        InputError: there is no such file, it is no text, holds no prompt, or a line has two tabs.
    """
    if not path.is_file():
        raise InputError(f"there is no file of prompts {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes; a file of prompts has {_MOST_BYTES} at most")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return _parse(lines, str(path))


def _parse(lines: Sequence[str], name: str) -> PromptList:
    prompts: list[str] = []
    negatives: list[str | None] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, *rest = line.split("\t")
        if len(rest) > 1:
            raise InputError(f"line {number} of {name} has {len(rest)} tabs; write a prompt, or PROMPT<tab>NEGATIVE")
        prompts.append(prompt.strip())
        negatives.append(rest[0].strip() if rest else None)
    if not prompts:
        raise InputError(f"{name} holds no prompt; write one a line")
    return PromptList(tuple(prompts), tuple(negatives))
