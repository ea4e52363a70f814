"""From a command line to the pipeline's options; the pipeline's work is left out."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from qdm_deploy.artifacts.plan import TARGETS
from qdm_deploy.artifacts.recipe import Recipe
from qdm_deploy.backends import BACKENDS
from qdm_deploy.cli import moved_options
from qdm_deploy.cli.engine import engine
from qdm_deploy.cli.main import cli
from qdm_deploy.errors import BundleError
from qdm_deploy.pipeline import BuildOptions, CompareOptions, EvaluateOptions, GenerateOptions, ServeOptions
from qdm_deploy.samplers import SAMPLERS
from tests.recipes import recipe_of

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
        ("build", BuildOptions, {"int8"}, {"command"}),
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
        "--int8 m --recipe w4a8 --out o.qdm --force --sampler euler --steps 7 --guidance 2.5 --seed 9 --threads 2 "
        "--calibration c.safetensors --save-calibration s.safetensors --conditioning t.safetensors "
        "--targets tensorrt,onnxruntime --engines 8.9,12.0 --no-float --verify-samples 6 --verify-steps 8 "
        "--min-psnr 31 --min-sqnr 26 --min-speedup 1.5"
    )
    built = options_of(replace, invoke, "build", line)
    assert built == BuildOptions(
        out=Path("o.qdm"), model="m", recipe=recipe_of(bits=4, reconstruct="weights"),
        targets=("tensorrt", "onnxruntime"), sampler="euler", steps=7, guidance=2.5,
        calibration_file=Path("c.safetensors"), save_calibration=Path("s.safetensors"),
        conditioning_file=Path("t.safetensors"), seed=9, engines=("8.9", "12.0"), float_graph=False, verify_samples=6,
        verify_steps=8, min_psnr_db=31, min_eps_sqnr_db=26, min_speedup=1.5, force=True, threads=2,
        command=f"qdm-deploy build {line}",
    )  # fmt: skip
    defaults = BuildOptions(out=Path("x"))
    unchanged = [field.name for field in fields(built) if getattr(built, field.name) == getattr(defaults, field.name)]
    assert unchanged == [], "the line above must change every option"
    assert options_of(replace, invoke, "build", "--int8 --engines none").engines == ()


def test_build_has_at_most_20_options_and_its_help_fits_a_screen_and_a_half(invoke: Invoke) -> None:
    shown = [
        parameter for parameter in cli.commands["build"].params
        if isinstance(parameter, click.Option) and parameter.expose_value and not parameter.hidden
    ]  # fmt: skip
    assert len(shown) <= 20
    assert len(invoke("build", "--help").output.splitlines()) <= 75


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--weight-bits 4", "--weight-bits is a key of the recipe now: weights.bits."),
        ("--ranges mse", "--ranges is a key of the recipe now: activations.ranges and weights.ranges."),
        ("--no-zero-offset", "--no-zero-offset is a key of the recipe now: activations.zero_offset."),
        ("--ndtc-mean 0", "--ndtc-mean is a key of the recipe now: calibration.mean."),
        ("--no-engines", "--no-engines is --engines none now"),
    ],
)
def test_an_option_that_became_a_key_says_which(words: str, said: str, invoke: Invoke) -> None:
    refused = invoke("build", "--int8", *words.split())
    assert refused.exit_code == 2
    assert said in refused.stderr


def test_every_key_that_an_option_became_is_one() -> None:
    known = {
        f"{name}.{key}"
        for name, field in Recipe.model_fields.items()
        for key in getattr(field.annotation, "model_fields", ())
    } | set(Recipe.model_fields)
    named = {part for keys in moved_options.KEYS.values() for part in keys.split(" and ")}
    assert named <= known
    assert len(moved_options.KEYS) == 20


@pytest.mark.parametrize(
    ("verb", "line", "expected"),
    [
        (
            "generate",
            (
                "b.qdm -n 4 --steps 5 --sampler ddpm --eta 0.5 --seed 3 --label 7 --guidance 2 --backend openvino "
                "--precision float --batch-size 2 --conditioning c --out o --force --threads 1"
            ),
            GenerateOptions(
                bundle=Path("b.qdm"),
                out=Path("o"),
                count=4,
                sampler="ddpm",
                steps=5,
                eta=0.5,
                seed=3,
                label="7",
                guidance=2,
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
                "--steps 3 --sampler ddpm --seed 4 --guidance 5 --conditioning t.st --out s.png --force --threads 1"
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
                guidance=5,
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
                "--sampler ddpm --steps 3 --seed 4 --guidance 5 --conditioning t.st --backend openvino "
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
                guidance=5,
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
    # These two are refused unless they exist.
    assert same - {"inception_weights", "real_images"} == set(), "the line above must change every option"


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
