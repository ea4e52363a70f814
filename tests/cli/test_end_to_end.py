"""The program as its users run it: a small build of the built-in model, then every command on the bundle."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "qdm_deploy.cli.main")
# Too small for a good model, large enough for every stage.
SMALL = (
    "--steps", "4", "--verify-samples", "1", "--verify-steps", "2", "--engines", "none", "--targets", "onnxruntime",
)  # fmt: skip
RECIPE = """
base = "fast"
[calibration]
samples = 2
steps = 2
[activations]
step_bins = 2
"""

OneDocument = Callable[[str], dict[str, Any]]
pytestmark = pytest.mark.slow


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A bundle and the run that made it."""
    bundle = tmp_path_factory.mktemp("built") / "small.qdm"
    recipe = bundle.with_suffix(".toml")
    recipe.write_text(RECIPE)
    return bundle, run("build", "--int8", "--recipe", recipe, "--out", bundle, *SMALL, "--json")


@pytest.fixture
def bundle(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return built[0]


def test_build_returns_its_verdict_as_one_document(
    built: tuple[Path, subprocess.CompletedProcess[str]], one_document: OneDocument
) -> None:
    bundle, done = built
    document = one_document(done.stdout)
    assert "report" in document, document
    assert document["bundle"] == str(bundle)
    assert done.returncode == (0 if document["report"]["verdict"]["ship"] else 1)
    assert document["report"]["command"].startswith(f"qdm-deploy build --int8 --out {bundle} ")
    assert "Sampling the calibration set" in done.stderr
    assert (bundle / "report.html").is_file()


def test_the_bundle_is_not_replaced_without_force(bundle: Path) -> None:
    done = run("build", "--int8", "--out", bundle, *SMALL)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(bundle) in done.stderr
    assert "--force" in done.stderr


def test_generate_writes_the_images_it_names(bundle: Path, tmp_path: Path, one_document: OneDocument) -> None:
    line = ("generate", bundle, "-n", "3", "--steps", "2", "--backend", "onnxruntime", "--out", tmp_path / "images")
    done = run(*line, "--json")
    document = one_document(done.stdout)
    assert (done.returncode, len(document["images"]), document["seeds"]) == (0, 3, [0, 1, 2])
    for path in (*document["images"], document["sheet"]):
        with Image.open(path) as image:
            image.verify()
    again = run(*line)
    assert (again.returncode, again.stdout) == (2, "")
    assert str(tmp_path / "images") in again.stderr
    assert run(*line, "--force", "-q").stdout.splitlines() == document["images"]


def test_an_unknown_label_is_refused_with_a_suggestion(bundle: Path, tmp_path: Path) -> None:
    done = run("generate", bundle, "--label", "sneeker", "--out", tmp_path / "images")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown label 'sneeker' (did you mean Sneaker?)")
    assert list(tmp_path.iterdir()) == []


def test_inspect_lists_every_layer(bundle: Path, one_document: OneDocument) -> None:
    document = one_document(run("inspect", bundle, "--json").stdout)
    names = [layer["name"] for layer in document["layers"]]
    assert document["plan_summary"]["layers"] == len(names) > 50
    listed = [line.split()[0] for line in run("inspect", bundle).stdout.splitlines() if line.strip()]
    assert [name for name in names if name not in listed] == []


def test_verify_and_compare_on_a_good_bundle(bundle: Path, tmp_path: Path) -> None:
    done = run("verify", bundle, "--backend", "onnxruntime")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{bundle} is good")
    strip = tmp_path / "strip.png"
    done = run(
        "compare", bundle, bundle, "--backend-a", "onnxruntime", "--backend-b", "onnxruntime", "--precision-a", "float",
        "-n", "1", "--steps", "2", "--out", strip,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sample SQNR at the end: " in done.stdout
    with Image.open(strip) as image:
        image.verify()


def test_a_changed_bundle_is_refused(bundle: Path, tmp_path: Path, one_document: OneDocument) -> None:
    copy = tmp_path / "copy.qdm"
    subprocess.run(["cp", "-r", bundle, copy], check=True)
    with (copy / "unet/plan.json").open("a") as file:
        file.write(" ")
    (copy / "extra.txt").write_text("x")
    done = run("verify", copy)
    assert done.returncode == 3
    assert "unet/plan.json" in done.stdout
    assert "extra.txt" in done.stdout
    done = run("generate", copy, "--out", tmp_path / "images", "--json")
    assert (done.returncode, one_document(done.stdout)["error"]["type"]) == (3, "BundleError")
    assert not (tmp_path / "images").exists()


def test_ctrl_c_stops_a_build_and_leaves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    command = [*PROGRAM, "build", "--int8", "--out", str(out / "x.qdm"), "--engines", "none"]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert any(line.startswith("Sampling the calibration set") for line in process.stderr)
        assert len(list(out.iterdir())) == 1, "the build writes beside the final name"
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert said.splitlines()[-1] == "error: stopped; nothing was written"
    assert "Traceback" not in said
    assert list(out.iterdir()) == []
    # The libraries keep files of their own there.
    assert list(scratch.glob("qdm-deploy-*")) == []
