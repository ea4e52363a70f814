"""What a user can ask of a build; refused here, before any work starts, when it cannot be done."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from qdm_deploy.artifacts.plan import TARGETS, Target
from qdm_deploy.choices import one_of, within
from qdm_deploy.components.sampling import MAX_STEPS
from qdm_deploy.errors import InputError
from qdm_deploy.samplers import SAMPLERS

__all__ = ["BuildOptions"]

_MAX_IMAGES = 100_000
# Leaves room behind it for the seeds of the calibration and of the verdict.
_MAX_BUILD_SEED = 2**62


@dataclass(frozen=True)
class BuildOptions:
    """From a checkpoint to a bundle.

    Attributes:
        out: the bundle's folder.
        model: a diffusers folder or a Hugging Face id; None is the embedded Fashion-MNIST model.
        targets: graphs to emit.
        sampler, steps, guidance: what the model is calibrated for and judged with; None: as the model's own files say
            (``qdm_deploy.components.sampling.run_settings``).
        prompts_file: prompts of a text-conditional model, one a line, a negative one behind a tab; every second line
            calibrates, the others judge. None: the two packaged hundreds.
        strategy, calibration_samples, calibration_steps, ndtc_*: how calibration rows are drawn (``SamplingPlan``).
        calibration_file: use this calibration set instead of sampling one.
        save_calibration: keep the calibration set in this file, for ``calibration_file`` of a later build.
        conditioning_file: safetensors with ``encoder_hidden_states`` [N, L, D] and, for guidance,
            ``unconditional_hidden_states`` [L, D].
        ranges, zero_offset, concat_scales, step_bins: what the plan may use (``PlanOptions``); step_bins is a number,
            or "auto": as many of 1, 2, 4, 8 as pay for themselves.
        upsample_phases: let convolutions that read an upsampled tensor run as four small ones on the CPU targets; costs
            them a bit of their weights' precision.
        channel_scales: "auto" searches a factor k per channel (the fold of skip branches among the candidates) and
            keeps it where the layer then errs less; "free" does so only for inputs where it costs no operation on any
            of ``targets``; "none" leaves only the factors of skip branches.
        from_modelopt: scales of ModelOpt in place of ours: a configuration (``qdm_calibration.modelopt.CONFIGS``), or a
            safetensors file with the state of a network that it quantized; None: ours. There is no z, r or search then.
        keep_fp: INT8 layers to keep in float: "auto" (few, cheap and noisy ones, and what it takes to reach
            ``min_eps_sqnr_db``), "N%" (of the INT8 cost, for as much noise as that removes), "N%time" (the same while
            a step takes at most N percent longer), "none", or names and patterns separated by commas; None is "auto",
            but "none" with scales of ModelOpt.
        sensitivity: measure the noise that each INT8 layer adds, for the report; "auto" and percentages do so anyway.
        weight_bits: 8, or 4: codes of 4 bits in the same INT8 kernels.
        reconstruct: "weights" learns the rounding of the weights block by block (``ReconstructOptions``); "full" then
            learns the scales of the activations too; "none" rounds to nearest.
        reconstruct_iterations: training steps per block, at most.
        output_correction: "auto" takes the part of the output's error that is linear in output and sample away, at each
            timestep, where that lowers the error on other rows; "none" leaves it; None is "auto", but "none" with
            scales of ModelOpt.
        seed: first seed of the calibration; the verdict uses seeds far from it.
        rest: type of what the ``tensorrt`` graph keeps in floating point: "fp16", or "bf16" for models that leave the
            range of float16 (its 8 significant bits cost about as much as INT8 itself).
        engines: compute capabilities to cross-build TensorRT-RTX engines for; None builds for 8.9 where the module is
            installed, () builds none.
        float_graph: keep the unquantized step graph in the bundle.
        verify_samples, verify_steps: size of the paired comparison.
        min_psnr_db, min_eps_sqnr_db, min_speedup: thresholds of the verdict. min_psnr_db None is 30 dB, and for a
            latent model 0, which asks for none.
        force: replace an existing bundle.
        threads: CPU threads for the measurements; None: all.
        command: the command line, for the record.
    """

    out: Path
    model: str | None = None
    targets: tuple[Target, ...] = TARGETS
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    prompts_file: Path | None = None
    strategy: Literal["uniform", "ndtc"] = "uniform"
    calibration_samples: int = 16
    calibration_steps: int = 20
    ndtc_mean: float = 0.4
    ndtc_spread: float = 0.4
    ndtc_count: int = 320
    calibration_file: Path | None = None
    save_calibration: Path | None = None
    conditioning_file: Path | None = None
    ranges: Literal["minmax", "percentile", "mse", "lp"] = "lp"
    zero_offset: bool = True
    upsample_phases: bool = True
    concat_scales: Literal["none", "branch", "split"] = "branch"
    channel_scales: Literal["none", "free", "auto"] = "free"
    step_bins: int | Literal["auto"] = "auto"
    from_modelopt: str | None = None
    keep_fp: str | None = None
    sensitivity: bool = True
    weight_bits: int = 8
    reconstruct: Literal["none", "weights", "full"] = "none"
    reconstruct_iterations: int = 300
    output_correction: Literal["none", "auto"] | None = None
    seed: int = 0
    rest: Literal["fp16", "bf16"] = "fp16"
    engines: tuple[str, ...] | None = None
    float_graph: bool = True
    verify_samples: int = 16
    verify_steps: int = 20
    min_psnr_db: float | None = None
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
        self._check_sampling()
        one_of("calibration strategy", self.strategy, ("uniform", "ndtc"))
        one_of("range method", self.ranges, ("minmax", "percentile", "mse", "lp"))
        one_of("concat scales", self.concat_scales, ("none", "branch", "split"))
        one_of("channel scales", self.channel_scales, ("none", "free", "auto"))
        within("calibration samples", self.calibration_samples, 1, _MAX_IMAGES)
        within("calibration steps", self.calibration_steps, 1, MAX_STEPS)
        within("ndtc count", self.ndtc_count, 1, _MAX_IMAGES)
        within("ndtc mean", self.ndtc_mean, 0, 1)
        within("ndtc spread", self.ndtc_spread, 0.001, 1)
        self._check_step_bins()
        if self.from_modelopt is not None:
            _refuse_beside_modelopt(self)
        one_of("weight bits", str(self.weight_bits), ("8", "4"))
        one_of("reconstruction", self.reconstruct, ("none", "weights", "full"))
        one_of("output correction", self.corrected_output, ("none", "auto"))
        within("reconstruct iterations", self.reconstruct_iterations, 1, 100_000)
        one_of("rest", self.rest, ("fp16", "bf16"))
        if self.rest == "bf16" and "tensorrt" not in self.targets:
            raise InputError(
                "a bf16 rest was asked for, which only the target tensorrt has, and it is not among the targets "
                f"{', '.join(self.targets)}; add it, or leave the rest at fp16"
            )
        within("seed", self.seed, 0, _MAX_BUILD_SEED)
        within("verify samples", self.verify_samples, 1, 4096)
        within("verify steps", self.verify_steps, 1, MAX_STEPS)
        if self.min_psnr_db is not None:
            within("the PSNR threshold", self.min_psnr_db, 0, 1000)
        within("the SQNR threshold", self.min_eps_sqnr_db, 0, 1000)
        within("the speed-up threshold", self.min_speedup, 0, 1000)
        if self.threads is not None:
            within("threads", self.threads, 1, 1024)
        if self.save_calibration is not None and not self.save_calibration.absolute().parent.is_dir():
            raise InputError(f"the calibration set cannot be saved as {self.save_calibration}: there is no such folder")
        if self.save_calibration is not None and self.save_calibration.exists() and not self.force:
            raise InputError(f"{self.save_calibration} exists; choose another file, or add --force to replace it")

    @property
    def float_choice(self) -> str:
        """``keep_fp``, or what stands for None."""
        return self.keep_fp or ("auto" if self.from_modelopt is None else "none")

    @property
    def corrected_output(self) -> str:
        """``output_correction``, or what stands for None."""
        return self.output_correction or ("auto" if self.from_modelopt is None else "none")

    def _check_sampling(self) -> None:
        if self.sampler is not None:
            one_of("sampler", self.sampler, SAMPLERS)
        if self.steps is not None:
            within("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            within("guidance", self.guidance, 0, 100)

    def _check_step_bins(self) -> None:
        if isinstance(self.step_bins, str):
            if self.step_bins != "auto":
                raise InputError(f"step bins is {self.step_bins!r}; give a number from 1 to 32, or auto")
        else:
            within("step bins", self.step_bins, 1, 32)


def _refuse_beside_modelopt(options: BuildOptions) -> None:
    default = {field.name: field.default for field in fields(BuildOptions)}
    asked = {
        name.replace("_", " "): getattr(options, name) != default[name]
        for name in (
            "ranges",
            "zero_offset",
            "upsample_phases",
            "concat_scales",
            "channel_scales",
            "step_bins",
            "weight_bits",
        )
    }
    if any(asked.values()):
        raise InputError(
            f"scales from ModelOpt ({options.from_modelopt}) were asked for together with "
            f"{', '.join(name for name, given in asked.items() if given)}, which choose our own; leave one out"
        )
