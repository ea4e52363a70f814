"""From prompts to conditions, against transformers."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import Denoiser, PipelineSpec, TextEncoder
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.components import text_states
from qdm_deploy.components.encoders import PromptEncoder, open_encoder
from qdm_deploy.components.prompt_lists import packaged_prompts
from qdm_deploy.components.prompts import PromptOptions
from qdm_deploy.components.text_states import TextStates
from qdm_deploy.errors import BundleError, CheckFailed, InputError
from qdm_deploy.samplers.conditioning import check_conditioning
from qdm_export.float_graph import save_graph
from qdm_export.text_encoder import export_text_encoder, load_text_encoder, text_graph

INPUT = "encoder_hidden_states"


def pipeline_of(*encoders: TextEncoder, tokens: int = 77) -> PipelineSpec:
    states = TensorSpec(name=INPUT, row_shape=(tokens, sum(encoder.width for encoder in encoders)))
    interface = StepInterface.of((4, 8, 8), [states], coefficients=13, fractional_timesteps=True)
    denoiser = Denoiser(interface=interface, num_train_timesteps=1000)
    return PipelineSpec(name="tiny", components=(denoiser, *encoders), makes="latents")


@pytest.fixture(scope="session")
def reference(source: Path) -> Callable[..., NDArray[np.float32]]:
    """States [N, 77, 32] of prompts by transformers, as diffusers asks for them."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    module = CLIPTextModel.from_pretrained(source / "text_encoder").eval()

    def states(prompts: list[str], *, clip_skip: int = 0) -> NDArray[np.float32]:
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            found = module(ids, output_hidden_states=True)
            if clip_skip == 0:
                return np.asarray(found.last_hidden_state)
            return np.asarray(module.final_layer_norm(found.hidden_states[-(clip_skip + 1)]))

    return states


@pytest.fixture
def encoder(exported: tuple[Path, TextEncoder]) -> PromptEncoder:
    root, spec = exported
    opened = open_encoder(pipeline_of(spec), root=root)
    assert isinstance(opened, PromptEncoder)
    return opened


def test_states_are_those_of_transformers(encoder: PromptEncoder, reference: Callable[..., Any]) -> None:
    prompts = ["a red cat", "photo of the dog, 🐶", "a red cat", None]
    conditioning = encoder.encode(prompts, ["blue", None, "", "a (dog)"])
    own, unconditional = conditioning.own[INPUT], (conditioning.unconditional or {})[INPUT]
    listed = packaged_prompts("measuring").prompts[3]  # nobody said what the last one shows
    assert np.abs(own - reference(["a red cat", "photo of the dog, 🐶", "a red cat", listed])).max() < 1e-4
    assert np.abs(unconditional - reference(["blue", "", "", "a (dog)"])).max() < 1e-4
    assert own.dtype == unconditional.dtype == np.float32
    interface = pipeline_of(encoder._opened[0].spec).interface
    check_conditioning(interface, conditioning, 4, guided=True)


@pytest.mark.parametrize("negative", [None, [None, None], ["", None], [None]])
def test_no_negative_prompt_is_the_empty_one_shared_by_all(
    encoder: PromptEncoder, reference: Callable[..., Any], negative: list[str | None] | None
) -> None:
    conditioning = encoder.encode(["red", "blue"], negative)
    unconditional = (conditioning.unconditional or {})[INPUT]
    assert unconditional.shape == (1, 77, 32)
    assert np.abs(unconditional - reference([""])).max() < 1e-4
    assert encoder.can_be_guided


def test_negative_prompts_of_another_number_are_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(InputError, match="2 negative prompts were given for 3 images"):
        encoder.encode(["a", "b", "c"], ["d", "e"])


def test_states_have_the_same_bits_in_any_company(encoder: PromptEncoder, exported: tuple[Path, TextEncoder]) -> None:
    root, spec = exported
    together = encoder.encode(["red", "blue dog", "photo of a cat"]).own[INPUT]
    alone = open_encoder(pipeline_of(spec), root=root).encode(["blue dog"]).own[INPUT]
    assert np.array_equal(together[1], alone[0])


def test_clip_skip_leaves_out_the_last_layer(encoder: PromptEncoder, reference: Callable[..., Any]) -> None:
    skipping = encoder.with_options(PromptOptions(clip_skip=1))
    states = skipping.encode(["a red cat"]).own[INPUT]
    assert np.abs(states - reference(["a red cat"], clip_skip=1)).max() < 1e-4
    assert np.abs(states - encoder.encode(["a red cat"]).own[INPUT]).max() > 0.1


