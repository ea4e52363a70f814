"""The decoder of a latent diffusion model: from a diffusers folder to one ONNX graph that makes pictures of latents.

The graph takes ``latents`` [B, C, h, w] as the sampler leaves them and gives ``image`` [B, 3, H, W] in [-1, 1]; every
axis but the channels is free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from qdm_deploy.artifacts.manifest import first_problem
from qdm_deploy.artifacts.pipeline_spec import Decoder
from qdm_deploy.errors import ExportError, ModelError
from qdm_export.component_folder import build_module, load_weights, read_json, weight_files

__all__ = ["CLASSES", "DecoderNet", "export_decoder", "load_decoder", "save_decoder"]

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
_FOLDERS = ("vae", "vqvae")
_SCALING = 0.18215  # where an old file does not say
_LEAST_PSNR_DB = 80.0
# Batch, height and width of what a graph is tried on: another batch and other sizes than it was exported with.
_TRIED = ((1, 5, 8), (3, 8, 4))
_OPSET = 21


class DecoderNet(nn.Module):
    """Latents [B, C, h, w] as the sampler leaves them to pictures [B, 3, H, W]."""

    autoencoder: Any  # one of CLASSES, which share no base class

    def __init__(self, autoencoder: nn.Module, spec: Decoder) -> None:
        """Wrap a diffusers autoencoder."""
        super().__init__()
        self.autoencoder, self.spec = autoencoder, spec

    def forward(self, latents: Tensor) -> Tensor:
        """Values in [-1, 1], or a little beyond."""
        image: Tensor = self.autoencoder.decode(self.unscaled(latents)).sample
        return image

    def unscaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's own latents."""
        spec = self.spec
        latents = latents / spec.scaling_factor
        if spec.latents_mean is not None and spec.latents_std is not None:
            std, mean = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (spec.latents_std, spec.latents_mean))
            latents = latents * std + mean
        return latents + spec.shift_factor if spec.shift_factor else latents


class _Exported(nn.Module):
    """The same, without what the exporter would take for constants."""

    quantize: Any
    post_quant_conv: Any
    decoder: Any

    def __init__(self, net: DecoderNet) -> None:
        super().__init__()
        self.net, self.decoder = net, net.autoencoder.decoder
        self.quantize = getattr(net.autoencoder, "quantize", None)
        self.post_quant_conv = getattr(net.autoencoder, "post_quant_conv", None)

    def forward(self, latents: Tensor) -> Tensor:
        values = self.net.unscaled(latents)
        if self.quantize is not None:
            codes = self.quantize.embedding.weight
            rows = values.permute(0, 2, 3, 1)
            # The nearest code: |z - e|^2 without |z|^2, which is the same for all of them.
            distance = (codes * codes).sum(1) - 2 * (rows @ codes.t())
            values = functional.embedding(distance.argmin(-1), codes).permute(0, 3, 1, 2)
        if self.post_quant_conv is not None:
            values = self.post_quant_conv(values)
        image: Tensor = self.decoder(values)
        return image


