"""Options of ``build`` that are keys of a recipe now: they say so, for one release."""

from collections.abc import Callable
from typing import Any, NoReturn

import click

from qdm_deploy.errors import InputError

__all__ = ["KEYS", "moved_options"]

KEYS = {
    "--calib-samples": "calibration.samples",
    "--calib-steps": "calibration.steps",
    "--strategy": "calibration.strategy",
    "--ndtc-mean": "calibration.mean",
    "--ndtc-spread": "calibration.spread",
    "--ndtc-count": "calibration.count",
    "--ranges": "activations.ranges and weights.ranges",
    "--concat-scales": "activations.concat_scales",
    "--channel-scales": "activations.channel_factors",
    "--step-bins": "activations.step_bins",
    "--weight-bits": "weights.bits",
    "--reconstruct": "weights.reconstruct",
    "--reconstruct-iterations": "weights.iterations",
    "--from-modelopt": "from_modelopt",
    "--keep-fp": "keep_fp",
    "--output-correction": "output_correction",
    "--rest": "rest",
    "--no-zero-offset": "activations.zero_offset",
    "--no-upsample-phases": "weights.upsample_phases",
    "--no-sensitivity": "sensitivity",
}


def moved_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the hidden options; each is refused with the key that replaces it."""

    def refuse(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        # A flag that is not given is False.
        if value:
            _refuse(parameter.opts[0])

    for name in KEYS:
        flag = name.startswith("--no-")
        command = click.option(name, hidden=True, expose_value=False, is_flag=flag, callback=refuse)(command)
    return click.option("--no-engines", hidden=True, expose_value=False, is_flag=True, callback=_no_engines)(command)


def _refuse(name: str) -> NoReturn:
    raise InputError(
        f'{name} is a key of the recipe now: {KEYS[name]}. Write it to a file that begins with base = "default", and '
        "give the file with --recipe; `qdm-deploy recipe show default` prints every key"
    )


def _no_engines(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        raise InputError("--no-engines is --engines none now")
