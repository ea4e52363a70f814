"""One denoising step as one module: U-Net, classifier-free guidance and the sampler update.

Compiling the whole step makes it one enqueue on every backend, and the same arithmetic everywhere. Everything that
differs between requests (timestep, sampler coefficients, guidance) is a per-row input, so requests at different steps
and with different samplers can share a batch; the rows of a guided request find each other by index.
"""

import torch
from torch import Tensor, nn

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.step_interface import HISTORY
from qdm_deploy.samplers.columns import LEARNED_VARIANCE_COEFFICIENTS

__all__ = ["StepGraph"]

_ALL_BUT_ROWS = (1, 2, 3)


class StepGraph(nn.Module):
    """The outputs of a denoiser's interface from its inputs, in its order.

    ``qdm_deploy.samplers.columns`` has the update and ``qdm_deploy.samplers.step`` the same in numpy; e is the guided
    output ``e_u + guidance (e - e_u)`` (Ho and Salimans 2022, eq. 6 with w = guidance - 1), rescaled as Lin et al. 2023
    (arXiv 2305.08891, eq. 15 and 16) where the interface has a rescale. A learned variance scales the noise by exp of
    half the interpolated log-variance (Nichol and Dhariwal 2021, eq. 15).
    """

    def __init__(self, net: nn.Module, denoiser: Denoiser) -> None:
        """Build the step around ``net``: a network or a simulation of one, (sample, timestep, **conditions)."""
        super().__init__()
        self.net = net
        self.interface = denoiser.interface
        self.learned_variance = denoiser.learned_variance

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one step on the inputs in the order of the interface."""
        given = dict(zip(self.interface.input_names, inputs, strict=True))
        conditions = {spec.name: given[spec.name] for spec in self.interface.conditions}
        output = self.net(given["sample"], given["timestep"], **conditions)
        if conditions:
            output = _guided(output, given)
        next_sample, x0, next_history = self._updated(output, given)
        if conditions:
            owner = given["owner_row"]
            next_sample, x0, next_history = (
                torch.index_select(value, 0, owner) for value in (next_sample, x0, next_history)
            )
        return next_sample, x0, next_history

    def _updated(self, output: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        columns = [column.reshape(-1, 1, 1, 1) for column in given["coefficients"].unbind(1)]
        k = dict(zip(LEARNED_VARIANCE_COEFFICIENTS, columns, strict=False))
        sample, history = given["sample"], given["history"]
        noise = k["d"] * given["noise"]
        if self.learned_variance:
            output, variance = output.chunk(2, dim=1)
            fraction = (variance + 1) * 0.5
            noise = noise * torch.exp(0.5 * (fraction * k["log_var_max"] + (1 - fraction) * k["log_var_min"]))
        x0 = torch.minimum(torch.maximum(k["p"] * sample + k["q"] * output, -k["clip"]), k["clip"])
        h0, h1, h2 = history.chunk(HISTORY, dim=1)
        next_sample = k["a"] * sample + k["b"] * x0 + k["g"] * output
        next_sample = next_sample + k["c0"] * h0 + k["c1"] * h1 + k["c2"] * h2 + noise
        push = k["u"] * x0 + k["v"] * output + k["w"] * h0
        return next_sample, x0, torch.cat([push, h0, h1], dim=1)


def _guided(output: Tensor, given: dict[str, Tensor]) -> Tensor:
    unconditional = torch.index_select(output, 0, given["unconditional_row"])
    guided = unconditional + given["guidance"].reshape(-1, 1, 1, 1) * (output - unconditional)
    if "guidance_rescale" not in given:
        return guided
    share = given["guidance_rescale"].reshape(-1, 1, 1, 1)
    # A row that does nothing has an output of zeros perhaps, and a ratio of spreads all the same.
    ratio = _spread(output) / torch.clamp(_spread(guided), min=1e-12)
    return guided * (1 + share * (ratio - 1))


def _spread(values: Tensor) -> Tensor:
    """Standard deviation of each row, [B, 1, 1, 1]."""
    centred = values - values.mean(_ALL_BUT_ROWS, keepdim=True)
    count = values.shape[1] * values.shape[2] * values.shape[3]
    return torch.sqrt((centred * centred).sum(_ALL_BUT_ROWS, keepdim=True) / (count - 1))
