"""What a build or a comparison found out, as one value: what the HTML page shows and ``report.json`` holds.

Bytes are bytes, times are milliseconds or seconds, errors are decibels (``metrics`` defines them); names say which.
"""

from statistics import fmean
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, JsonValue, ValidationError, model_validator

from qdm_deploy.artifacts.plan import LayerPlan, Target
from qdm_deploy.errors import InputError
from qdm_deploy.report.ranges import InputRanges
from qdm_deploy.report.sensitivity import NoiseBlock
from qdm_deploy.report.value import Count, Decibels, NotNegative, Number, Positive, Share, Value

__all__ = [
    "SCHEMA_VERSION",
    "CheckRow",
    "EngineRow",
    "LayerRow",
    "QualityRow",
    "Report",
    "RewriteRow",
    "SizeBlock",
    "SpeedRow",
    "Thresholds",
    "Verdict",
]

SCHEMA_VERSION: Literal["1.0"] = "1.0"

Backend = Literal["onnxruntime", "openvino", "simulation"]


class QualityRow(Value):
    """One target's graph beside the float model, on the same seeds.

    Attributes:
        target: whose graph ran.
        backend: what it ran on; "simulation" computes the target's arithmetic without its runtime.
        samples, steps, sampler, guidance: how the samples were made.
        timesteps: [S], in the order in which they run.
        eps_sqnr_db: [S], the model's output at each step, both fed the float run's sample (teacher-forced).
        state_sqnr_db: [S], the sample after each step, each run fed its own (free-running).
        psnr_db: one per finished image, [-1, 1] shown as [0, 1]; empty for latents, which are no pixels.
        max_abs: largest absolute difference between the finished samples.
    """

    target: Target
    backend: Backend
    samples: Annotated[int, Field(gt=0)]
    steps: Annotated[int, Field(gt=0)]
    sampler: str
    guidance: Number
    timesteps: Annotated[tuple[Count, ...], Field(min_length=1)]
    eps_sqnr_db: tuple[Decibels, ...]
    state_sqnr_db: tuple[Decibels, ...]
    psnr_db: tuple[Decibels, ...] = ()
    max_abs: NotNegative

    @model_validator(mode="after")
    def _one_value_per_step_and_image(self) -> Self:
        for name in ("eps_sqnr_db", "state_sqnr_db"):
            if (count := len(getattr(self, name))) != len(self.timesteps):
                raise ValueError(f"{name} has {count} values for {len(self.timesteps)} timesteps")
        if self.psnr_db and len(self.psnr_db) != self.samples:
            raise ValueError(f"psnr_db has {len(self.psnr_db)} values for {self.samples} samples")
        return self

    @property
    def label(self) -> str:
        """The target, and what it ran on where that is something else."""
        return self.target if self.backend == self.target else f"{self.target} ({self.backend})"

    @property
    def eps_sqnr_mean_db(self) -> float:
        """Mean over the steps."""
        return fmean(self.eps_sqnr_db)

    @property
    def eps_sqnr_min_db(self) -> float:
        """The worst step's."""
        return min(self.eps_sqnr_db)

    @property
    def worst_timestep(self) -> int:
        """The timestep of ``eps_sqnr_min_db``, the first of them."""
        return self.timesteps[self.eps_sqnr_db.index(self.eps_sqnr_min_db)]

    @property
    def state_sqnr_final_db(self) -> float:
        """The finished samples'."""
        return self.state_sqnr_db[-1]

    @property
    def psnr_mean_db(self) -> float | None:
        """Mean over the images; None where there are none."""
        return fmean(self.psnr_db) if self.psnr_db else None

    @property
    def psnr_min_db(self) -> float | None:
        """The worst image's; None where there are none."""
        return min(self.psnr_db, default=None)


class SpeedRow(Value):
    """Time of one denoising step.

    Attributes:
        backend: the runtime.
        precision: the graph that ran.
        batch: samples per step.
        median_ms, p95_ms: over ``runs`` timed steps, warm-up left out.
        runs: how many steps were timed.
    """

    backend: str
    precision: Literal["int8", "float"]
    batch: Annotated[int, Field(gt=0)]
    median_ms: Positive
    p95_ms: Positive
    runs: Annotated[int, Field(gt=0)]

    @property
    def samples_per_second(self) -> float:
        """Denoising steps per second, times the batch."""
        return 1000.0 * self.batch / self.median_ms


class SizeBlock(Value):
    """Bytes on disk, graph and weights together.

    Attributes:
        float_bytes: of the float model.
        int8_bytes: of each target's INT8 graph.
    """

    float_bytes: Annotated[int, Field(gt=0)]
    int8_bytes: dict[str, Annotated[int, Field(gt=0)]]


