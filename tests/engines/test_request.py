"""What may be asked of a build, and what is asked of the machine."""

import ctypes
import ctypes.util
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from qdm_deploy.engines import flavour
from qdm_deploy.engines.builder import build_plan
from qdm_deploy.engines.flavour import FLAVOURS, flavour_of, target_of
from qdm_deploy.engines.gpu import Gpu, driver_release, installed_gpu
from qdm_deploy.engines.onnx_files import data_files
from qdm_deploy.engines.request import BatchProfile, BuildOptions, BuildRequest
from qdm_deploy.engines.worker import run_build
from qdm_deploy.errors import EngineError, EnvironmentProblem, InputError, ResourceProblem

WITHOUT_DRIVER = pytest.mark.skipif(
    ctypes.util.find_library("cuda") is not None, reason="shows the message of a machine without an NVIDIA driver"
)


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_profile_is_ordered(sizes: tuple[int, int, int]) -> None:
    text = ":".join(map(str, sizes))
    with pytest.raises(InputError, match=f"the batch profile {text} is not usable"):
        BatchProfile(*sizes)


@pytest.mark.parametrize(
    ("level", "workspace", "message"), [(6, None, "is 0 to 5, not 6"), (3, 0, "a positive number of bytes, not 0")]
)
def test_options_are_in_range(level: int, workspace: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BuildOptions(level, workspace)


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="'openvino' is not an engine backend; the engine backends are tensorrt, tens"):
        flavour_of("openvino")


def test_default_capability() -> None:
    assert target_of(FLAVOURS["tensorrt-rtx"], None) == ("8.9", "SM 8.9")


def test_hopper_is_sent_to_the_other_backend() -> None:
    with pytest.raises(InputError, match=r"'9.0'; it builds for .* \(Hopper, 9.0, is served by the backend 'tensorrt'"):
        target_of(FLAVOURS["tensorrt-rtx"], "9.0")


@WITHOUT_DRIVER
def test_machine_without_a_driver_is_told_so() -> None:
    with pytest.raises(
        EnvironmentProblem,
        match=r"'tensorrt' works on a GPU, and this machine has no NVIDIA driver.*engine build --backend",
    ):
        installed_gpu("tensorrt")


@WITHOUT_DRIVER
def test_tensorrt_needs_the_gpu_it_builds_for() -> None:
    with pytest.raises(EnvironmentProblem, match="engine build --backend tensorrt-rtx"):
        target_of(FLAVOURS["tensorrt"], None)


def test_tensorrt_builds_for_the_gpu_at_hand_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "installed_gpu", lambda backend: Gpu("NVIDIA H100", "9.0", "580.65 (CUDA 13.0)"))
    assert target_of(FLAVOURS["tensorrt"], None) == (None, "NVIDIA H100, SM 9.0, driver 580.65 (CUDA 13.0)")
    with pytest.raises(InputError, match=r"NVIDIA H100 \(compute capability 9\.0\), not for '8\.9'"):
        target_of(FLAVOURS["tensorrt"], "8.9")


def test_driver_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    no_device = 100
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda flags: no_device))
    with pytest.raises(
        EnvironmentProblem, match="the NVIDIA driver answers cuInit with CUDA error 100; check nvidia-smi"
    ):
        installed_gpu("tensorrt")


@WITHOUT_DRIVER
@pytest.mark.usefixtures("rtx")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # TensorRT-RTX has deprecated the timing cache, TensorRT has not
def test_tensorrt_path_goes_as_far_as_loading_the_plan(
    tmp_path: Path, new_graph: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The two modules share their API, so the one that runs without a GPU stands in for the other up to the inspector.
    library = importlib.import_module("tensorrt_rtx")
    monkeypatch.setattr(library, "__version__", "10.13.0")
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    graph = new_graph()
    graph.node("Relu", ["x"], "y")
    request = request_for(tmp_path, "tensorrt", graph.save(tmp_path / "g.onnx"))
    request = request.model_copy(update={"sm": "8.9", "timing_cache": tmp_path / "timing.cache"})
    phases: list[tuple[str, int, int]] = []
    with pytest.raises(EngineError, match=r"built and cannot be loaded again: .*cudaError 35"):
        build_plan(request, lambda *reached: phases.append(reached))
    assert phases[0] == ("parsing the graph", 0, 0)
    assert [reached for reached in phases if reached[0] == "building engine"] == [
        ("building engine", 6, done) for done in range(6)
    ]
    assert phases[-1] == ("inspecting the engine", 0, 0)
    assert request.plan.stat().st_size > 0
    assert (tmp_path / "timing.cache").exists()


@pytest.mark.usefixtures("rtx")
def test_builder_that_cannot_start_is_explained(
    tmp_path: Path, new_graph: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(logger: object) -> object:
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(importlib.import_module("tensorrt_rtx"), "Builder", refuse)
    with pytest.raises(EnvironmentProblem, match=r"cannot start on this machine \(factory function returned nullptr\)"):
        build_plan(request_for(tmp_path, "tensorrt-rtx", tmp_path / "g.onnx"), lambda *reached: None)


def test_data_files_are_found_in_attributes_and_subgraphs(tmp_path: Path) -> None:
    def external(name: str, location: str) -> onnx.TensorProto:
        (tmp_path / location).write_bytes(bytes(8))
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[2])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="offset", value="0")
        tensor.external_data.add(key="location", value=location)
        return tensor

    branch = onnx.helper.make_graph([], "branch", [], [], [external("c", "c.bin")])
    nodes = [
        onnx.helper.make_node("Constant", [], ["b"], value=external("b", "b.bin")),
        onnx.helper.make_node("If", ["p"], ["y"], then_branch=branch, else_branch=branch),
    ]
    initializers = [external("a", "a.bin"), external("a2", "a.bin"), onnx.numpy_helper.from_array(np.ones(3), "i")]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], initializers)), tmp_path / "g.onnx")
    assert data_files(tmp_path / "g.onnx") == tuple(tmp_path / name for name in ("a.bin", "b.bin", "c.bin"))

    (tmp_path / "b.bin").unlink()
    with pytest.raises(EngineError, match=r"keeps weights in 'b.bin', and there is no such file"):
        data_files(tmp_path / "g.onnx")


