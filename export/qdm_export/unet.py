"""A diffusers U-Net from a local folder: closed configuration, safetensors only, checked before anything is computed.

Two layouts are read, both as diffusers writes them: a pipeline folder (``model_index.json``, ``unet/``, ``scheduler/``)
and a bare U-Net folder (``config.json`` and its weights, with ``scheduler_config.json`` beside them).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qdm_deploy.artifacts.manifest import first_problem
from qdm_deploy.artifacts.pipeline_spec import Denoiser, Encoder, LabelTable, PipelineSpec, StatesFile
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.errors import ModelError
from qdm_deploy.samplers.columns import COEFFICIENTS, LEARNED_VARIANCE_COEFFICIENTS
from qdm_export.component_folder import build_module, load_weights, parse_json, read_json, weight_files
from qdm_export.decoder import DecoderNet, load_decoder
from qdm_export.families import Family, family_of
from qdm_export.text_encoder import TextModel, load_text_encoder

__all__ = ["Checkpoint", "UNet", "load_checkpoint"]

# What a repository may hold beside the weights that are wanted.
_VARIANTS = ["*.fp16*", "*.bf16*", "*non_ema*"]
_NOT_USED = ["safety_checker/*", "feature_extractor/*", "image_encoder/*"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# The blocks that read a skip by torch.cat and keep the resolution of `sample_size`; the FIR "Skip" and the "K" blocks
# of other families are refused until somebody has calibrated one.
_BLOCKS = {
    "UNet2DModel": {
        "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "UpBlock2D", "AttnUpBlock2D",
        "ResnetUpsampleBlock2D", "UNetMidBlock2D",
    },
    "UNet2DConditionModel": {
        "DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "UpBlock2D", "CrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D",
    },
}  # fmt: skip


# Conditions that diffusers wants in a dictionary of their own, and those that are channels beside the sample's.
_ADDED = ("text_embeds", "time_ids")
_CONCATENATED = ("mask", "masked_image_latents")


class UNet(nn.Module):
    """One signature for every diffusers U-Net: sample, timestep, and the model's conditions by name."""

    def __init__(self, unet: nn.Module) -> None:
        """Wrap ``unet``."""
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """Model output [B, C or 2C, H, W] float32 for ``sample`` [B, C, H, W] and ``timestep`` [B]."""
        beside = [conditions.pop(name) for name in _CONCATENATED if name in conditions]
        if beside:
            sample = torch.cat([sample, *beside], dim=1)
        added = {name: conditions.pop(name) for name in _ADDED if name in conditions}
        arguments = {**conditions, "added_cond_kwargs": added} if added else conditions
        output: Tensor = self.unet(sample, timestep, return_dict=False, **arguments)[0]
        return output


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model: the float32 U-Net in eval mode, what a runtime must know of it, and where it came from."""

    unet: UNet
    spec: PipelineSpec
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any]
    weights_sha256: str
    source: str
    texts: tuple[TextModel, ...] = ()
    decoder: DecoderNet | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The U-Net as its step graph shows it."""
        return self.spec.denoiser


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Load a local diffusers folder, or a Hugging Face repository by its id ("owner/name").

    Raises:
        ModelError: the folder is missing, has no safetensors weights, is truncated, or names a block we do not know.
    """
    folder = _local_folder(str(source))
    unet_dir = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_json(unet_dir / "config.json", "a diffusers U-Net folder has one")
    model_class = _model_class(config, unet_dir / "config.json")
    scheduler = _read_first(
        [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"],
        "the sampler's noise schedule is read from it",
    )
    model_index = read_json(folder / "model_index.json", "") if (folder / "model_index.json").is_file() else {}
    family = family_of(model_index)
    config, scheduler = family.unet_config(config), family.scheduler_config(scheduler)
    files = weight_files(unet_dir)
    module = build_module(model_class, config, unet_dir)
    load_weights(module, files, unet_dir)
    texts, decoder = _text_models(folder, family, config), load_decoder(folder, model_index)
    spec = _pipeline_spec(folder, module, config, scheduler, model_index, texts, decoder)
    return Checkpoint(
        unet=UNet(module).eval().requires_grad_(False),
        spec=spec,
        scheduler_config=scheduler,
        model_index=model_index,
        weights_sha256=_sha256(files),
        source=str(source),
        texts=texts,
        decoder=decoder,
    )


def _text_models(folder: Path, family: Family, config: Mapping[str, Any]) -> tuple[TextModel, ...]:
    """The text encoders of a pipeline whose U-Net takes their states and nothing else."""
    added = ("addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim")
    whole = family.text and (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir()
    if not whole or any(config.get(name) is not None for name in added) or config.get("in_channels") == 9:
        return ()
    return (load_text_encoder(folder),)


def _local_folder(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(
            f"{source} is a file; give the folder of a diffusers model (it holds model_index.json and unet/)"
        )
    if not _REPO_ID.fullmatch(source):
        raise ModelError(
            f"there is no model folder {source!r}; give a local diffusers folder or a Hugging Face id like 'owner/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Of each component its configuration and one variant of its weights; no safety checker, no pickles.
    small = ["*.json", "*/*.json", "tokenizer*/*.txt"]
    parts = ["", "unet/", "vae/", "vqvae/", "text_encoder/", "text_encoder_2/"]
    try:
        folder = Path(snapshot_download(source, allow_patterns=small, ignore_patterns=_NOT_USED))
        weights = [f"{part}*.safetensors" for part in parts]
        snapshot_download(source, allow_patterns=weights, ignore_patterns=_VARIANTS)
        if not any(any((folder / part).glob("*.safetensors")) for part in parts[:2]):
            snapshot_download(source, allow_patterns=[f"{part}*.fp16.safetensors" for part in parts])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{source!r} is no local folder, and downloading it from the Hugging Face hub failed "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the id and the network, "
            "or download it and give the folder"
        ) from error


def _read_first(paths: list[Path], why: str) -> dict[str, Any]:
    for path in paths:
        if path.is_file():
            return read_json(path, why)
    raise ModelError(f"{paths[0]} is missing: {why}")


def _model_class(config: Mapping[str, Any], path: Path) -> str:
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _BLOCKS:
        raise ModelError(f"{path} describes a {name!r}; supported are {', '.join(sorted(_BLOCKS))}")
    used = []
    for key in ("down_block_types", "up_block_types"):
        if not isinstance(config.get(key, []), list):
            raise ModelError(f"{path} has {key} {config[key]!r}; it must be a list of block names")
        used += config.get(key, [])
    if config.get("mid_block_type") is not None:
        used.append(config["mid_block_type"])
    for block in used:
        if not isinstance(block, str) or block not in _BLOCKS[name]:
            raise ModelError(
                f"{path} has an unknown block {block!r}; a {name} may use {', '.join(sorted(_BLOCKS[name]))}"
            )
    return str(name)


def _pipeline_spec(
    folder: Path,
    module: nn.Module,
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    model_index: Mapping[str, Any],
    texts: Sequence[TextModel],
    decoder: DecoderNet | None,
) -> PipelineSpec:
    height, width = _sample_size(folder, config)
    channels, beside = _channels(config, height, width)
    is_conditional = config["_class_name"] == "UNet2DConditionModel"
    conditions = [*(_states(config, model_index, texts) if is_conditional else ()), *beside]
    learned = int(config["out_channels"]) == 2 * channels
    states = StatesFile(inputs=tuple(spec.name for spec in conditions)) if conditions else None
    encoder: Encoder | None = states
    limits: dict[str, int] = {}
    if getattr(module, "class_embedding", None) is not None:
        if config.get("class_embed_type") is not None or not config.get("num_class_embeds"):
            raise ModelError(
                f"class_embed_type {config.get('class_embed_type')!r} is not supported; supported is a table of "
                "num_class_embeds"
            )
        if states is not None:
            raise ModelError(
                f"the U-Net takes class labels beside {', '.join(states.inputs)}; supported is one kind of condition"
            )
        limits["class_labels"] = int(config["num_class_embeds"])
        encoder = _label_table(folder, "class_labels", limits["class_labels"])
        conditions = [TensorSpec(name="class_labels", dtype="int64")]
    columns = LEARNED_VARIANCE_COEFFICIENTS if learned else COEFFICIENTS
    denoiser = Denoiser(
        interface=StepInterface.of(
            (channels, height, width),
            conditions,
            coefficients=len(columns),
            # Text-conditional models are run with sigmas between two timesteps; there computing the embedding costs
            # nothing that shows. Small pixel models look it up.
            fractional_timesteps=is_conditional,
            rescaled_guidance=is_conditional,
        ),
        num_train_timesteps=int(scheduler.get("num_train_timesteps", 1000)),
        learned_variance=learned,
        limits=limits,
    )
    encoders: list[Encoder] = [model.spec for model in texts] or ([] if encoder is None else [encoder])
    try:
        return PipelineSpec(
            name=re.sub(r"[\x00-\x1f\x7f-\x9f<>]", "_", folder.resolve().name)[:200] or "model",
            components=(denoiser, *encoders, *(() if decoder is None else (decoder.spec,))),
            makes="latents" if "vae" in model_index or "vqvae" in model_index else "pixels",
        )
    except ValidationError as error:
        raise ModelError(f"the parts of {folder} do not fit together: {first_problem(error)}") from error


def _channels(config: Mapping[str, Any], height: int, width: int) -> tuple[int, list[TensorSpec]]:
    """Channels of the sample, and what stands beside it in the U-Net's input."""
    taken, given = int(config["in_channels"]), int(config["out_channels"])
    if given in (taken, 2 * taken):
        return taken, []
    if taken == 2 * given + 1 and config["_class_name"] == "UNet2DConditionModel":
        shapes = {"mask": (1, height, width), "masked_image_latents": (given, height, width)}
        return given, [TensorSpec(name=name, row_shape=shape, spatial=True) for name, shape in shapes.items()]
    raise ModelError(
        f"the U-Net has {taken} input and {given} output channels; qdm-deploy runs models whose output is the noise "
        f"({taken} channels), the noise and a learned variance ({2 * taken}), or that inpaint (9 in, 4 out)"
    )


