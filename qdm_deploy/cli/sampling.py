"""The options of every command that makes samples, in one place and in the same words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qdm_deploy.cli.verb import option

__all__ = ["DEFAULTS", "SAMPLER_NAMES", "sampling_options"]

F = TypeVar("F", bound=Callable[..., Any])

SAMPLER_NAMES = (
    "ddim, ddpm, pndm, lms, euler, euler-a, dpmpp-2m, dpmpp-2m-sde, dpmpp-3m, dpmpp-3m-sde, unipc, deis, lcm or tcd."
)

# What ``qdm_deploy.components.sampling.run_settings`` chooses.
DEFAULTS = {
    "sampler": "[default: ddim; of latents the scheduler file's]",
    "steps": "[default: 50; lcm and tcd 4]",
    "guidance": "[default: 1; of prompts 7.5]",
}


def sampling_options(*, steps: int | None = None) -> Callable[[F], F]:
    """Adds what ``qdm_deploy.components.sampling.SamplingOptions`` holds.

    Args:
        steps: default number of denoising steps; None leaves it to the sampler.
    """
    added = [
        option("--sampler", metavar="NAME", section="Sampling", help=f"{SAMPLER_NAMES}  {DEFAULTS['sampler']}"),
        option(
            "--steps",
            type=int,
            default=steps,
            section="Sampling",
            help="Denoising steps." if steps else f"Denoising steps.  {DEFAULTS['steps']}",
        ),
        option(
            "--eta",
            type=float,
            default=0.0,
            section="Sampling",
            help="Fresh noise in each step of ddim or tcd: 0 (none) to 1 (as much as ddpm).",
        ),
        option(
            "--guidance",
            type=float,
            section="Sampling",
            help=f"Scale of classifier-free guidance; 1 is none.  {DEFAULTS['guidance']}",
        ),
        option(
            "--guidance-rescale",
            type=float,
            default=0.0,
            section="Sampling",
            help="How far guidance gives back contrast that it added, 0 to 1; text models only.",
        ),
        option(
            "--conditioning",
            "conditioning_file",
            type=click.Path(path_type=Path),
            section="Sampling",
            help="Safetensors file with the states that a model without an encoder is conditioned on.",
        ),
    ]

    def decorate(command: F) -> F:
        for each in reversed(added):
            command = each(command)
        return command

    return decorate
