"""The exported text encoder against transformers, and folders that are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from qdm_deploy.artifacts.pipeline_spec import TextEncoder
from qdm_deploy.errors import ExportError, ModelError
from qdm_export.text_encoder import export_text_encoder, load_text_encoder


@pytest.mark.parametrize("old", [False, True])
def test_graph_gives_what_transformers_gives(
    tmp_path: Path, write_diffusers_text: Callable[..., Path], vocabulary_size: int, old: bool
) -> None:
    from transformers import CLIPTextModel

    source = write_diffusers_text(tmp_path / "model", pad="!" if old else "<|endoftext|>", old=old)
    spec = export_text_encoder(load_text_encoder(source), tmp_path / "bundle")
    session = ort.InferenceSession(tmp_path / "bundle/text_encoder/model.onnx", providers=["CPUExecutionProvider"])
    module = CLIPTextModel.from_pretrained(source / "text_encoder").eval()
    for rows in (1, 5):
        # The end of the text stands anywhere, or nowhere at all.
        ids = np.random.default_rng(rows).integers(0, vocabulary_size, (rows, 77))
        with torch.inference_mode():
            wanted = module(torch.from_numpy(ids), output_hidden_states=True)
            penultimate = module.final_layer_norm(wanted.hidden_states[-2])
        last, before, pooled = session.run(list(spec.outputs), {"input_ids": ids})
        assert np.abs(last - wanted.last_hidden_state.numpy()).max() < 1e-4
        assert np.abs(before - penultimate.numpy()).max() < 1e-4
        assert np.abs(pooled - wanted.pooler_output.numpy()).max() < 1e-4
        assert np.abs(last - before).max() > 0.1


def test_files_and_component(exported: tuple[Path, TextEncoder], vocabulary_size: int) -> None:
    root, spec = exported
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {"text_encoder/model.onnx", "text_encoder/model.onnx.data", "tokenizer/tokenizer.json"}
    eos = vocabulary_size - 1
    assert spec == TextEncoder(
        width=32, layers=3, vocabulary=vocabulary_size, bos_id=eos - 1, eos_id=eos, pad_id=eos, max_length=77
    )
    assert (root / "text_encoder/model.onnx").stat().st_size < 40_000
    assert b".py" not in (root / "text_encoder/model.onnx").read_bytes()


def test_a_graph_that_differs_fails_the_build(source: Path, tmp_path: Path) -> None:
    model = load_text_encoder(source)
    # The graph now looks for another end of the text than transformers, which read it when it was constructed.
    model.module.config.eos_token_id = 7
    with pytest.raises(ExportError, match=r"differs from transformers by .* in pooled, and 0.0001 is allowed"):
        export_text_encoder(model, tmp_path)


def test_half_precision_weights_become_float32(source: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    shutil.copytree(source / "tokenizer", tmp_path / "tokenizer")
    module = CLIPTextModel.from_pretrained(source / "text_encoder").half()
    module.save_pretrained(tmp_path / "text_encoder", variant="fp16")
    assert not (tmp_path / "text_encoder/model.safetensors").exists()
    assert {value.dtype for value in load_text_encoder(tmp_path).module.parameters()} == {torch.float32}


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_other_text_encoders_are_refused(copied: Path) -> None:
    for given in (["T5EncoderModel"], ["CLIPTextModelWithProjection"], None):
        change(copied / "text_encoder/config.json", architectures=given)
        with pytest.raises(ModelError, match="text encoders that are supported: CLIPTextModel"):
            load_text_encoder(copied)


def test_other_tokenizers_are_refused(copied: Path) -> None:
    change(copied / "tokenizer/tokenizer_config.json", tokenizer_class="BertTokenizer")
    with pytest.raises(ModelError, match="holds a BertTokenizer; tokenizers that are supported: CLIPTokenizer"):
        load_text_encoder(copied)


def test_pickled_weights_are_refused(copied: Path) -> None:
    weights = copied / "text_encoder/model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match="only pickled weights"):
        load_text_encoder(copied)


def test_missing_and_broken_files_are_refused(copied: Path) -> None:
    weights = copied / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded as a CLIPTextModel"):
        load_text_encoder(copied)
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load_text_encoder(copied)
    (copied / "tokenizer/merges.txt").unlink()
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor merges\.txt"):
        load_text_encoder(copied)
    (copied / "text_encoder/config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        load_text_encoder(copied)


def test_weights_that_do_not_fit_are_refused(copied: Path) -> None:
    change(copied / "text_encoder/config.json", num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"do not fit its config\.json: .* missing"):
        load_text_encoder(copied)


def test_a_tokenizer_of_another_model_is_refused(copied: Path) -> None:
    change(copied / "tokenizer/tokenizer_config.json", model_max_length=128)
    with pytest.raises(ModelError, match=r"makes rows of 128 tokens, and .* has places for 77"):
        load_text_encoder(copied)


def test_weights_that_are_not_finite_are_refused(copied: Path) -> None:
    from transformers import CLIPTextModel

    module = CLIPTextModel.from_pretrained(copied / "text_encoder")
    with torch.no_grad():
        module.final_layer_norm.bias[0] = torch.nan
    module.save_pretrained(copied / "text_encoder")
    with pytest.raises(ModelError, match=r"final_layer_norm\.bias .* NaN or infinite"):
        load_text_encoder(copied)


def test_names_of_a_second_encoder(source: Path, tmp_path: Path) -> None:
    for old, new in (("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")):
        shutil.copytree(source / old, tmp_path / "model" / new)
    model = load_text_encoder(tmp_path / "model", name="text_encoder_2", tokenizer="tokenizer_2")
    spec = export_text_encoder(model, tmp_path / "bundle")
    assert (spec.name, spec.tokenizer) == ("text_encoder_2", "tokenizer_2")
    assert (tmp_path / "bundle/text_encoder_2/model.onnx").is_file()
    assert (tmp_path / "bundle/tokenizer_2/tokenizer.json").is_file()