class _Upsample(nn.Module):
    """diffusers' Upsample2D without its branches on the size of what it is given."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, *_: object) -> Tensor:
        larger = functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        result: Tensor = self.conv(larger)
        return result


@dataclass(frozen=True)
class _Found:
    folder: Path
    config: Mapping[str, Any]


def load_decoder(folder: Path, model_index: Mapping[str, Any]) -> DecoderNet | None:
    """The decoder of a pipeline folder, or None where it has none.

    Raises:
        ModelError: it has one of an unknown class, or one whose files cannot be used.
    """
    found = _find(folder, model_index)
    if found is None:
        return None
    config, path = dict(found.config), found.folder / "config.json"
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ModelError(f"{path} describes a {name!r}; decoders of the classes {', '.join(CLASSES)} are supported")
    if config.get("norm_type", "group") != "group":
        raise ModelError(f"{path} has norm_type {config['norm_type']!r}; supported is 'group'")
    if name == "AutoencoderTiny":
        config.pop("block_out_channels", None)  # diffusers writes it, and does not read it
    module = build_module(name, config, found.folder)
    load_weights(module, weight_files(found.folder), found.folder)
    options = _options(module)
    try:
        spec = Decoder(
            latent_channels=int(options["latent_channels"]),
            channels=int(options["out_channels"]),
            factor=_factor(module, name),
            scaling_factor=float(config.get("scaling_factor") or (1.0 if name == "AutoencoderTiny" else _SCALING)),
            shift_factor=float(config.get("shift_factor") or 0.0),
            latents_mean=config.get("latents_mean"),
            latents_std=config.get("latents_std"),
        )
    except ValidationError as error:
        raise ModelError(f"{path} cannot be used: {first_problem(error)}") from error
    return DecoderNet(module.eval().requires_grad_(False), spec)


def export_decoder(net: DecoderNet) -> ir.Model:
    """Export with free batch, height and width; changes ``net``, which is of no use afterwards.

    Raises:
        ExportError: the exporter failed.
    """
    from qdm_export.float_graph import quiet_exporter

    module = _Exported(net).eval()
    for block in getattr(module.decoder, "up_blocks", ()):
        for index, upsampler in enumerate(block.upsamplers or ()):
            block.upsamplers[index] = _Upsample(getattr(upsampler, "conv", nn.Identity()))
    axes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    example = torch.randn(2, net.spec.latent_channels, 6, 10, generator=torch.Generator().manual_seed(0))
    try:
        with quiet_exporter(), torch.inference_mode():
            program = torch.onnx.export(
                module, (example,), dynamo=True, opset_version=_OPSET, dynamic_shapes=(axes,),
                input_names=["latents"], output_names=["image"],
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch could not export the decoder: {error}") from error
    if program is None:
        raise ExportError("torch exported nothing for the decoder")
    model = program.model
    model.graph.name = "decoder"
    for node in model.graph:
        node.metadata_props.clear()
    for value in ir.convenience.create_value_mapping(model.graph).values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model


def save_decoder(net: DecoderNet, folder: Path) -> None:
    """Export into ``folder``: ``model.onnx`` and its weights; compared with diffusers' decoding at other sizes.

    Raises:
        ExportError: the graph gives other pictures.
    """
    from qdm_export.float_graph import save_graph

    # First: the export changes the module.
    expected = [(latents, net(latents)) for latents in (_example(net, *size) for size in _TRIED)]
    model = export_decoder(net)
    folder.mkdir()
    path = folder / "model.onnx"
    save_graph(model, path, weights="model.data")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for latents, image in expected:
        got = torch.from_numpy(session.run(["image"], {"latents": latents.numpy()})[0])
        if got.shape != image.shape:
            raise ExportError(f"the decoder's graph gives {list(got.shape)} and diffusers {list(image.shape)}")
        error = (got.double() - image.double()).square().mean().item()
        psnr = float("inf") if error == 0 else -10 * torch.log10(torch.tensor(error / 4)).item()
        if not psnr >= _LEAST_PSNR_DB:
            raise ExportError(
                f"the decoder's graph is {psnr:.1f} dB from diffusers' decoding of latents {list(latents.shape)}, and "
                f"{_LEAST_PSNR_DB:.0f} dB are needed"
            )


def _example(net: DecoderNet, batch: int, height: int, width: int) -> Tensor:
    """Random latents; of a codebook, near its codes: between two of them one rounding decides which is taken."""
    spec, random = net.spec, torch.Generator().manual_seed(batch)
    quantize = getattr(net.autoencoder, "quantize", None)
    if quantize is None:
        return torch.randn(batch, spec.latent_channels, height, width, generator=random)
    codes = quantize.embedding.weight
    chosen = codes[torch.randint(len(codes), (batch, height, width), generator=random)].permute(0, 3, 1, 2)
    near: Tensor = (chosen * spec.scaling_factor).contiguous()
    return near


def _find(folder: Path, model_index: Mapping[str, Any]) -> _Found | None:
    for name in _FOLDERS:
        if name in model_index and (folder / name).is_dir():
            return _Found(folder / name, read_json(folder / name / "config.json", "an autoencoder's folder has one"))
    return None


def _factor(module: nn.Module, name: str) -> int:
    config = _options(module)
    if name == "AutoencoderTiny":
        return int(config["upsampling_scaling_factor"] ** (len(config["num_decoder_blocks"]) - 1))
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _options(module: nn.Module) -> dict[str, Any]:
    """All options of a diffusers module, defaults with them."""
    return dict(module.config)  # type: ignore[arg-type]  # torch types every attribute of a module as one of its own
