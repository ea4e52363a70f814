"""One denoising step as one module: U-Net, classifier-free guidance and the sampler update.

Compiling the whole step makes it one enqueue on every backend, and the same arithmetic everywhere. Everything that
differs between requests (timestep, sampler coefficients, guidance) is a per-row input, so requests at different steps
and with different samplers can share a batch; the rows of a guided request find each other by index.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdm_deploy.artifacts.model_spec import ModelSpec

__all__ = ["OUTPUTS", "StepGraph", "StepInput", "step_inputs"]

OUTPUTS = ("next_sample", "x0")


@dataclass(frozen=True)
class StepInput:
    """One input of the step graph: name, dtype and the shape of one row."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def step_inputs(spec: ModelSpec) -> tuple[StepInput, ...]:
    """The inputs of the step graph of a model, in order; the first axis of each is the batch."""
    inputs = [
        StepInput("sample", torch.float32, spec.sample_shape),
        StepInput("timestep", torch.int64, ()),
        StepInput("coefficients", torch.float32, (spec.num_coefficients,)),
        StepInput("noise", torch.float32, spec.sample_shape),
        StepInput("previous_x0", torch.float32, spec.sample_shape),
    ]
    for conditioning in spec.conditioning:
        inputs.append(StepInput(conditioning.name, getattr(torch, conditioning.dtype), conditioning.shape))
    if spec.conditional:
        inputs.append(StepInput("guidance", torch.float32, ()))
        inputs.append(StepInput("unconditional_row", torch.int64, ()))
        inputs.append(StepInput("owner_row", torch.int64, ()))
    return tuple(inputs)


class StepGraph(nn.Module):
    """x_t to x_{t'}: ``next_sample``, ``x0`` [B, C, H, W] float32 from the inputs that ``step_inputs`` lists.

    ``x0 = clip(p x + q e, -clip, clip)`` and ``next = a x + b x0 + c previous_x0 + d noise``, where e is the guided
    output ``e_u + guidance (e - e_u)`` (Ho and Salimans 2022, eq. 6 with w = guidance - 1). A learned variance scales
    the noise by exp of half the interpolated log-variance (Nichol and Dhariwal 2021, eq. 15).
    """

    def __init__(self, net: nn.Module, spec: ModelSpec) -> None:
        """Build the step around ``net``: a ``UNet`` or a simulation of one, (sample, timestep, **conditioning)."""
        super().__init__()
        self.net = net
        self.spec = spec
        self.input_names = tuple(item.name for item in step_inputs(spec))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step on the inputs in the order of ``input_names``."""
        given = dict(zip(self.input_names, inputs, strict=True))
        sample, coefficients = given["sample"], given["coefficients"]
        conditioning = {item.name: given[item.name] for item in self.spec.conditioning}
        output = self.net(sample, given["timestep"], **conditioning)
        if self.spec.conditional:
            unconditional = torch.index_select(output, 0, given["unconditional_row"])
            guidance = given["guidance"].reshape(-1, 1, 1, 1)
            output = unconditional + guidance * (output - unconditional)
        columns = [column.reshape(-1, 1, 1, 1) for column in coefficients.unbind(1)]
        p, q, clip, a, b, c, d = columns[:7]
        noise = d * given["noise"]
        if self.spec.learned_variance:
            output, variance = output.chunk(2, dim=1)
            fraction = (variance + 1) * 0.5
            noise = noise * torch.exp(0.5 * (fraction * columns[8] + (1 - fraction) * columns[7]))
        x0 = torch.minimum(torch.maximum(p * sample + q * output, -clip), clip)
        next_sample = a * sample + b * x0 + c * given["previous_x0"] + noise
        if self.spec.conditional:
            next_sample = torch.index_select(next_sample, 0, given["owner_row"])
            x0 = torch.index_select(x0, 0, given["owner_row"])
        return next_sample, x0