class EngineRow(Value):
    """One TensorRT engine and what its compiled kernels really compute.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        sm: the GPU architecture it was built for, like "8.9".
        planned: layers that shall be INT8.
        int8: those of them that are.
        kernels: how many kernels of each kind there are.
        build_seconds: how long the build took.
        failures: one sentence for each planned layer that is not INT8.
    """

    backend: str
    sm: str
    planned: Count
    int8: Count
    kernels: dict[str, int]
    build_seconds: NotNegative
    failures: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether every planned layer is INT8, and there is one at all."""
        return 0 < self.planned == self.int8 and not self.failures


class CheckRow(Value):
    """One check that either holds or not."""

    name: str
    ok: bool
    detail: str


class RewriteRow(Value):
    """One rewriting of a target's graph, counted.

    Attributes:
        target: whose graph; "float" for the reference.
        name: what is rewritten, such as "norms".
        done: places that were rewritten.
        expected: places that the float graph promises, less those that a rule leaves alone.
        missed: one sentence for each promised place that was not rewritten.
        left: one sentence for each rule that leaves places as they are.
    """

    target: Target | Literal["float"]
    name: str
    done: Count
    expected: Count
    missed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def count(self) -> str:
        """Like "norms 61 of 61"."""
        return f"{self.name} {self.done} of {self.expected}"


class LayerRow(Value):
    """One layer of the quantization plan, for reading.

    Attributes:
        name: module path.
        precision: "int8" or "float".
        reason: why it stays in floating point; empty for "int8".
        scale: s of its input; None for a float layer.
        zero_offset: z of its input, in steps of s.
        branch_factors: smallest and largest k; None where k is 1.
        step_gains: smallest and largest r; None where the layer is static.
        weight_sqnr_db: of the dequantized weight against the float one.
        noise_share: part of the noise of all INT8 layers that this one adds; None where it was not measured.
        notes: what was decided on "s", "z", "k", "r", and why.
    """

    name: str
    precision: Literal["int8", "float"]
    reason: str = ""
    scale: Positive | None = None
    zero_offset: int = 0
    branch_factors: tuple[Positive, Positive] | None = None
    step_gains: tuple[Positive, Positive] | None = None
    weight_sqnr_db: Decibels | None = None
    noise_share: Share | None = None
    notes: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def from_plan(cls, plan: LayerPlan, noise_share: float | None = None) -> Self:
        """The row of one layer of a plan."""
        inverse_k, inverse_r = plan.inverse_k, plan.inverse_r
        return cls(
            name=plan.name,
            precision=plan.precision,
            reason=plan.reason,
            scale=plan.scale if plan.precision == "int8" else None,
            zero_offset=plan.zero_offset,
            branch_factors=None if inverse_k is None else (1 / float(inverse_k.max()), 1 / float(inverse_k.min())),
            step_gains=None if inverse_r is None else (1 / float(inverse_r.max()), 1 / float(inverse_r.min())),
            weight_sqnr_db=plan.weight_sqnr_db,
            noise_share=noise_share,
            notes=dict(plan.notes),
        )


class Thresholds(Value):
    """What a bundle must reach to be shipped.

    Attributes:
        min_psnr_db: mean PSNR of the finished images.
        min_eps_sqnr_db: mean SQNR of the model's output over the steps.
        min_speedup: float time over INT8 time; 0 asks for none.
    """

    min_psnr_db: Number = 30.0
    min_eps_sqnr_db: Number = 25.0
    min_speedup: NotNegative = 1.0


class Verdict(Value):
    """Ship or not, and why: one plain sentence for each reason.

    Attributes:
        ship: whether there is no problem.
        problems: what speaks against it.
        merits: what speaks for it.
        thresholds: what was asked for.
    """

    ship: bool
    problems: tuple[str, ...]
    merits: tuple[str, ...]
    thresholds: Thresholds

    @model_validator(mode="after")
    def _ship_without_problems(self) -> Self:
        if self.ship == bool(self.problems):
            raise ValueError(f"ship is {self.ship} with {len(self.problems)} problems")
        return self

    @property
    def headline(self) -> str:
        """SHIP or DO NOT SHIP."""
        return "SHIP" if self.ship else "DO NOT SHIP"

    @property
    def reasons(self) -> tuple[str, ...]:
        """All sentences, the problems first."""
        return self.problems + self.merits


class Report(Value):
    """Everything that one build measured.

    Attributes:
        schema_version: of this format.
        created: when, with a time zone.
        command: the command line that made it; None when Python called.
        versions: of qdm-deploy and the libraries.
        machine: the environment card (``machine.machine_card``).
        model: the model spec, as JSON.
        recipe: every option, seeds included, as JSON.
        seeds: first and last seed of the calibration's trajectories and of the verdict's samples; empty where unknown.
        plan_summary: how many layers do what.
        layers: the plan, layer by layer.
        inputs: what calibration saw at each shared input, over the timesteps.
        noise: how much noise each layer adds, and what keeping layers in float would give; None: not measured.
        rewrites: what was done to each target's graph.
        warnings: what was asked for and not reached, one sentence each; it speaks for itself, not for or against SHIP.
        quality, speed, engines, checks: one row each per measurement.
        speedup: float median over INT8 median of one step on the backend at hand; None where it was not measured.
        size: bytes on disk.
        stage_seconds: how long each stage of the build took, in order.
        verdict: ship or not.
    """

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    created: AwareDatetime
    command: str | None = None
    versions: dict[str, str]
    machine: dict[str, JsonValue]
    model: dict[str, JsonValue]
    recipe: dict[str, JsonValue]
    seeds: dict[str, tuple[Count, Count]] = Field(default_factory=dict)
    plan_summary: dict[str, JsonValue]
    layers: tuple[LayerRow, ...] = ()
    inputs: tuple[InputRanges, ...] = ()
    noise: NoiseBlock | None = None
    rewrites: tuple[RewriteRow, ...] = ()
    warnings: tuple[str, ...] = ()
    quality: tuple[QualityRow, ...] = ()
    speed: tuple[SpeedRow, ...] = ()
    speedup: Positive | None = None
    size: SizeBlock
    engines: tuple[EngineRow, ...] = ()
    checks: tuple[CheckRow, ...] = ()
    stage_seconds: dict[str, NotNegative] = Field(default_factory=dict)
    verdict: Verdict

    def to_json(self) -> str:
        """The report as indented JSON."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What ``to_json`` wrote.

        Raises:
            InputError: it is no report, or of another schema version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"])) or "document"
            raise InputError(
                f"this is not a qdm-deploy report of schema {SCHEMA_VERSION} ({where}: {problem['msg']}); "
                "build the bundle again"
            ) from error