def _states(config: Mapping[str, Any], model_index: Mapping[str, Any], texts: Sequence[TextModel]) -> list[TensorSpec]:
    """What a text-conditional U-Net wants to know of a prompt."""
    for name, allowed in _TEXT_OPTIONS.items():
        if config.get(name) not in allowed:
            raise ModelError(f"{name} {config[name]!r} is not supported; supported are {', '.join(map(repr, allowed))}")
    width = int(config.get("cross_attention_dim") or 1280)
    tokens = texts[0].spec.max_length if texts else _TEXT_TOKENS
    states = [TensorSpec(name="encoder_hidden_states", row_shape=(tokens, width))]
    if config.get("addition_embed_type") == "text_time":
        # Sizes and crops as six numbers, or five where an aesthetic score stands for the target size (SDXL's refiner).
        ids = 5 if model_index.get("requires_aesthetics_score") else 6
        pooled = int(config["projection_class_embeddings_input_dim"]) - ids * int(config["addition_time_embed_dim"])
        if pooled < 1:
            raise ModelError(
                f"projection_class_embeddings_input_dim {config['projection_class_embeddings_input_dim']} leaves no "
                f"room for a pooled text state beside {ids} embedded numbers"
            )
        states += [TensorSpec(name="text_embeds", row_shape=(pooled,)), TensorSpec(name="time_ids", row_shape=(ids,))]
    if config.get("time_cond_proj_dim") is not None:
        states.append(TensorSpec(name="timestep_cond", row_shape=(int(config["time_cond_proj_dim"]),)))
    return states


