import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.backends.doctor import Finding

ROOT = Path(__file__).parents[2]
FINDINGS = [
    Finding("python", "OK", "3.11"),
    Finding("openvino", "WARN", "not installed", "pip install 'qdm-deploy[openvino]'"),
    Finding("onnxruntime", "FAIL", "not installed", "pip install onnxruntime"),
]

# Installed packages of the build extra and of the optional backends, hidden as on a machine that has the core only.
CORE_ONLY = """
import importlib.util, sys
hidden = {"torch", "diffusers", "onnx", "onnxscript", "onnx_ir", "openvino", "tensorrt", "tensorrt_rtx"}
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in hidden else real(name, package)
sys.modules.update(dict.fromkeys(hidden))
from qdm_deploy.cli.main import main
main()
"""


def test_this_machine_is_fit(
    run: Callable[..., subprocess.CompletedProcess[str]], one_document: Callable[[str], dict[str, Any]]
) -> None:
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "onnxruntime" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(" 0 FAIL: qdm-deploy runs on this machine")

    done = run("doctor", "--json")
    document = one_document(done.stdout)
    assert (done.returncode, done.stderr, document["ok"]) == (0, "", True)
    assert {entry["status"] for entry in document["findings"]} <= {"OK", "WARN"}
    assert set(document["findings"][0]) == {"name", "status", "detail", "fix"}


def test_a_bare_installation_is_fit_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CORE_ONLY, "doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "OK   onnxruntime " in done.stdout
    assert "WARN torch " in done.stdout
    assert "fix: pip install 'qdm-deploy[build]'" in done.stdout


def test_the_cache_that_is_looked_at_is_the_one_that_is_used(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run("doctor", env={"QDM_CACHE_DIR": str(tmp_path)})
    assert f"{tmp_path / 'engines'} can be written" in done.stdout


def test_fail_sets_the_exit_code_and_each_problem_has_its_fix(
    monkeypatch: pytest.MonkeyPatch, invoke: Callable[..., Any], one_document: Callable[[str], dict[str, Any]]
) -> None:
    monkeypatch.setattr("qdm_deploy.backends.doctor.examine", lambda cache: FINDINGS)
    result = invoke("doctor")
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout == (
        "OK   python       3.11\n"
        "WARN openvino     not installed\n"
        "                  fix: pip install 'qdm-deploy[openvino]'\n"
        "FAIL onnxruntime  not installed\n"
        "                  fix: pip install onnxruntime\n"
        "\n"
        "1 OK, 1 WARN, 1 FAIL: qdm-deploy cannot run here as it is\n"
    )
    assert invoke("doctor", "-q").stdout == "WARN openvino: not installed\nFAIL onnxruntime: not installed\n"
    result = invoke("doctor", "--json")
    assert (result.exit_code, one_document(result.stdout)["ok"]) == (1, False)
