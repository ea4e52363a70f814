"""A CLIP text encoder and its tokenizer from a diffusers folder: two files that run without torch and transformers.

The graph takes ``input_ids`` [B, L] int64, and its batch is dynamic. What it gives is compared with transformers' own
forward pass before it counts as exported.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from qdm_deploy.artifacts.manifest import first_problem
from qdm_deploy.artifacts.pipeline_spec import TextEncoder
from qdm_deploy.errors import EnvironmentProblem, ExportError, ModelError
from qdm_export.float_graph import OPSET, quiet_exporter, save_graph

__all__ = ["TextModel", "export_text_encoder", "load_text_encoder", "text_graph"]

_MODELS = ("CLIPTextModel",)
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_OUTPUTS = ("last_hidden_state", "penultimate_hidden_state", "pooled")
_GRAPH, _WEIGHTS, _TOKENIZER = "model.onnx", "model.onnx.data", "tokenizer.json"
# Rounding of float32 through a few dozen layers stays two orders of magnitude below this.
_MAX_ABS = 1e-4
_CHECKED_ROWS = 3
# transformers' mark for "no limit was given".
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class TextModel:
    """A loaded text encoder: what a runtime must know of it, transformers' module in float32, and its tokenizer.

    Attributes:
        spec: the component it becomes.
        module: transformers' ``CLIPTextModel`` in eval mode.
        tokenizer_json: the fast tokenizer, as ``tokenizers`` reads it.
        source: the folder, for messages.
    """

    spec: TextEncoder
    module: Any
    tokenizer_json: str
    source: str


def load_text_encoder(
    folder: Path,
    *,
    name: str = "text_encoder",
    tokenizer: str = "tokenizer",
    input_name: str = "encoder_hidden_states",
) -> TextModel:
    """Load a text encoder and its tokenizer from a local diffusers folder.

    Args:
        folder: the pipeline's folder.
        name: the text encoder's folder in it.
        tokenizer: the tokenizer's.
        input_name: the condition that it makes.

    Raises:
        ModelError: a folder or file is missing or broken, the weights are pickled, or it is another kind of model.
        EnvironmentProblem: transformers cannot be imported.
    """
    if find_spec("transformers") is None:
        raise EnvironmentProblem(
            "a text encoder is read with transformers, which this environment lacks; install it with "
            "pip install 'qdm-deploy[build]'"
        )
    config = _config(folder / name / "config.json")
    given = config.get("architectures")
    if given not in [[one] for one in _MODELS]:
        raise ModelError(
            f"{folder / name} holds a {_listed(given)}; text encoders that are supported: {', '.join(_MODELS)}"
        )
    reader = _tokenizer(folder / tokenizer)
    module = _module(folder / name)
    length, places = int(reader.model_max_length), int(module.config.max_position_embeddings)
    length = places if length >= _NO_LIMIT else length
    if length > places:
        raise ModelError(
            f"{folder / tokenizer} makes rows of {length} tokens, and {folder / name} has places for {places}: they "
            "are not of one model"
        )
    if len(reader) > module.config.vocab_size:
        raise ModelError(
            f"{folder / tokenizer} has {len(reader)} tokens, and {folder / name} knows {module.config.vocab_size}: "
            "they are not of one model"
        )
    try:
        spec = TextEncoder(
            name=name,
            tokenizer=tokenizer,
            input=input_name,
            max_length=length,
            width=module.config.hidden_size,
            layers=module.config.num_hidden_layers,
            outputs=_OUTPUTS,
            vocabulary=module.config.vocab_size,
            bos_id=reader.bos_token_id,
            eos_id=reader.eos_token_id,
            pad_id=reader.pad_token_id,
        )
    except ValidationError as error:
        raise ModelError(f"{folder / name} cannot be a text encoder: {first_problem(error)}") from error
    return TextModel(spec, module, reader.backend_tokenizer.to_str(), str(folder))


def export_text_encoder(model: TextModel, root: Path) -> TextEncoder:
    """Write ``NAME/model.onnx`` with its data file and ``TOKENIZER/tokenizer.json`` into a bundle.

    Args:
        model: a loaded text encoder.
        root: the bundle's folder.

    Returns:
        The component for the bundle's ``PipelineSpec``.

    Raises:
        ExportError: the exporter failed, or a value of the graph differs from transformers' by more than 1e-4.
    """
    graph = text_graph(model)
    place = root / model.spec.name
    place.mkdir(parents=True, exist_ok=True)
    save_graph(graph, place / _GRAPH, weights=_WEIGHTS)
    _check(model, place / _GRAPH)
    (root / model.spec.tokenizer).mkdir(parents=True, exist_ok=True)
    (root / model.spec.tokenizer / _TOKENIZER).write_text(model.tokenizer_json, encoding="utf-8")
    return model.spec


class _TextGraph(nn.Module):
    """transformers' layers one by one, so that the state before the last one can be had; no mask but the causal one."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model = model
        self.causal: Tensor
        lowest = torch.finfo(torch.float32).min
        self.register_buffer("causal", torch.full((length, length), lowest).triu(1)[None, None], persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.model.embeddings(input_ids=input_ids)
        before = states
        for layer in self.model.encoder.layers:
            before, states = states, layer(states, self.causal)
        last, penultimate = self.model.final_layer_norm(states), self.model.final_layer_norm(before)
        eos, ids = self.model.config.eos_token_id, input_ids.to(torch.int32)
        # 2 stands in configurations older than transformers 4.31, whose models take the largest id for the end.
        end = ids.argmax(dim=-1) if eos == 2 else (ids == eos).to(torch.int32).argmax(dim=-1)
        pooled = last.gather(1, end[:, None, None].expand(-1, 1, last.shape[-1]))[:, 0]
        return last, penultimate, pooled


def text_graph(model: TextModel) -> ir.Model:
    """The text encoder as a float32 graph with a dynamic batch.

    Raises:
        ExportError: the exporter failed, or the graph lost its dynamic batch axis.
    """
    length = model.spec.max_length
    batch = torch.export.Dim("batch", min=1, max=1024)
    # Batch 2: torch.export specialises an example size of 1 to a constant.
    ids = torch.from_numpy(_random_ids(model.spec, 2, seed=0))
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                _TextGraph(model.module, length).eval(),
                (ids,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: batch},),
                input_names=["input_ids"],
                output_names=list(model.spec.outputs),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch could not export the text encoder of {model.source}: {error}") from error
    if program is None:
        raise ExportError(f"torch exported nothing for the text encoder of {model.source}")
    graph = program.model
    graph.graph.name = model.spec.name
    # The exporter's metadata holds stack traces with paths of this machine.
    for item in (*graph.graph, *ir.convenience.create_value_mapping(graph.graph).values(), graph, graph.graph):
        item.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.shape is None or isinstance(value.shape[0], int):
            raise ExportError(f"{value.name} lost its dynamic batch in the export: shape {value.shape}")
    return graph


