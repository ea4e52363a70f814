"""The quantization plan: every decision, as data, before any graph is touched.

A quantized layer computes, per output channel o (T: timestep bin, c: input channel)::

    x_c  ~  r_T * k_c * s * (q_c + z)          q in [-128, 127]
    y_o  =  r_T * w_o * s * sum_c Q_oc (q_c + z)  +  b_o    b: the layer's own, corrected or not

Scales are exact in float16, so that a float16 engine and a float32 runtime use the same numbers and the same codes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.files import canonical_json, new_file
from qdm_deploy.artifacts.record import read_record, write_record
from qdm_deploy.artifacts.topology import Layer, Topology
from qdm_deploy.errors import InputError

__all__ = ["TARGETS", "LayerPlan", "QuantizationPlan", "Target", "activation_levels"]

# What a graph is emitted for. ``openvino-amx`` is the form for CPUs that multiply bfloat16; its integers are openvino's.
Target = Literal["onnxruntime", "openvino", "openvino-amx", "tensorrt"]
TARGETS: tuple[Target, ...] = ("onnxruntime", "openvino", "openvino-amx", "tensorrt")

_KIND = "qdm-quantization-plan"
_VERSION = 2
_ARRAYS = (
    "inverse_k",
    "inverse_r",
    "weight_codes",
    "weight_scale",
    "output_scale",
    "output_zero_point",
    "bias_correction",
)


def activation_levels(bits: int) -> tuple[int, int]:
    """The smallest and the largest activation code of that many bits: -128 and 127 at 8.

    Raises:
        InputError: not 4 to 8 bits.
    """
    if not 4 <= bits <= 8:
        raise InputError(f"activations of {bits} bits were asked for; choose 4 to 8 (only 8 can be deployed)")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer, and why.

    Attributes:
        layer: the layer's place in the network.
        precision: "int8" or "float".
        reason: why it stays in floating point; empty for "int8".
        scale: s, the activation scale; > 0, exact in float16.
        zero_offset: z, the grid's offset in steps of s, in [-127, 128] at 8 bits; 0 for a symmetric grid.
        inverse_k: 1 / k per input channel, [C] float32, exact in float16; None where k is 1.
        inverse_r: 1 / r per timestep bin, [K] float32 in (0, 1], exact in float16; None where the layer is static.
        weight_codes: Q, int8 in [-127, 127], in PyTorch's layout; of W * k.
        weight_scale: w, [O] float32, exact in float16.
        output_scale, output_zero_point: of the layer's result before r and the bias that follows it, [O] float32 and
            [O] uint8; only where a target quantizes outputs (convolutions).
        bias_correction: [O] float32, added to the layer's bias (0 where it has none); None where nothing is corrected.
        notes: one sentence per factor ("s", "z", "k", "r", "w", "b") on what was decided and why.
        weight_sqnr_db: of the dequantized weight against the float one.
        weight_bits: 8, or 4 where Q lies in [-7, 7]; Q is int8 in both cases.
        activation_bits: b; q lies in [-2**(b - 1), 2**(b - 1) - 1]. Only 8 can be emitted, fewer are simulated.
    """

    layer: Layer
    precision: Literal["int8", "float"]
    reason: str = ""
    scale: float = 0.0
    zero_offset: int = 0
    inverse_k: NDArray[np.float32] | None = None
    inverse_r: NDArray[np.float32] | None = None
    weight_codes: NDArray[np.int8] | None = None
    weight_scale: NDArray[np.float32] | None = None
    output_scale: NDArray[np.float32] | None = None
    output_zero_point: NDArray[np.uint8] | None = None
    bias_correction: NDArray[np.float32] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    weight_sqnr_db: float | None = None
    weight_bits: int = 8
    activation_bits: int = 8

    @property
    def activation_levels(self) -> tuple[int, int]:
        """The smallest and the largest activation code q."""
        return activation_levels(self.activation_bits)

    @property
    def name(self) -> str:
        """Module path of the layer."""
        return self.layer.name

    @property
    def zero_point_u8(self) -> int:
        """The zero point of the same grid on unsigned codes: u8 = s8 + 128."""
        return 128 - self.zero_offset

    @property
    def axis_scale(self) -> NDArray[np.float32] | None:
        """s k per input channel, [C], where unsigned targets quantize with it and so get k for nothing.

        A QuantizeLinear may have a scale per channel while the DequantizeLinear behind it has the plain s: the kernel
        sees one scale, and dividing by k costs no operation. Only behind a normalization: elsewhere ONNX Runtime keeps
        channels innermost, as linear layers do, and there a scale per channel is far slower than a multiply (9 ms
        against 1 ms for 16 x 64 x 28 x 28). None where there is no k, or a gain stands in between.
        """
        layer = self.layer
        if self.inverse_k is None or self.inverse_r is not None or layer.kind != "conv" or not layer.normalized:
            return None
        scale: NDArray[np.float32] = np.float32(self.scale) / self.inverse_k
        return scale

    def corrected(self, bias: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """The layer's bias [O] with its correction; None where there is neither."""
        if bias is None or self.bias_correction is None:
            return self.bias_correction if bias is None else bias
        total: NDArray[np.float32] = (bias.astype(np.float64) + self.bias_correction).astype(np.float32)
        return total

    @property
    def codes(self) -> NDArray[np.int8]:
        """The weight codes of an INT8 layer."""
        if self.weight_codes is None:
            raise ValueError(f"{self.name} is planned in {self.precision}; it has no weight codes")
        return self.weight_codes

    @property
    def weight_scales(self) -> NDArray[np.float32]:
        """The weight scales of an INT8 layer."""
        if self.weight_scale is None:
            raise ValueError(f"{self.name} is planned in {self.precision}; it has no weight scales")
        return self.weight_scale


@dataclass(frozen=True)
class QuantizationPlan:
    """The plan of a whole U-Net.

    Attributes:
        layers: one entry per layer, float ones included, in execution order.
        timestep_edges: [K + 1] int64; gain bin j covers timesteps edges[j] .. edges[j + 1] - 1, from 0 to T.
        options: the options it was made with (JSON values).
        provenance: what it was made from (JSON values).
        output_correction: [T, 3, outputs] float32: m, k and l of each timestep, where the network's output is
            ``e (1 + k) + m + l x`` for the float output e and the sample x; None for nothing.
    """

    layers: tuple[LayerPlan, ...]
    timestep_edges: NDArray[np.int64]
    options: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    output_correction: NDArray[np.float32] | None = None

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The INT8 layers."""
        return tuple(layer for layer in self.layers if layer.precision == "int8")

    @property
    def topology(self) -> Topology:
        """The layers' places in the network."""
        return Topology(tuple(plan.layer for plan in self.layers))

    @property
    def num_step_bins(self) -> int:
        """Number of gain bins K."""
        return len(self.timestep_edges) - 1

    def bin_of_timestep(self) -> NDArray[np.int64]:
        """Gain bin of every timestep, [T] int64."""
        return np.repeat(np.arange(self.num_step_bins, dtype=np.int64), np.diff(self.timestep_edges))

    def layer(self, name: str) -> LayerPlan:
        """The entry of that layer; KeyError where there is none."""
        for plan in self.layers:
            if plan.name == name:
                return plan
        raise KeyError(name)

    def summary(self) -> dict[str, int]:
        """How many layers do what."""
        quantized = self.quantized
        return {
            "layers": len(self.layers),
            "int8": len(quantized),
            "float": len(self.layers) - len(quantized),
            "zero_offset": sum(plan.zero_offset != 0 for plan in quantized),
            "branch_factors": sum(plan.inverse_k is not None for plan in quantized),
            "step_gains": sum(plan.inverse_r is not None for plan in quantized),
            "bias_corrections": sum(plan.bias_correction is not None for plan in quantized),
        }

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` (readable) and ``plan.safetensors`` (codes, factors, the same document)."""
        document = self._document()
        arrays: dict[str, NDArray[Any]] = {"timestep_edges": self.timestep_edges}
        if self.output_correction is not None:
            arrays["output_correction"] = self.output_correction
        for plan in self.layers:
            for name in _ARRAYS:
                value = getattr(plan, name)
                if value is not None:
                    arrays[f"{plan.name}/{name}"] = value
        with new_file(folder / "plan.json") as path:
            path.write_bytes(json.dumps(json.loads(canonical_json(document)), indent=1).encode())
        write_record(folder / "plan.safetensors", kind=_KIND, version=_VERSION, document=document, arrays=arrays)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            InputError: a file is missing, truncated, newer than this version, or the two do not belong together.
        """
        document, arrays = read_record(folder / "plan.safetensors", kind=_KIND, version=_VERSION)
        try:
            readable = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{folder / 'plan.json'} cannot be read ({error}); copy the plan again") from error
        if readable != document:
            raise InputError(
                f"{folder / 'plan.json'} and plan.safetensors beside it are not of the same plan; copy both again"
            )
        layers = []
        for entry in readable["layers"]:
            values: dict[str, Any] = {name: arrays.get(f"{entry['layer']['name']}/{name}") for name in _ARRAYS}
            place: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in entry.pop("layer").items()
            }
            layers.append(LayerPlan(layer=Layer(**place), **entry, **values))
        correction = arrays.get("output_correction")
        if correction is not None and (correction.ndim != 3 or correction.shape[1] != 3):
            raise InputError(
                f"the output correction in {folder / 'plan.safetensors'} has the shape {list(correction.shape)}, not "
                "[timesteps, 3, outputs]: an earlier version made it; build the bundle again"
            )
        return cls(
            tuple(layers),
            arrays["timestep_edges"],
            readable["options"],
            readable["provenance"],
            correction,
        )

    def _document(self) -> dict[str, Any]:
        layers = []
        for plan in self.layers:
            entry = {key: value for key, value in vars(plan).items() if key not in (*_ARRAYS, "layer", "notes")}
            layers.append({**entry, "layer": asdict(plan.layer), "notes": dict(plan.notes)})
        document = {"layers": layers, "options": dict(self.options), "provenance": dict(self.provenance)}
        plain: dict[str, Any] = json.loads(canonical_json(document))
        return plain
