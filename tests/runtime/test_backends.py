import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.artifacts.bundle import Bundle, BundleWriter
from qdm_deploy.artifacts.manifest import Compatibility
from qdm_deploy.backends import opening as backends
from qdm_deploy.backends.opening import BACKENDS, automatic_backend, open_session
from qdm_deploy.errors import BundleError, InputError
from qdm_deploy.runtime.cpu import saturates_int8


@pytest.fixture(scope="module")
def bundle(plain: Any, labelled: Any, learned: Any, folder: Path) -> Bundle:
    """Three distinct graphs, so that a test sees which one was opened."""
    return _write(folder / "tiny.qdm", plain, {"onnxruntime": plain, "openvino": labelled, "float": learned})


@pytest.fixture(scope="module")
def small(plain: Any, folder: Path) -> Bundle:
    return _write(folder / "small.qdm", plain, {"onnxruntime": plain})


def _write(path: Path, model: Any, graphs: dict[str, Any]) -> Bundle:
    with BundleWriter(path) as writer:
        (writer.root / "unet").mkdir()
        for target, tiny in graphs.items():
            shutil.copyfile(tiny.graph, writer.root / "unet" / f"{target}.onnx")
        writer.publish(
            name="tiny",
            pipeline=model.spec,
            targets=[target for target in graphs if target != "float"],
            compatibility=Compatibility(opset=21, min_runtime="0.1.0"),
            provenance={},
            recipe={},
        )
    return Bundle.open(path)


def test_each_backend_opens_its_own_graph(bundle: Bundle) -> None:
    opened = {}
    for backend, precision in [
        ("onnxruntime", "int8"),
        ("openvino", "int8"),
        ("onnxruntime", "float"),
        ("openvino", "float"),
    ]:
        with open_session(bundle, backend, precision=precision, threads=1) as session:  # type: ignore[arg-type]
            known = session.describe()
            opened[backend, precision] = (known["backend"], known["graph_sha256"], known["threads"])
    by_path = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    assert opened == {
        ("onnxruntime", "int8"): ("onnxruntime", by_path["unet/onnxruntime.onnx"], 1),
        ("openvino", "int8"): ("openvino", by_path["unet/openvino.onnx"], 1),
        ("onnxruntime", "float"): ("onnxruntime", by_path["unet/float.onnx"], 1),
        ("openvino", "float"): ("openvino", by_path["unet/float.onnx"], 1),
    }


def test_float_is_float32_also_on_openvino(bundle: Bundle) -> None:
    with open_session(bundle, "openvino", precision="float") as session:
        assert session.describe()["precision"] == "f32"
        assert session.describe()["precision_reason"] == "asked for"


def test_auto_takes_what_the_bundle_was_built_for(small: Bundle) -> None:
    with open_session(small) as session:
        assert session.describe()["backend"] == "onnxruntime"
    assert automatic_backend(("onnxruntime", "tensorrt")) == "onnxruntime"


@pytest.mark.parametrize(
    ("flags", "first"), [({"avx2"}, "onnxruntime"), ({"avx2", "avx_vnni"}, "openvino"), ({"asimddp"}, "onnxruntime")]
)
def test_the_backend_that_is_usually_faster_comes_first(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], first: str
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(backends, "saturates_int8", lambda: saturates_int8(frozenset(flags)))
    monkeypatch.setattr(backends.platform, "machine", lambda: "aarch64" if "asimddp" in flags else "x86_64")
    assert automatic_backend(("onnxruntime", "openvino", "tensorrt")) == first


def test_a_graph_that_was_not_built(small: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no graph for 'openvino'; it has: onnxruntime"):
        open_session(small, "openvino")
    with pytest.raises(BundleError, match=r"no graph for 'float'"):
        open_session(small, "onnxruntime", precision="float")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cuda"}, "the backend 'cuda' is unknown; choose one of auto, onnxruntime, openvino, tensorrt"),
        ({"precision": "fp16"}, "the precision 'fp16' is unknown; choose auto, int8 or float"),
        ({"threads": 0}, "0 threads cannot run anything"),
    ],
)
def test_wrong_arguments(small: Bundle, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_session(small, **arguments)


@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_gpu_backend_gets_the_graph_of_its_target(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str, precision: Any
) -> None:
    asked: list[tuple[Path, str, int]] = []

    def opened(graph: Path, name: str, *, kept_batch_sizes: int, progress: Any) -> None:
        asked.append((graph, name, kept_batch_sizes))

    monkeypatch.setattr(backends, "open_tensorrt", opened)
    monkeypatch.setattr(Bundle, "graph", lambda self, name: Path(f"{name}.onnx"))
    open_session(bundle, backend, precision=precision, kept_batch_sizes=7)
    assert asked == [(Path("tensorrt.onnx" if precision == "int8" else "float.onnx"), backend, 7)]


def test_a_module_may_come_from_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"onnxruntime \d+\.\d+.*", backends._versions("onnxruntime"))

    def version(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "1.32.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(backends, "version", version)
    monkeypatch.setattr(backends, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    assert backends._versions("onnxruntime") == "onnxruntime-gpu 1.32.0"
    assert backends._versions("openvino") == "openvino"


def test_every_backend_can_be_opened_or_says_why_not(small: Bundle) -> None:
    assert BACKENDS == ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
    with pytest.raises(BundleError, match=r"no graph for 'tensorrt'; it has: onnxruntime"):
        open_session(small, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("module", "session", "advice"),
    [
        ("openvino", "openvino.session.OpenVinoSession", "pip install 'qdm-deploy[openvino]'"),
        ("onnxruntime", "onnxruntime.session.OnnxRuntimeSession", "pip install --force-reinstall onnxruntime"),
    ],
)
def test_a_backend_that_cannot_be_imported(plain: Any, module: str, session: str, advice: str) -> None:
    file, name = session.rsplit(".", 1)
    code = (
        "import sys\n"
        f"sys.modules[{module!r}] = None\n"
        "from pathlib import Path\n"
        "from qdm_deploy.errors import EnvironmentProblem\n"
        f"from qdm_deploy.backends.{file} import {name}\n"
        "try:\n"
        f"    {name}(Path({str(plain.graph)!r}))\n"
        "except EnvironmentProblem as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert advice in done.stdout
    assert f"import of {module} halted" in done.stdout
