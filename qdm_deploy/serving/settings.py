"""What the engine process is started with, and what its exit statuses mean."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

__all__ = ["EXIT_BROKEN", "EXIT_OUT_OF_MEMORY", "Settings"]

EXIT_OUT_OF_MEMORY = 5
EXIT_BROKEN = 70


@dataclass(frozen=True)
class Settings:
    """What the engine process is started with; ``ProcessEngine`` explains each."""

    bundle: str
    backend: str = "auto"
    precision: Literal["int8", "float"] = "int8"
    threads: int | None = None
    max_rows: int = 8
    deterministic: bool = False

    def chosen(self, backend: str) -> "Settings":
        """The same with what ``"auto"`` became: timed anew for the next child, a seed might make another image."""
        return replace(self, backend=backend) if self.backend == "auto" else self

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        return asdict(self)