def test_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(
        name="a", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="../secret")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    (tmp_path / "g.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(EngineError, match=r"keeps weights in '../secret', outside its own folder"):
        data_files(tmp_path / "g.onnx")


@pytest.mark.parametrize("content", [b"\x3a\x7fshort", b"\x0f", b"\xff" * 12, b""])
def test_other_files_are_not_graphs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"g.onnx is not an ONNX file, or is cut short"):
        data_files(path)


def test_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none.onnx cannot be read: No such file"):
        data_files(tmp_path / "none.onnx")


def request_for(tmp_path: Path, backend: str, graph: Path, plan: str = "engine.plan") -> BuildRequest:
    return BuildRequest(
        backend=backend,
        graph=graph,
        plan=tmp_path / plan,
        log=tmp_path / "log.txt",
        layers=tmp_path / "layers.json",
        sm=None if backend == "tensorrt" else "8.9",
        profile=BatchProfile(),
        options=BuildOptions(),
    )


def test_errors_cross_the_process_boundary_with_their_type(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed; shows how its absence is reported")
    with pytest.raises(EnvironmentProblem, match="the backend 'tensorrt' needs the Python module 'tensorrt'"):
        run_build(request_for(tmp_path, "tensorrt", tmp_path / "g.onnx"))


def test_process_that_cannot_start_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qdm_deploy").mkdir()
    (tmp_path / "qdm_deploy/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"builder ended with exit status 1 while starting[\s\S]*No module named"):
        run_build(request_for(tmp_path, "tensorrt-rtx", tmp_path / "g.onnx"))


@pytest.mark.usefixtures("rtx")
def test_full_disk_is_a_resource_problem(tmp_path: Path, new_graph: type) -> None:
    graph = new_graph()
    graph.node("Relu", ["x"], "y")
    (tmp_path / "full.plan").symlink_to("/dev/full")
    with pytest.raises(ResourceProblem, match=r"full.plan \(No space left on device\)"):
        run_build(request_for(tmp_path, "tensorrt-rtx", graph.save(tmp_path / "g.onnx"), "full.plan"))


def test_driver_release_is_read_from_the_kernel_module(tmp_path: Path) -> None:
    report = tmp_path / "version"
    assert driver_release(report) is None
    report.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:15:55 UTC 2026\n")
    assert driver_release(report) == "580.65.06"
    report.write_text("something else\n")
    assert driver_release(report) is None


def test_the_number_of_auxiliary_streams_is_not_negative() -> None:
    with pytest.raises(InputError, match="the number of auxiliary streams is 0 or more, not -1"):
        BuildOptions(auxiliary_streams=-1)


@pytest.mark.usefixtures("rtx")
def test_float32_products_are_not_tf32(tmp_path: Path, new_graph: type, monkeypatch: pytest.MonkeyPatch) -> None:
    library = importlib.import_module("tensorrt_rtx")
    allowed, real = [], library.Builder

    class Watched:
        def __init__(self, logger: Any) -> None:
            self.builder = real(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.builder, name)

        def build_serialized_network(self, network: object, config: Any) -> None:
            allowed.append(config.get_flag(library.BuilderFlag.TF32))

    monkeypatch.setattr(library, "Builder", Watched)
    graph = new_graph()
    graph.node("Relu", ["x"], "y")
    with pytest.raises(EngineError, match="no engine could be built"):
        build_plan(request_for(tmp_path, "tensorrt-rtx", graph.save(tmp_path / "g.onnx")), lambda *reached: None)
    assert allowed == [False]