def _sample_size(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    size = config.get("sample_size")
    if size is None:
        raise ModelError(
            f"the U-Net in {folder} has no sample_size; engines need a fixed height and width: set it in config.json"
        )
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(
            f"the U-Net in {folder} has sample_size {size!r}; it must be a size in pixels or [height, width]"
        )
    return int(sides[0]), int(sides[1])


# CLIP's text length, which every Stable Diffusion text encoder uses; the token axis of the exported graph is static.
_TEXT_TOKENS = 77
# Options of a UNet2DConditionModel that add inputs or change what its states are, and the values that are known.
_TEXT_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "attention_type": (None, "default"),
    "dual_cross_attention": (None, False),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
}


def _label_table(folder: Path, name: str, embeddings: int) -> LabelTable:
    """Names, number of classes and the null label: one embedding more than names is the "no class" of guidance."""
    path = folder / "labels.json"
    if not path.is_file():
        return LabelTable(input=name, num_classes=embeddings)
    names = parse_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{path} must hold a JSON list of label names")
    if len(names) not in (embeddings, embeddings - 1):
        raise ModelError(f"{path} names {len(names)} labels; the U-Net has {embeddings} class embeddings")
    null = embeddings - 1 if len(names) == embeddings - 1 else None
    try:
        return LabelTable(input=name, num_classes=len(names), labels=tuple(names), null_label=null)
    except ValidationError as error:
        raise ModelError(f"{path} holds a name that cannot be shown: {first_problem(error)}") from error


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
