"""What a user can ask of a build; refused here, before any work starts, when it cannot be done."""

from dataclasses import dataclass, field
from pathlib import Path

from qdm_deploy.artifacts.plan import TARGETS, Target
from qdm_deploy.artifacts.recipe import Recipe
from qdm_deploy.choices import one_of, within
from qdm_deploy.errors import InputError
from qdm_deploy.samplers import SAMPLERS

__all__ = ["BuildOptions"]

_MAX_STEPS = 10_000
# Leaves room behind it for the seeds of the calibration and of the verdict.
_MAX_BUILD_SEED = 2**62


@dataclass(frozen=True)
class BuildOptions:
    """From a checkpoint to a bundle.

    Attributes:
        out: the bundle's folder.
        model: a diffusers folder or a Hugging Face id; None is the embedded Fashion-MNIST model.
        recipe: how it is quantized (``qdm_deploy.building.recipe.read_recipe``).
        targets: graphs to emit.
        engines: compute capabilities to cross-build TensorRT-RTX engines for; None builds for 8.9 where the module is
            installed, () builds none.
        sampler, steps, guidance: what the model is calibrated for and judged with.
        seed: first seed of the calibration; the verdict uses seeds far from it.
        conditioning_file: safetensors with ``encoder_hidden_states`` [N, L, D] and, for guidance,
            ``unconditional_hidden_states`` [L, D].
        calibration_file: use this calibration set instead of sampling one.
        save_calibration: keep the calibration set in this file, for ``calibration_file`` of a later build.
        float_graph: keep the unquantized step graph in the bundle.
        verify_samples, verify_steps: size of the paired comparison.
        min_psnr_db, min_eps_sqnr_db, min_speedup: thresholds of the verdict.
        force: replace an existing bundle.
        threads: CPU threads for the measurements; None: all.
        command: the command line, for the record.
    """

    out: Path
    model: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    targets: tuple[Target, ...] = TARGETS
    engines: tuple[str, ...] | None = None
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    conditioning_file: Path | None = None
    calibration_file: Path | None = None
    save_calibration: Path | None = None
    float_graph: bool = True
    verify_samples: int = 16
    verify_steps: int = 20
    min_psnr_db: float = 30.0
    min_eps_sqnr_db: float = 25.0
    min_speedup: float = 1.0
    force: bool = False
    threads: int | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if not self.targets:
            raise InputError(f"no target was given; choose from {', '.join(TARGETS)}")
        for target in self.targets:
            one_of("target", target, TARGETS)
        if len(set(self.targets)) != len(self.targets):
            raise InputError(f"a target is given twice: {', '.join(self.targets)}; give each once")
        if self.engines and "tensorrt" not in self.targets:
            raise InputError(
                f"engines for {', '.join(self.engines)} are built from the target tensorrt, which is not among the "
                f"targets {', '.join(self.targets)}; add it, or build no engines"
            )
        if "onnxruntime" not in self.targets:
            raise InputError("the target onnxruntime is part of every bundle (the CPU fallback); add it to the targets")
        if self.recipe.rest == "bf16" and "tensorrt" not in self.targets:
            raise InputError(
                "the recipe asks for a bf16 rest, which only the target tensorrt has, and it is not among the targets "
                f"{', '.join(self.targets)}; add it, or leave rest at fp16"
            )
        one_of("sampler", self.sampler, SAMPLERS)
        within("steps", self.steps, 1, _MAX_STEPS)
        within("guidance", self.guidance, 0, 100)
        within("seed", self.seed, 0, _MAX_BUILD_SEED)
        within("verify samples", self.verify_samples, 1, 4096)
        within("verify steps", self.verify_steps, 1, _MAX_STEPS)
        within("the PSNR threshold", self.min_psnr_db, 0, 1000)
        within("the SQNR threshold", self.min_eps_sqnr_db, 0, 1000)
        within("the speed-up threshold", self.min_speedup, 0, 1000)
        if self.threads is not None:
            within("threads", self.threads, 1, 1024)
        if self.save_calibration is not None and not self.save_calibration.absolute().parent.is_dir():
            raise InputError(f"the calibration set cannot be saved as {self.save_calibration}: there is no such folder")
        if self.save_calibration is not None and self.save_calibration.exists() and not self.force:
            raise InputError(f"{self.save_calibration} exists; choose another file, or add --force to replace it")