def _check(model: TextModel, graph: Path) -> None:
    """Compare the written file with transformers' own forward pass."""
    import onnxruntime as ort

    ids = _random_ids(model.spec, _CHECKED_ROWS, seed=1)
    with torch.inference_mode():
        wanted = model.module(input_ids=torch.from_numpy(ids), output_hidden_states=True)
        # As diffusers does it for clip_skip=1.
        penultimate = model.module.final_layer_norm(wanted.hidden_states[-2])
    references = (wanted.last_hidden_state, penultimate, wanted.pooler_output)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    outputs = session.run(list(model.spec.outputs), {"input_ids": ids})
    for name, output, reference in zip(model.spec.outputs, outputs, references, strict=True):
        error = float(np.abs(output - reference.numpy()).max())
        # Not "error > limit": NaN is no match either.
        if not error <= _MAX_ABS:
            raise ExportError(
                f"the exported text encoder of {model.source} differs from transformers by {error:.3g} in {name}, and "
                f"{_MAX_ABS} is allowed: report it with the model's config.json"
            )


def _random_ids(spec: TextEncoder, rows: int, seed: int) -> NDArray[np.int64]:
    """Rows [rows, max_length] int64 of texts of several lengths, begun, ended and filled up as a tokenizer does."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, spec.vocabulary, (rows, spec.max_length))
    ids[:, 0] = spec.bos_id
    for row, end in zip(ids, np.linspace(1, spec.max_length - 1, rows).astype(int), strict=True):
        row[end] = spec.eos_id
        row[end + 1 :] = spec.pad_id
    return ids


def _module(folder: Path) -> Any:
    from transformers import CLIPTextModel

    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickled:
            raise ModelError(
                f"{folder} has only pickled weights ({', '.join(pickled)}), which can run code when loaded; convert "
                "them once, in an environment you trust, with diffusers: "
                "pipeline.save_pretrained(FOLDER, safe_serialization=True)"
            )
        raise ModelError(f"{folder} has no model.safetensors; copy the model again")
    plain = ("model.safetensors", "model.safetensors.index.json")
    variant = None if any((folder / name).is_file() for name in plain) else "fp16"
    try:
        with _quiet():
            module, report = CLIPTextModel.from_pretrained(
                folder,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded as a CLIPTextModel: {str(error).splitlines()[0]}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {folder} do not fit its config.json: {len(missing)} missing (first: {missing[0]})"
        )
    for name, value in module.named_parameters():
        if not torch.isfinite(value).all():
            raise ModelError(f"{name} in {folder} holds NaN or infinite values; the checkpoint is broken")
    return module.eval().requires_grad_(False)


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise ModelError(f"{folder} is missing: prompts are split into tokens by what it holds")
    config = folder / "tokenizer_config.json"
    kind = _config(config).get("tokenizer_class", _TOKENIZERS[0]) if config.is_file() else _TOKENIZERS[0]
    if kind not in _TOKENIZERS:
        raise ModelError(f"{folder} holds a {kind}; tokenizers that are supported: {', '.join(_TOKENIZERS)}")
    if not (folder / _TOKENIZER).is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ModelError(f"{folder} has neither {_TOKENIZER} nor {name}; copy the model again")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ModelError(f"{folder} cannot be read as a CLIPTokenizer: {str(error).splitlines()[0]}") from error


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path} is missing; copy the model again")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}; a configuration is a JSON object")
    return config


def _listed(architectures: object) -> str:
    return ", ".join(map(str, architectures)) if isinstance(architectures, list) else repr(architectures)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress lines and notes off the user's terminal."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
