"""What a user can ask of the verbs; refused here, before any work starts, when it cannot be done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qdm_deploy.choices import one_of, within
from qdm_deploy.components.sampling import SamplingOptions
from qdm_deploy.errors import InputError

__all__ = ["CompareOptions", "GenerateOptions"]

_MAX_SEED = 2**63 - 1
_MAX_IMAGES = 100_000
_MAX_BATCH = 1024


@dataclass(frozen=True)
class GenerateOptions(SamplingOptions):
    """From a bundle to pictures.

    Attributes:
        bundle: the bundle's folder.
        out: folder of the pictures; must not exist, unless ``force``.
        count: how many pictures; picture i has seed ``seed`` + i.
        prompt: what every picture shows: text, or name or number of a class; None: packaged prompts or all classes in
            turn.
        negative_prompt: what none of them shows; None: nothing, or what belongs to a prompt that was taken in turn.
        prompts_file: prompts to take in turn, one a line, a negative one behind a tab.
        clip_skip, weighting: how prompts are read (``qdm_deploy.components.prompts.PromptOptions``).
        output: "images", or "latents": the finished samples, as one safetensors file.
        backend, precision, threads: what runs it; "auto" is the fastest here, timed once.
        batch_size: samples per step of the network.
        force: replace pictures of an earlier run.
    """

    bundle: Path
    out: Path
    count: int = 16
    seed: int = 0
    prompt: str | None = None
    negative_prompt: str | None = None
    prompts_file: Path | None = None
    clip_skip: int | None = None
    weighting: bool = False
    output: Literal["images", "latents"] = "images"
    backend: str = "auto"
    precision: Literal["auto", "int8", "float"] = "auto"
    batch_size: int = 16
    force: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        super().__post_init__()
        one_of("output", self.output, ("images", "latents"))
        if self.prompts_file is not None and (self.prompt, self.negative_prompt) != (None, None):
            raise InputError("a prompt and a file of prompts were given; give one of them")
        within("the number of images", self.count, 1, _MAX_IMAGES)
        within("batch size", self.batch_size, 1, _MAX_BATCH)
        within("seed", self.seed, 0, _MAX_SEED - self.count)


@dataclass(frozen=True)
class CompareOptions(SamplingOptions):
    """The same seeds through two bundles, backends or precisions; A is the reference.

    Attributes:
        a, b: bundle folders; they may be the same.
        backend_a, backend_b, precision_a, precision_b: what runs each.
        samples, seed: how many are made, and the first one's seed.
        out: PNG file for the picture strip A | B | difference; None writes none.
        force: replace an existing ``out``.
    """

    a: Path
    b: Path
    backend_a: str = "auto"
    backend_b: str = "auto"
    precision_a: Literal["int8", "float"] = "int8"
    precision_b: Literal["int8", "float"] = "int8"
    samples: int = 16
    seed: int = 0
    out: Path | None = None
    force: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        super().__post_init__()
        within("samples", self.samples, 1, 4096)
        within("seed", self.seed, 0, _MAX_SEED - self.samples)
        if self.out is not None and self.out.exists() and not self.force:
            raise InputError(f"{self.out} exists; choose another file, or add --force to replace it")
