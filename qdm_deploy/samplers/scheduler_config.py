"""What a diffusers ``scheduler_config.json`` says, checked: its keys, the defaults of its class, the sampler it means.

A key that the file leaves out takes the default of the scheduler class that runs, as in diffusers: of the file's own
class for the noise levels and the clipping, of the chosen sampler's class for the spacing.
"""

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.betas import BetaSchedule

__all__ = [
    "PredictionType",
    "SchedulerConfig",
    "SigmaSchedule",
    "SolverOptions",
    "SolverType",
    "TimestepSpacing",
    "VarianceType",
    "default_sampler",
    "read_scheduler_config",
]

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
SolverType = Literal["midpoint", "heun", "logrho", "bh1", "bh2"]
SigmaSchedule = Literal["spaced", "karras", "exponential", "beta"]

# The sampler of each class, and values that the class assumes when its config leaves the key out. Classes without a
# clip never clip: DDIM's own default (clip to [-1, 1]) would destroy the latents of a model that was published with
# one of them.
_LATENT_BETAS: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLASS_DEFAULTS: dict[str, dict[str, object]] = {
    "DDPMScheduler": {"clip_sample": True},
    "DDIMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"skip_prk_steps": False},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "LCMScheduler": _LATENT_BETAS,
    "TCDScheduler": _LATENT_BETAS,
}
_CLASS_SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
_DPM_SOLVERS = {
    ("dpmsolver++", 2): "dpmpp-2m",
    ("dpmsolver++", 3): "dpmpp-3m",
    ("sde-dpmsolver++", 2): "dpmpp-2m-sde",
    ("sde-dpmsolver++", 3): "dpmpp-3m-sde",
}
# Classes that call the network twice a step, and the offered class that comes nearest.
_NEAREST_CLASSES = {
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "DPMSolverMultistepScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerAncestralDiscreteScheduler",
    "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler with algorithm_type 'sde-dpmsolver++'",
    "DPMSolverSinglestepScheduler": "DPMSolverMultistepScheduler",
}


class SolverOptions(BaseModel):
    """Keys that mean something to some samplers; each looks at those that its diffusers class has."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # PNDM
    skip_prk_steps: bool = True
    # LCM and TCD
    original_inference_steps: int = Field(default=50, ge=1)
    timestep_scaling: float = Field(default=10.0, gt=0)
    # Whatever walks sigmas
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_min: float | None = Field(default=None, gt=0)
    sigma_max: float | None = Field(default=None, gt=0)
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    # DPM-Solver, UniPC and DEIS
    beta_schedule: BetaSchedule = "linear"
    solver_order: int = Field(default=2, ge=1)
    solver_type: SolverType | None = None
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: object = None

    @property
    def sigma_schedule(self) -> SigmaSchedule:
        """How the sigmas of a solver are laid."""
        if self.use_karras_sigmas:
            return "karras"
        if self.use_exponential_sigmas:
            return "exponential"
        return "beta" if self.use_beta_sigmas else "spaced"


class SchedulerConfig(SolverOptions):
    """All keys that matter here; a diffusers config carries many more.

    None stands for a key that is not written and whose default depends on the sampler.
    """

    num_train_timesteps: int = Field(default=1000, ge=1)
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    variance_type: VarianceType = "fixed_small"
    thresholding: bool = False
    clip_sample: bool = False
    clip_sample_range: float = Field(default=1.0, gt=0)
    set_alpha_to_one: bool | None = None
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = Field(default=0, ge=0)
    use_flow_sigmas: bool = False
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"] = "dpmsolver++"


def read_scheduler_config(config: Mapping[str, object]) -> SchedulerConfig:
    """Read and check a diffusers scheduler config.

    Args:
        config: Contents of ``scheduler_config.json``. Missing keys and nulls take the defaults of its class.

    Returns:
        The checked keys.

    Raises:
        InputError: The class is unknown, a value is of the wrong type or unknown, or the config asks for dynamic
            thresholding, for flow matching or for two sigma schedules at once.
    """
    name = _class_of(config)
    given = {key: value for key, value in config.items() if value is not None}
    try:
        known = SchedulerConfig.model_validate({**_CLASS_DEFAULTS[name], **given})
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"the scheduler config has {key}={first['input']!r}: {first['msg']}; correct scheduler_config.json"
        ) from err
    if known.thresholding:
        raise InputError(
            "the scheduler config has thresholding=True; a step must be affine in the image, and dynamic "
            "thresholding is not: set thresholding to false (clip_sample may stay)"
        )
    if known.use_flow_sigmas:
        raise InputError(
            "the scheduler config has use_flow_sigmas=True: the model learned flow matching, and the samplers here "
            "walk a diffusion process; take a diffusion model"
        )
    if known.use_karras_sigmas + known.use_exponential_sigmas + known.use_beta_sigmas > 1:
        raise InputError(
            "the scheduler config sets more than one of use_karras_sigmas, use_exponential_sigmas and "
            "use_beta_sigmas; leave one of them true"
        )
    return known


def default_sampler(config: Mapping[str, object]) -> str:
    """The sampler that a scheduler config itself stands for; its options are those of the config.

    Args:
        config: Contents of ``scheduler_config.json``.

    Returns:
        One of ``SAMPLERS``.

    Raises:
        InputError: The config cannot be read, or is a solver that is not offered.
    """
    name = _class_of(config)
    known = read_scheduler_config(config)
    if name != "DPMSolverMultistepScheduler":
        return _CLASS_SAMPLERS[name]
    algorithm = "dpmsolver++" if known.algorithm_type == "deis" else known.algorithm_type
    if (algorithm, known.solver_order) not in _DPM_SOLVERS:
        raise InputError(
            f"the scheduler config has algorithm_type={known.algorithm_type!r} and solver_order={known.solver_order}; "
            "offered are 'dpmsolver++' and 'sde-dpmsolver++' of order 2 and 3: name the sampler yourself, "
            f"{'dpmpp-2m-sde' if algorithm.startswith('sde') else 'dpmpp-2m'!r} is the nearest"
        )
    return _DPM_SOLVERS[algorithm, known.solver_order]


def _class_of(config: Mapping[str, object]) -> str:
    name = config.get("_class_name")
    if isinstance(name, str) and name in _CLASS_DEFAULTS:
        return name
    nearest = _NEAREST_CLASSES.get(name) if isinstance(name, str) else None
    raise InputError(
        f"the scheduler config is of class {name!r}; known are {', '.join(_CLASS_DEFAULTS)}: "
        + (f"the nearest is {nearest}" if nearest else "save the model with one of these schedulers")
        + " (from_config of its own scheduler)"
    )