def test_a_graph_with_other_outputs_is_refused(exported: tuple[Path, TextEncoder]) -> None:
    root, spec = exported
    pipeline = pipeline_of(spec.model_copy(update={"outputs": ("last_hidden_state",)}))
    with pytest.raises(BundleError, match="its manifest says"):
        open_encoder(pipeline, root=root).encode(["cat"])


def test_a_long_prompt_is_cut_and_said_so(
    encoder: PromptEncoder, reference: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "red " * 75 + "blue dog"
    with caplog.at_level(logging.WARNING):
        states = encoder.encode([prompt, prompt]).own[INPUT]
        encoder.encode(["red " * 75])
    assert np.abs(states - reference([prompt] * 2)).max() < 1e-4
    # Once, though asked for twice, and not of the prompt that just fits.
    assert [record.getMessage() for record in caplog.records] == [
        "text_encoder reads 75 tokens of a prompt, and this one has 77; left out: 'blue dog'"
    ]


def test_a_long_prompt_is_spread_over_chunks_where_the_model_takes_them(
    exported: tuple[Path, TextEncoder], reference: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    root, spec = exported
    opened = open_encoder(pipeline_of(spec, tokens=3 * 77), root=root)
    conditioning = opened.encode(["red " * 75 + "blue dog"], ["cat"])
    own, unconditional = conditioning.own[INPUT], (conditioning.unconditional or {})[INPUT]
    assert own.shape == unconditional.shape == (1, 231, 32)
    assert np.abs(own.reshape(3, 77, 32) - reference(["red " * 75, "blue dog", ""])).max() < 1e-4
    assert np.abs(unconditional.reshape(3, 77, 32) - reference(["cat", "", ""])).max() < 1e-4
    assert caplog.records == []


def test_weights_are_text_unless_they_are_asked_for(encoder: PromptEncoder, reference: Callable[..., Any]) -> None:
    prompt = "a (red:1.5) [cat]"
    assert np.abs(encoder.encode([prompt]).own[INPUT] - reference([prompt])).max() < 1e-4


def test_weights_move_states_away_from_those_of_no_prompt(
    encoder: PromptEncoder, reference: Callable[..., Any]
) -> None:
    weighing = encoder.with_options(PromptOptions(weighting=True))
    found = weighing.encode(["a (red:1.5) cat"]).own[INPUT][0]
    plain, empty = reference(["a red cat"])[0], reference([""])[0]
    wanted = plain.copy()
    wanted[2] = empty[2] + 1.5 * (plain[2] - empty[2])
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(found - plain).max() > 0.01
    assert np.array_equal(weighing.encode([r"a \(red\) cat"]).own[INPUT], encoder.encode(["a (red) cat"]).own[INPUT])


def test_weights_reach_the_tokens_of_a_later_chunk(
    exported: tuple[Path, TextEncoder], reference: Callable[..., Any]
) -> None:
    root, spec = exported
    opened = open_encoder(pipeline_of(spec, tokens=154), root=root, options=PromptOptions(weighting=True))
    found = opened.encode(["red " * 75 + "(dog:0)"]).own[INPUT].reshape(2, 77, 32)
    wanted = reference(["red " * 75, "dog"])
    wanted[1, 1] = reference([""])[0, 1]
    assert np.abs(found - wanted).max() < 1e-4


def test_two_text_encoders_stand_beside_each_other(
    exported: tuple[Path, TextEncoder], source: Path, tmp_path: Path, reference: Callable[..., Any]
) -> None:
    root, spec = exported
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(root / name, tmp_path / f"{name}_2")
    second = spec.model_copy(update={"name": "text_encoder_2", "tokenizer": "tokenizer_2"})
    states = open_encoder(pipeline_of(spec, second), root=tmp_path).encode(["red", "blue"]).own[INPUT]
    assert states.shape == (2, 77, 64)
    assert np.array_equal(states[..., :32], states[..., 32:])
    assert np.abs(states[..., :32] - reference(["red", "blue"])).max() < 1e-4


def test_a_text_is_encoded_once_and_kept_for_a_while(
    exported: tuple[Path, TextEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_states, "_KEPT", 2)
    states = TextStates(*exported)
    runs: list[str] = []
    run = states._run
    monkeypatch.setattr(states, "_run", lambda rows, text, options: runs.append(text) or run(rows, text, options))
    options = PromptOptions()
    for text in ("red", "red", "blue", "red", "dog", "red", "blue"):
        states.of(text, options)
    # "blue" is the one that was used longest ago when "dog" comes.
    assert runs == ["red", "blue", "dog", "blue"]
    with pytest.raises(ValueError, match="read-only"):
        states.of("red", options)[0] = 0


def test_states_that_are_not_finite_name_the_stage(source: Path, tmp_path: Path) -> None:
    model = load_text_encoder(source)
    spec = export_text_encoder(model, tmp_path)
    with torch.no_grad():
        model.module.final_layer_norm.bias[3] = torch.inf
    save_graph(text_graph(model), tmp_path / "text_encoder/model.onnx", weights="model.onnx.data")
    opened = open_encoder(pipeline_of(spec), root=tmp_path)
    with pytest.raises(CheckFailed, match="text_encoder made NaN or infinity in last_hidden_state of the prompt 'cat'"):
        opened.encode(["cat"])


def test_broken_bundles_are_refused(exported: tuple[Path, TextEncoder], tmp_path: Path) -> None:
    root, spec = exported
    with pytest.raises(InputError, match="the text encoders of tiny are in its bundle; give its folder"):
        open_encoder(pipeline_of(spec)).encode(["cat"])
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(BundleError, match="there is no text encoder"):
        open_encoder(pipeline_of(spec), root=tmp_path).encode(["cat"])
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder/model.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="cannot load"):
        open_encoder(pipeline_of(spec), root=tmp_path).encode(["cat"])
    with pytest.raises(BundleError, match="its manifest says"):
        open_encoder(pipeline_of(spec.model_copy(update={"width": 16})), root=root).encode(["cat"])


def test_files_and_options_that_do_not_fit_are_refused(exported: tuple[Path, TextEncoder], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes no states; leave the conditioning file"):
        open_encoder(pipeline_of(exported[1]), tmp_path / "states.safetensors")
    interface = StepInterface.of((4, 8, 8), coefficients=13)
    unconditional = PipelineSpec(name="tiny", components=(Denoiser(interface=interface, num_train_timesteps=10),))
    with pytest.raises(InputError, match="tiny has no text encoder in its bundle; leave clip_skip and weighting out"):
        open_encoder(unconditional, options=PromptOptions(clip_skip=1))


def test_encoding_needs_neither_torch_nor_transformers(exported: tuple[Path, TextEncoder]) -> None:
    root, spec = exported
    program = (
        "import sys, pathlib\n"
        "from qdm_deploy.artifacts.pipeline_spec import PipelineSpec\n"
        "from qdm_deploy.components.encoders import open_encoder\n"
        "pipeline = PipelineSpec.model_validate_json(sys.argv[1])\n"
        "open_encoder(pipeline, root=pathlib.Path(sys.argv[2])).encode(['a red cat'])\n"
        "import json\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    command = [sys.executable, "-c", program, pipeline_of(spec).model_dump_json(), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"onnxruntime", "tokenizers"} <= loaded
    assert loaded & {"torch", "transformers", "onnx", "diffusers", "huggingface_hub"} == set()


def broken(spec: TextEncoder, **values: Any) -> TextEncoder:
    return TextEncoder.model_validate({**spec.model_dump(), **values})


def test_components_that_do_not_fit_are_refused(exported: tuple[Path, TextEncoder]) -> None:
    spec = exported[1]
    with pytest.raises(ValueError, match="pad_id 530 is not in a vocabulary of 530"):
        broken(spec, pad_id=530)
    with pytest.raises(ValueError, match="must hold last_hidden_state"):
        broken(spec, outputs=("pooled",))
    with pytest.raises(ValueError, match="text_encoder is the folder of two components"):
        pipeline_of(spec, spec)
    for tokens in (76, 4 * 77):
        with pytest.raises(
            ValueError, match=r"its text encoders make float32 \[77, 32\] or \[154, 32\] or \[231, 32\]"
        ):
            pipeline_of(spec, tokens=tokens)
    with pytest.raises(ValueError, match="comes from text encoders with 64 and 77 tokens"):
        pipeline_of(spec, broken(spec, name="other", max_length=64))
    with pytest.raises(ValueError, match="which no encoder makes"):
        pipeline_of(broken(spec, input="text_embeds"))
    assert PipelineSpec.model_validate_json(pipeline_of(spec).model_dump_json()).text_encoders == (spec,)
