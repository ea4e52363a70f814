"""What a user can ask of an evaluation; refused here, before any work starts, when it cannot be done."""

from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.errors import InputError
from qdm_deploy.pipeline.options import one_of, within
from qdm_deploy.samplers import SAMPLERS

__all__ = ["EvaluateOptions"]

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class EvaluateOptions:
    """Is a bundle's INT8 model (B) as good as a reference (A)?

    Attributes:
        bundle: the bundle that is judged.
        against: "fp32" for its own float graph, or the folder of another bundle.
        num: pictures of each that are compared with real ones.
        paired: how many of their seeds are compared picture by picture.
        sampler, steps, seed, guidance: what is run.
        conditioning_file: as in ``BuildOptions``.
        features: a classifier's folder; None takes the one that is shipped, where it fits the model.
        backend, threads, batch_size: what runs it.
        cache: folder for samples and features; None takes the user's cache.
        out: JSON file for the result; None writes none.
        force: replace an existing ``out``.
    """

    bundle: Path
    against: str = "fp32"
    num: int = 1000
    paired: int = 64
    sampler: str = "ddim"
    steps: int = 20
    seed: int = 0
    guidance: float = 1.0
    conditioning_file: Path | None = None
    features: Path | None = None
    backend: str = "auto"
    threads: int | None = None
    batch_size: int = 16
    cache: Path | None = None
    out: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        one_of("sampler", self.sampler, SAMPLERS)
        within("the number of images", self.num, 8, 100_000)
        within("the number of paired seeds", self.paired, 2, 4096)
        within("steps", self.steps, 1, 10_000)
        within("batch size", self.batch_size, 1, 1024)
        within("seed", self.seed, 0, _MAX_SEED - max(self.num, self.paired))
        within("guidance", self.guidance, 0, 100)
        if self.threads is not None:
            within("threads", self.threads, 1, 1024)
        if self.out is not None and self.out.exists() and not self.force:
            raise InputError(f"{self.out} exists; choose another file, or add --force to replace it")
