"""Folders that load, and folders that are refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from qdm_deploy.artifacts.pipeline_spec import LabelTable, StatesFile
from qdm_deploy.errors import ModelError
from qdm_export.unet import load_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny: Any, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str = "variance") -> Path:
        return Path(shutil.copytree(tiny.folder(name), tmp_path / "model"))

    return make


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "unet" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def reweight(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "unet" / WEIGHTS
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_specs(tiny: Any) -> None:
    labels, rgb, text, variance = (tiny.checkpoint(name).spec for name in ("labels", "rgb", "text", "variance"))
    assert labels.sample_shape == (1, 10, 10)
    assert labels.encoder == LabelTable(
        input="class_labels", num_classes=3, labels=("shirt", "bag", "boot"), null_label=3
    )
    assert labels.denoiser.limits == {"class_labels": 4}
    assert (rgb.sample_shape, rgb.conditional, rgb.encoder) == ((3, 8, 12), False, None)
    assert [(spec.name, spec.row_shape) for spec in text.interface.conditions] == [("encoder_hidden_states", (77, 16))]
    assert text.encoder == StatesFile(inputs=("encoder_hidden_states",))
    assert variance.encoder == LabelTable(input="class_labels", num_classes=3)
    assert [spec.interface.num_coefficients for spec in (labels, rgb, text, variance)] == [13, 13, 13, 15]
    assert [spec.interface.fractional_timesteps for spec in (labels, rgb, text, variance)] == [False] * 2 + [
        True,
        False,
    ]
    assert [spec.denoiser.learned_variance for spec in (labels, rgb, text, variance)] == [False] * 3 + [True]
    assert {spec.makes for spec in (labels, rgb, text, variance)} == {"pixels"}
    assert rgb.denoiser.num_train_timesteps == 1000
    assert labels.name == "labels"


def test_the_network_is_diffusers_own(tiny: Any) -> None:
    from diffusers import UNet2DModel

    original = UNet2DModel.from_pretrained(tiny.folder("labels") / "unet").eval()
    x, t, y = torch.randn(2, 1, 10, 10), torch.tensor([3, 900]), torch.tensor([0, 3])
    with torch.inference_mode():
        assert torch.equal(tiny.checkpoint("labels").unet(x, t, class_labels=y), original(x, t, class_labels=y).sample)
    assert not tiny.checkpoint("labels").unet.training
    assert not any(p.requires_grad for p in tiny.checkpoint("labels").unet.parameters())


def test_a_bare_unet_folder_is_the_same_model(copy: Any, tmp_path: Path, tiny: Any) -> None:
    folder = copy()
    flat = tmp_path / "flat"
    shutil.copytree(folder / "unet", flat)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", flat)
    loaded = load_checkpoint(flat)
    assert loaded.weights_sha256 == tiny.checkpoint("variance").weights_sha256
    assert loaded.spec == tiny.checkpoint("variance").spec.model_copy(update={"name": "flat"})
    assert loaded.model_index == {}


def test_sharded_weights_are_the_same_model(copy: Any, tiny: Any) -> None:
    folder = copy()
    state = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    names = sorted(state)
    shards = {"a-00001.safetensors": names[::2], "a-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, folder / "unet" / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    loaded = load_checkpoint(folder)
    expected = tiny.checkpoint("variance").unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.unet.state_dict().items())
    (folder / "unet" / "a-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names a shard 'a-00002\.safetensors' that is not a file of that folder"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd"])
def test_a_shard_outside_the_folder_is_refused(copy: Any, name: str) -> None:
    folder = copy()
    (folder / "unet" / WEIGHTS).rename(folder / "secret.safetensors")
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(ModelError, match=f"names a shard '{name}' that is not a file of that folder"):
        load_checkpoint(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(copy: Any, index: str) -> None:
    folder = copy()
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json has no weight_map from tensor to shard"):
        load_checkpoint(folder)


def test_float16_weights_are_loaded_as_float32(copy: Any) -> None:
    folder = copy()
    state = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    save_file(
        {name: value.half() for name, value in state.items()}, folder / "unet" / WEIGHTS.replace(".saf", ".fp16.saf")
    )
    loaded = load_checkpoint(folder).unet.unet.state_dict()
    assert all(
        value.dtype == torch.float32 and torch.equal(value, state[name].half().float())
        for name, value in loaded.items()
    )


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=f"there is no model folder '{tmp_path}/nothing'; give a local diffusers folder"
    ):
        load_checkpoint(tmp_path / "nothing")


def test_a_file_is_refused(copy: Any) -> None:
    path = copy() / "unet" / WEIGHTS
    with pytest.raises(ModelError, match=f"{path} is a file; give the folder of a diffusers model"):
        load_checkpoint(path)


def test_a_repository_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError,
        match="'nobody/no-such-model' is no local folder, and downloading it from the Hugging Face hub failed",
    ):
        load_checkpoint("nobody/no-such-model")


def test_a_folder_without_config_is_refused(copy: Any) -> None:
    folder = copy()
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"unet/config\.json is missing: a diffusers U-Net folder has one"):
        load_checkpoint(folder)


def test_a_folder_without_scheduler_is_refused(copy: Any) -> None:
    folder = copy()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(
        ModelError, match=r"scheduler_config\.json is missing: the sampler's noise schedule is read from it"
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a list"),
        (b" " * (1 << 20) + b"{}", "has 1048578 bytes"),
    ],
)
def test_a_config_that_is_none_is_refused(copy: Any, content: bytes, text: str) -> None:
    folder = copy()
    (folder / "unet" / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"unet/config\.json {text}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"_class_name": "SD3Transformer2DModel"},
            "describes a 'SD3Transformer2DModel'; supported are UNet2DConditionModel, UNet2DModel",
        ),
        ({"_class_name": ...}, "describes a None; supported are"),
        ({"_class_name": ["UNet2DModel"]}, r"describes a \['UNet2DModel'\]; supported are"),
        (
            {"down_block_types": ["SkipDownBlock2D"]},
            "has an unknown block 'SkipDownBlock2D'; a UNet2DModel may use AttnDownBlock2D",
        ),
        ({"up_block_types": ["KUpBlock2D"]}, "has an unknown block 'KUpBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "has an unknown block 'UNetMidBlock2DSimpleCrossAttn'"),
        ({"turbo": True, "boost": 2}, "has options that UNet2DModel does not know: boost, turbo"),
        ({"norm_num_groups": 5}, "does not describe a working UNet2DModel: "),
        ({"block_out_channels": [16, 32]}, "does not describe a working UNet2DModel: "),
        ({"block_out_channels": "wide"}, "does not describe a working UNet2DModel: "),
        ({"sample_size": None}, r"has no sample_size; engines need a fixed height and width"),
        ({"sample_size": "big"}, "sample_size 'big'"),
        ({"sample_size": [8]}, r"sample_size \[8\]"),
        ({"in_channels": "one"}, "does not describe a working UNet2DModel: "),
        ({"down_block_types": None}, "down_block_types"),
    ],
)
def test_a_config_that_describes_no_known_model_is_refused(copy: Any, changes: dict[str, Any], text: str) -> None:
    folder = copy()
    configure(folder, **changes)
    with pytest.raises(ModelError, match=text):
        load_checkpoint(folder)


def test_pickled_weights_are_refused(copy: Any) -> None:
    folder = copy()
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(diffusion_pytorch_model\.bin\), which can run code"):
        load_checkpoint(folder)


def test_no_weights_are_refused(copy: Any) -> None:
    folder = copy()
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"unet has no diffusion_pytorch_model\.safetensors; copy the model again"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(copy: Any, keep: int) -> None:
    path = copy() / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"cannot be read as safetensors .*it may be truncated: copy it again"):
        load_checkpoint(path.parents[1])


def test_missing_and_unexpected_weights_are_refused(copy: Any) -> None:
    folder = copy()
    reweight(folder, lambda state: state.update(surprise=state.pop("conv_in.bias")))
    with pytest.raises(
        ModelError, match=r"1 missing \(first: \['conv_in\.bias'\]\), 1 unexpected \(first: \['surprise'\]\)"
    ):
        load_checkpoint(folder)


def test_weights_of_another_shape_are_refused(copy: Any) -> None:
    folder = copy()
    reweight(folder, lambda state: state.update({"conv_in.bias": torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"conv_in\.bias in .* has shape \(3,\); its config\.json asks for \(16,\)"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_with_nan_are_refused(copy: Any, value: float) -> None:
    folder = copy()
    reweight(folder, lambda state: state["conv_out.weight"].view(-1)[5:6].fill_(value))
    with pytest.raises(ModelError, match=r"conv_out\.weight in .* holds NaN or infinite values"):
        load_checkpoint(folder)


def test_output_channels_that_mean_nothing_are_refused(copy: Any) -> None:
    folder = copy()
    configure(folder, out_channels=3)
    reweight(
        folder,
        lambda state: state.update({"conv_out.weight": torch.zeros(3, 16, 3, 3), "conv_out.bias": torch.zeros(3)}),
    )
    with pytest.raises(
        ModelError, match="has 1 input and 3 output channels; qdm-deploy runs models whose output is the noise"
    ):
        load_checkpoint(folder)


def test_another_kind_of_class_embedding_is_refused(copy: Any) -> None:
    folder = copy()
    configure(folder, class_embed_type="identity")
    reweight(folder, lambda state: state.pop("class_embedding.weight"))
    with pytest.raises(ModelError, match="class_embed_type 'identity' is not supported"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("addition_embed_type", {"addition_embed_type": "text"}),
        ("dual_cross_attention", {"dual_cross_attention": True}),
        ("encoder_hid_dim", {"encoder_hid_dim": 24}),
        ("attention_type", {"attention_type": "gated"}),
    ],
)
def test_models_with_unknown_inputs_are_refused(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, projection_class_embeddings_input_dim=64, **changes,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"{name} .* is not supported; supported are "):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'["a"]', r"labels\.json names 1 labels; the U-Net has 3 class embeddings"),
        (b'{"a": 1}', r"labels\.json must hold a JSON list of label names"),
        (b"[1, 2, 3]", r"labels\.json must hold a JSON list of label names"),
        (b"[", r"labels\.json is not JSON"),
        (b"\xff", r"labels\.json is not JSON"),
    ],
)
def test_labels_that_do_not_fit_are_refused(copy: Any, content: bytes, text: str) -> None:
    folder = copy()
    (folder / "labels.json").write_bytes(content)
    with pytest.raises(ModelError, match=text):
        load_checkpoint(folder)


def test_as_many_labels_as_embeddings_leave_no_null_label(copy: Any) -> None:
    folder = copy()
    (folder / "labels.json").write_text('["a", "b", "c"]')
    expected = LabelTable(input="class_labels", num_classes=3, labels=("a", "b", "c"))
    assert load_checkpoint(folder).spec.encoder == expected


def test_latent_models_are_told_by_their_autoencoder(copy: Any) -> None:
    folder = copy()
    (folder / "model_index.json").write_text('{"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}')
    assert load_checkpoint(folder).spec.makes == "latents"


def test_an_unknown_pipeline_is_refused_with_what_is_supported(copy: Any) -> None:
    folder = copy()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(
        ModelError, match=r"the pipeline 'FluxPipeline'; supported are DDIMPipeline, .* its U-Net alone"
    ):
        load_checkpoint(folder)


def test_stable_diffusion_overrules_old_files(tiny: Any, tmp_path: Path) -> None:
    """As diffusers' own pipeline does, and no other family's."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder("text"), folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.6.0"}))
    scheduler = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": True}
    found = {}
    for name in ("DDPMPipeline", "StableDiffusionPipeline"):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        checkpoint = load_checkpoint(folder)
        found[name] = checkpoint.spec.sample_shape, checkpoint.scheduler_config
    assert found["DDPMPipeline"] == ((4, 8, 8), scheduler)
    assert found["StableDiffusionPipeline"] == ((4, 64, 64), {**scheduler, "steps_offset": 1})
