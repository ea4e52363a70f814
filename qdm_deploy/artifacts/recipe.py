"""A recipe: every choice of how a model is quantized, as one value. Here are the defaults, and nowhere else.

A recipe says nothing of the model, the targets or the thresholds: those are of one build (``BuildOptions``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Activations",
    "ChannelFactorsMode",
    "LayerChoice",
    "LayerRule",
    "RangeMethod",
    "Recipe",
    "SamplingPlan",
    "Weights",
]

RangeMethod = Literal["minmax", "percentile", "mse", "lp"]
ChannelFactorsMode = Literal["none", "free", "auto"]
Bits = Literal[8, 4]

# What a plan of ModelOpt's scales takes from them.
_OUR_WEIGHTS = ("bits", "ranges", "upsample_phases")

_Rows = Annotated[int, Field(ge=1, le=100_000)]
_Steps = Annotated[int, Field(ge=1, le=10_000)]
_Ratio = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class _Section(BaseModel):
    """Immutable; an unknown key or a value of another type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SamplingPlan(_Section):
    """How calibration rows are drawn from the sampler's own trajectories."""

    strategy: Literal["uniform", "ndtc"] = Field(
        "uniform", description="timesteps: evenly spread, or normally distributed as in PTQ4DM"
    )
    samples: _Rows = Field(16, description="trajectories of the full-precision model")
    steps: _Steps = Field(20, description="for uniform: how many of the sampler's steps each of them gives")
    count: _Rows = Field(320, description="for ndtc: rows drawn in all")
    mean: Annotated[float, Field(ge=0, le=1)] = Field(0.4, description="for ndtc: as a fraction of all timesteps")
    spread: Annotated[float, Field(gt=0, le=1)] = Field(0.4, description="for ndtc: likewise")


class Activations(_Section):
    """The grids of the activations, and the factors that are folded into them."""

    ranges: RangeMethod = Field(
        "lp", description="how the scale follows from the histogram; lp (p = 2.4) and mse search, mse clips more"
    )
    zero_offset: bool = Field(True, description="grids may lie unevenly around zero")
    step_bins: Annotated[int, Field(ge=1, le=32)] | Literal["auto"] = Field(
        "auto",
        description="timestep bins with a gain of their own; 1 is none, auto as many of 2, 4, 8 as pay for themselves",
    )
    gain_ratio: _Ratio = Field(1.3, description="a gain is left out where the range moves less than this many times")
    channel_factors: ChannelFactorsMode = Field(
        "free", description="scales per input channel: none, where they help, or of those only where they cost nothing"
    )
    concat_scales: Literal["none", "branch", "split"] = Field(
        "branch", description="at skip concatenations: one scale, one per branch, or one kernel per branch"
    )
    branch_ratio: _Ratio = Field(
        1.25, description="branches share a scale where their ranges differ less than this many times"
    )


class Weights(_Section):
    """The weights: their bits, their scales and how they are rounded."""

    bits: Bits = Field(8, description="4 run in the same INT8 kernels, and need reconstruct to stay close to the model")
    ranges: RangeMethod = Field("lp", description="as for activations; minmax and percentile clip nothing")
    reconstruct: Literal["none", "weights", "full"] = Field(
        "none",
        description="learn how weights are rounded (AdaRound), block by block; full: activation scales (LSQ) too",
    )
    iterations: Annotated[int, Field(ge=1, le=100_000)] = Field(
        300, description="training steps of each block, at most"
    )
    upsample_phases: bool = Field(
        True, description="convolutions behind an upsampling run as four small ones on CPUs: faster, a bit less precise"
    )


class LayerRule(_Section):
    """What holds for some layers; a key that is left out is as in the sections above. Later rules win."""

    match: Annotated[str, Field(min_length=1)] = Field(description="a layer's name, or a pattern with * ? [...]")
    precision: Literal["float", "int8"] | None = Field(None, description="int8: keep_fp leaves it alone")
    bits: Bits | None = Field(None, description="of the weights")
    ranges: RangeMethod | None = Field(None, description="of the activations")
    zero_offset: bool | None = Field(None, description="of the activations")
    channel_factors: ChannelFactorsMode | None = Field(None, description="of the activations")


@dataclass(frozen=True)
class LayerChoice:
    """What a recipe says of one layer.

    Attributes:
        precision: as a rule says; None: no rule does.
        bits: of its weights.
        ranges, zero_offset, channel_factors: of its input.
    """

    precision: Literal["float", "int8"] | None
    bits: Bits
    ranges: RangeMethod
    zero_offset: bool
    channel_factors: ChannelFactorsMode


class Recipe(_Section):
    """How a model is quantized."""

    from_modelopt: str = Field(
        "none", description="scales of NVIDIA ModelOpt in place of ours: a configuration, or a file of its quantizers"
    )
    keep_fp: str = Field(
        "auto",
        description="layers to keep in float: auto (few, cheap and noisy ones, and what the SQNR threshold takes), "
        "none, N% (of the INT8 cost), N%time (of a step's time), or names and patterns a,b*",
    )
    sensitivity: bool = Field(True, description="measure each layer's noise for the report; keep_fp may need it anyway")
    output_correction: bool = Field(
        True, description="subtract the linear part of the output's error at each timestep, where held-out rows agree"
    )
    rest: Literal["fp16", "bf16"] = Field(
        "fp16", description="type around the INT8 kernels on tensorrt; bf16 for models that fp16 overflows"
    )
    calibration: SamplingPlan = SamplingPlan()
    activations: Activations = Activations()
    weights: Weights = Weights()
    layers: Annotated[tuple[LayerRule, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _modelopt_chooses_by_itself(self) -> Self:
        if self.from_modelopt == "none":
            return self
        default = Weights()
        ours = {
            "activations": self.activations != Activations(),
            **{f"weights.{key}": getattr(self.weights, key) != getattr(default, key) for key in _OUR_WEIGHTS},
            "layers": any(rule.model_dump(exclude={"match", "precision"}, exclude_none=True) for rule in self.layers),
        }
        if any(ours.values()):
            keys = ", ".join(key for key, given in ours.items() if given)
            raise ValueError(f"from_modelopt is {self.from_modelopt}, and {keys} choose our own scales; leave one out")
        return self

    def with_keys(self, values: Mapping[str, Any]) -> Self:
        """The recipe with other values, by dotted key: ``{"weights.bits": 4}``.

        Raises:
            ValidationError: a key or value is not known.
        """
        document = self.model_dump()
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            (document[section] if section else document)[name] = value
        return self.model_validate(document)

    def document(self) -> dict[str, Any]:
        """The recipe as JSON, for the record: a file of ModelOpt's quantizers by its name alone."""
        document = self.model_dump(mode="json", exclude_none=True)
        return {**document, "from_modelopt": PurePath(self.from_modelopt).name}

    def layer(self, name: str) -> LayerChoice:
        """What holds for the layer of that name."""
        said: dict[str, object] = {}
        for rule in self.layers:
            if fnmatchcase(name, rule.match):
                said |= rule.model_dump(exclude={"match"}, exclude_none=True)
        inputs = self.activations
        return LayerChoice(
            **{
                "precision": None,
                "bits": self.weights.bits,
                "ranges": inputs.ranges,
                "zero_offset": inputs.zero_offset,
                "channel_factors": inputs.channel_factors,
                **said,
            }  # type: ignore[arg-type]
        )
