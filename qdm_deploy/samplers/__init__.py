"""Samplers as tables: a noise schedule, a row of coefficients per step, one affine update, reproducible noise."""

from qdm_deploy.samplers.columns import COEFFICIENTS, HISTORY, LEARNED_VARIANCE_COEFFICIENTS, NO_CLIP, column
from qdm_deploy.samplers.noise import initial_noise, step_noise
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.scheduler_config import default_sampler
from qdm_deploy.samplers.step import apply_step
from qdm_deploy.samplers.table import SAMPLERS, StepTable, first_step_of_strength, step_table

__all__ = [
    "COEFFICIENTS",
    "HISTORY",
    "LEARNED_VARIANCE_COEFFICIENTS",
    "NO_CLIP",
    "SAMPLERS",
    "NoiseSchedule",
    "StepTable",
    "apply_step",
    "column",
    "default_sampler",
    "first_step_of_strength",
    "initial_noise",
    "step_noise",
    "step_table",
]
