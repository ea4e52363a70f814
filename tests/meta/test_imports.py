"""Importing qdm_deploy loads no heavy library, and modules export what they say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [ROOT / "qdm_deploy", ROOT / "calibration/qdm_calibration", ROOT / "export/qdm_export"]
BUILD_LIBRARIES = {
    "diffusers", "huggingface_hub", "onnx", "onnx_ir", "onnxscript", "qdm_calibration", "qdm_export", "scipy", "torch",
    "transformers",
}  # fmt: skip
ENGINE_LIBRARIES = {"cuda", "openvino", "tensorrt", "tensorrt_rtx"}


def module_names(package: Path) -> list[str]:
    """Import names of the modules in a package's folder, without ``__main__``."""
    relative = [path.relative_to(package.parent).with_suffix("") for path in sorted(package.rglob("*.py"))]
    return [".".join(path.parts).removesuffix(".__init__") for path in relative if path.name != "__main__"]


def loaded_after_importing(modules: list[str]) -> set[str]:
    """Top-level modules that a new interpreter holds after these imports."""
    program = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(modules)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_package_and_command_line_start_without_any_engine_or_build_library() -> None:
    loaded = loaded_after_importing(["qdm_deploy", "qdm_deploy.cli.main"])
    assert "click" in loaded
    assert loaded & (BUILD_LIBRARIES | ENGINE_LIBRARIES | {"onnxruntime"}) == set()


def test_no_module_of_qdm_deploy_imports_a_build_or_optional_library() -> None:
    loaded = loaded_after_importing(module_names(ROOT / "qdm_deploy"))
    assert "pydantic" in loaded
    assert loaded & (BUILD_LIBRARIES | ENGINE_LIBRARIES) == set()


@pytest.mark.parametrize("name", [name for package in PACKAGES for name in module_names(package)])
def test_every_exported_name_exists(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert [entry for entry in exported if not hasattr(module, entry)] == []
    assert len(set(exported)) == len(exported)
