"""Samplers as tables: a noise schedule, a row of coefficients per step, one affine update, reproducible noise."""

from qdm_deploy.samplers.noise import initial_noise, step_noise
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.step import apply_step
from qdm_deploy.samplers.table import SAMPLERS, StepTable, step_table

__all__ = ["SAMPLERS", "NoiseSchedule", "StepTable", "apply_step", "initial_noise", "step_noise", "step_table"]
