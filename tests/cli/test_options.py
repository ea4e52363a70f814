"""From a command line to the pipeline's options; the pipeline's work is left out."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from qdm_deploy.artifacts.plan import TARGETS
from qdm_deploy.backends import BACKENDS
from qdm_deploy.cli.engine import engine
from qdm_deploy.cli.main import cli
from qdm_deploy.errors import BundleError
from qdm_deploy.pipeline import BuildOptions, CompareOptions, EvaluateOptions, GenerateOptions, ServeOptions
from qdm_deploy.samplers import SAMPLERS

Invoke = Callable[..., Any]
OneDocument = Callable[[str], dict[str, Any]]
Replace = Callable[[str, Callable[..., Any]], None]


def options_of(replace: Replace, invoke: Invoke, verb: str, line: str) -> Any:
    """The options that a command line hands to the pipeline."""
    seen = []

    def record(options: Any, progress: Any) -> Any:
        seen.append(options)
        raise BundleError("far enough")

    replace(verb, record)
    result = invoke(verb, *line.split())
    assert result.exit_code == 3, result.output
    return seen[0]


@pytest.mark.parametrize(
    ("verb", "options", "own", "set_by_command"),
    [
        ("build", BuildOptions, {"int8", "no_engines"}, {"command"}),
        ("generate", GenerateOptions, set(), set()),
        ("compare", CompareOptions, set(), set()),
        ("evaluate", EvaluateOptions, set(), set()),
        ("serve", ServeOptions, set(), {"quiet"}),
    ],
)
def test_every_option_of_the_pipeline_is_on_the_command_line(
    verb: str, options: Any, own: set[str], set_by_command: set[str]
) -> None:
    named = {parameter.name for parameter in cli.commands[verb].params if parameter.expose_value}
    assert named - own == {field.name for field in fields(options)} - set_by_command


def test_defaults_are_those_of_the_pipeline(replace: Replace, invoke: Invoke) -> None:
    built = options_of(replace, invoke, "build", "--int8 --out x.qdm")
    assert built == BuildOptions(out=Path("x.qdm"), command="qdm-deploy build --int8 --out x.qdm")
    made = options_of(replace, invoke, "generate", "x.qdm --out images")
    assert made == GenerateOptions(bundle=Path("x.qdm"), out=Path("images"))
    compared = options_of(replace, invoke, "compare", "x.qdm y.qdm")
    assert compared == CompareOptions(a=Path("x.qdm"), b=Path("y.qdm"))
    assert options_of(replace, invoke, "evaluate", "x.qdm") == EvaluateOptions(bundle=Path("x.qdm"))
    assert options_of(replace, invoke, "serve", "x.qdm") == ServeOptions(bundle=Path("x.qdm"))


@pytest.mark.parametrize(
    ("model", "out"),
    [
        ("", "ddpm-fashion-mnist.qdm"),
        ("google/ddpm-cifar10-32", "ddpm-cifar10-32.qdm"),
        ("../models/mine/", "mine.qdm"),
        ("./v1.5", "v1.5.qdm"),
    ],
)
def test_the_bundle_is_named_after_the_model(model: str, out: str, replace: Replace, invoke: Invoke) -> None:
    assert options_of(replace, invoke, "build", f"--int8 {model}").out == Path(out)


def test_a_model_given_as_a_dot_is_named_after_its_folder(
    replace: Replace, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert options_of(replace, invoke, "build", "--int8 .").out == Path("mine.qdm")


def test_each_option_of_build_arrives(replace: Replace, invoke: Invoke) -> None:
    line = (
        "--int8 m --out o.qdm --force --prompts p.txt --sampler euler --steps 7 --guidance 2.5 --seed 9 --threads 2 "
        "--calib-samples 3 "
        "--calib-steps 4 --strategy ndtc --ndtc-mean 0.1 --ndtc-spread 0.2 --ndtc-count 5 --calibration c.safetensors "
        "--save-calibration s.safetensors --conditioning t.safetensors --ranges mse --no-upsample-phases "
        "--no-zero-offset --concat-scales none --step-bins 2 "
        "--channel-scales auto --keep-fp 5% --no-sensitivity --weight-bits 4 --reconstruct weights "
        "--reconstruct-iterations 11 --output-correction auto "
        "--targets tensorrt,onnxruntime --rest bf16 --engines 8.9,12.0 --no-float --verify-samples 6 --verify-steps 8 "
        "--min-psnr 31 --min-sqnr 26 --min-speedup 1.5"
    )
    built = options_of(replace, invoke, "build", line)
    assert built == BuildOptions(
        out=Path("o.qdm"), model="m", prompts_file=Path("p.txt"),
        targets=("tensorrt", "onnxruntime"), sampler="euler", steps=7, guidance=2.5,
        strategy="ndtc", calibration_samples=3, calibration_steps=4, ndtc_mean=0.1, ndtc_spread=0.2, ndtc_count=5,
        calibration_file=Path("c.safetensors"), save_calibration=Path("s.safetensors"),
        conditioning_file=Path("t.safetensors"), ranges="mse", upsample_phases=False, zero_offset=False,
        concat_scales="none", channel_scales="auto", step_bins=2, keep_fp="5%", sensitivity=False, weight_bits=4,
        reconstruct="weights", reconstruct_iterations=11, output_correction="auto",
        seed=9, rest="bf16", engines=("8.9", "12.0"), float_graph=False, verify_samples=6,
        verify_steps=8, min_psnr_db=31, min_eps_sqnr_db=26, min_speedup=1.5, force=True, threads=2,
        command=f"qdm-deploy build {line}",
    )  # fmt: skip
    defaults = BuildOptions(out=Path("x"))
    unchanged = [field.name for field in fields(built) if getattr(built, field.name) == getattr(defaults, field.name)]
    # Scales of ModelOpt go with none of the options that choose ours.
    assert unchanged == ["from_modelopt"], "the line above must change every other option"
    assert options_of(replace, invoke, "build", "--int8 --from-modelopt a.safetensors").from_modelopt == "a.safetensors"
    assert options_of(replace, invoke, "build", "--int8 --no-engines").engines == ()


def test_step_bins_are_a_number_or_auto(replace: Replace, invoke: Invoke) -> None:
    assert options_of(replace, invoke, "build", "--int8").step_bins == "auto"
    assert options_of(replace, invoke, "build", "--int8 --step-bins 8").step_bins == 8
    assert options_of(replace, invoke, "build", "--int8 --step-bins auto").step_bins == "auto"
    for value, said in ("many", "'many' is neither a number nor auto"), ("40", "step bins is 40; it must be from 1"):
        refused = invoke("build", "--int8", "--step-bins", value)
        assert refused.exit_code == 2
        assert said in refused.stderr


@pytest.mark.parametrize(
    ("verb", "line", "expected"),
    [
        (
            "generate",
            (
                "b.qdm -n 4 --steps 5 --sampler ddpm --eta 0.5 --seed 3 --label 7 --guidance 2 --guidance-rescale 0.5 "
                "--backend openvino --precision float --batch-size 2 --conditioning c --out o --force --threads 1 "
                "--negative-prompt n --clip-skip 1 --weighting --output latents"
            ),
            GenerateOptions(
                bundle=Path("b.qdm"),
                out=Path("o"),
                count=4,
                sampler="ddpm",
                steps=5,
                eta=0.5,
                seed=3,
                prompt="7",
                negative_prompt="n",
                clip_skip=1,
                weighting=True,
                output="latents",
                guidance=2,
                guidance_rescale=0.5,
                backend="openvino",
                precision="float",
                batch_size=2,
                conditioning_file=Path("c"),
                force=True,
                threads=1,
            ),
        ),
        (
            "compare",
            (
                "a b --backend-a openvino --backend-b onnxruntime --precision-a float --precision-b float -n 2 "
                "--steps 3 --sampler ddpm --eta 0.5 --seed 4 --guidance 5 --guidance-rescale 0.5 --conditioning t.st "
                "--out s.png --force --threads 1"
            ),
            CompareOptions(
                a=Path("a"),
                b=Path("b"),
                backend_a="openvino",
                backend_b="onnxruntime",
                precision_a="float",
                precision_b="float",
                samples=2,
                steps=3,
                sampler="ddpm",
                seed=4,
                eta=0.5,
                guidance=5,
                guidance_rescale=0.5,
                conditioning_file=Path("t.st"),
                out=Path("s.png"),
                force=True,
                threads=1,
            ),
        ),
        (
            "evaluate",
            (
                "a --against b -n 9 --paired 2 --features f --cache c --out o.json --html p.html --force "
                "--sampler ddpm --steps 3 --eta 0.5 --seed 4 --guidance 5 --guidance-rescale 0.5 --conditioning t.st "
                "--backend openvino "
                "--batch-size 6 --threads 1"
            ),
            EvaluateOptions(
                bundle=Path("a"),
                against="b",
                num=9,
                paired=2,
                sampler="ddpm",
                steps=3,
                seed=4,
                eta=0.5,
                guidance=5,
                guidance_rescale=0.5,
                conditioning_file=Path("t.st"),
                features=Path("f"),
                backend="openvino",
                threads=1,
                batch_size=6,
                cache=Path("c"),
                out=Path("o.json"),
                html=Path("p.html"),
                force=True,
            ),
        ),
    ],
)
def test_each_option_of_generate_compare_and_evaluate_arrives(
    verb: str, line: str, expected: Any, replace: Replace, invoke: Invoke
) -> None:
    assert options_of(replace, invoke, verb, line) == expected
    same = {field.name for field in fields(expected) if field.default == getattr(expected, field.name)}
    # Two of these are refused unless they exist, and the third beside a prompt.
    assert same - {"inception_weights", "real_images", "prompts_file"} == set(), (
        "the line above must change every option"
    )


def test_the_files_for_fid_arrive(replace: Replace, invoke: Invoke, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.touch()
    line = f"a --inception-weights {weights} --real-images {tmp_path}"
    expected = EvaluateOptions(bundle=Path("a"), inception_weights=weights, real_images=tmp_path)
    assert options_of(replace, invoke, "evaluate", line) == expected


def test_one_bundle_is_compared_with_itself_where_something_differs(replace: Replace, invoke: Invoke) -> None:
    expected = CompareOptions(a=Path("a"), b=Path("a"), backend_a="onnxruntime", backend_b="openvino")
    line = "a --backend-a onnxruntime --backend-b openvino"
    assert options_of(replace, invoke, "compare", line) == expected
    replace("compare", lambda options, progress: pytest.fail("was called"))
    result = invoke("compare", "a")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: one bundle was given, and A and B run it alike; give another bundle, or")


def test_help_names_what_the_pipeline_takes(invoke: Invoke) -> None:
    def words(verb: str, option: str) -> str:
        command = engine.commands["build"] if verb == "engine build" else cli.commands[verb]
        parameters = {name: parameter for parameter in command.params for name in parameter.opts}
        parameter = parameters[option]
        assert isinstance(parameter, click.Option)
        return f"{parameter.help} {parameter.default}"

    for verb in ("build", "generate", "compare", "evaluate"):
        assert [name for name in SAMPLERS if name not in words(verb, "--sampler")] == []
    for verb, option in (
        ("generate", "--backend"),
        ("compare", "--backend-a"),
        ("verify", "--backend"),
        ("evaluate", "--backend"),
        ("serve", "--backend"),
    ):
        assert [name for name in BACKENDS if not name.startswith("tensorrt") and name not in words(verb, option)] == []
    assert [
        name for name in BACKENDS if name.startswith("tensorrt") and name not in words("engine build", "--backend")
    ] == []
    assert [name for name in TARGETS if name not in words("build", "--targets")] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--int8", "--sampler", "dimm"], "unknown sampler 'dimm' (did you mean ddim?); choose one of"),
        (["build", "--int8", "--targets", "onnxruntime,tensort"], "unknown target 'tensort' (did you mean tensorrt?)"),
        (["generate", "x.qdm", "--out", "o", "-n", "0"], "the number of images is 0; it must be from 1 to"),
    ],
)
def test_values_that_the_pipeline_refuses(
    arguments: list[str], said: str, replace: Replace, invoke: Invoke, one_document: OneDocument
) -> None:
    replace(arguments[0], lambda options, progress: pytest.fail("was called"))
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}")
    error = one_document(invoke(*arguments, "--json").stdout)["error"]
    assert (error["code"], error["type"], error["message"].startswith(said)) == (2, "InputError", True)
