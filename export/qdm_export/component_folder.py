"""A component of a diffusers pipeline in its folder: ``config.json`` and safetensors, checked before they are used."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qdm_deploy.errors import ModelError

__all__ = ["build_module", "load_weights", "parse_json", "read_json", "weight_files"]

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_MAX_CONFIG_BYTES = 1 << 20
# Files that diffusers wrote before its version 0.18 name the projections of an attention block in this way.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_PROJECTION = re.compile(rf"(attentions\.\d+)\.({'|'.join(_OLD_NAMES)})\.(weight|bias)$")


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A configuration.

    Raises:
        ModelError: it is missing (``why`` says what it is for) or is no JSON object.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing: {why}")
    value = parse_json(path)
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; a configuration is a JSON object")
    return value


def parse_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ModelError: it is too large, or not JSON.
    """
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ModelError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {_MAX_CONFIG_BYTES}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}); copy the model again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component.

    Raises:
        ModelError: there are none.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX, "").get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(n, str) for n in weight_map.values())
        ):
            raise ModelError(f"{folder / _INDEX} has no weight_map from tensor to shard; copy the model again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ModelError(f"{folder / _INDEX} names a shard {name!r} that is not a file of that folder")
        return [folder / name for name in names]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise ModelError(
            f"{folder} has only pickled weights ({', '.join(pickled)}), which can run code when loaded; convert "
            "them once, in an environment you trust, with diffusers: "
            "pipeline.save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise ModelError(f"{folder} has no {_WEIGHTS[0]}; copy the model again")


def build_module(model_class: str, config: Mapping[str, Any], folder: Path) -> nn.Module:
    """An uninitialised module of a diffusers class.

    Raises:
        ModelError: the class does not know the configuration.
    """
    import diffusers

    kind = getattr(diffusers, model_class)
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ModelError(f"{folder / 'config.json'} has options that {model_class} does not know: {', '.join(unknown)}")
    try:
        with torch.device("meta"):
            module: nn.Module = kind(**arguments)
    except (TypeError, ValueError, KeyError, IndexError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} does not describe a working {model_class}: {error}") from error
    return module


def load_weights(module: nn.Module, files: list[Path], folder: Path) -> None:
    """Fill a module that ``build_module`` made, in float32.

    Raises:
        ModelError: the files cannot be read, or do not fit.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                    state[_new_name(name)] = tensors.get_tensor(name).to(torch.float32)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} cannot be read as safetensors ({error}); it may be truncated: copy it again"
            ) from error
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        raise ModelError(
            f"the weights in {folder} do not fit its config.json: {len(missing)} missing (first: {missing[:1]}), "
            f"{len(extra)} unexpected (first: {extra[:1]})"
        )
    for name, value in state.items():
        if tuple(value.shape) != expected[name]:
            raise ModelError(
                f"{name} in {folder} has shape {tuple(value.shape)}; its config.json asks for {expected[name]}"
            )
        if not torch.isfinite(value).all():
            raise ModelError(f"{name} in {folder} holds NaN or infinite values; the checkpoint is broken")
    module.load_state_dict(state, assign=True)
    # Parameters came from the file; anything still on "meta" is a buffer that the class computes (none of ours has
    # one).
    left = [name for name, value in [*module.named_parameters(), *module.named_buffers()] if value.is_meta]
    if left:
        raise ModelError(f"{folder}: {len(left)} tensors were not initialised by the weights (first: {left[0]})")


def _new_name(name: str) -> str:
    return _OLD_PROJECTION.sub(lambda found: f"{found[1]}.{_OLD_NAMES[found[2]]}.{found[3]}", name)
