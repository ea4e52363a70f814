"""Real engines, cross-built by TensorRT-RTX on the CPU."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.engines.audit import PlannedLayer
from qdm_deploy.engines.builder import _set_capability
from qdm_deploy.engines.cache import EngineCache
from qdm_deploy.engines.engine import engine_from_onnx
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.engines.request import BatchProfile, BuildOptions
from qdm_deploy.errors import EngineError, EnvironmentProblem, InputError, ResourceProblem
from qdm_deploy.progress import Advance

pytestmark = pytest.mark.usefixtures("rtx")

Blocks = Callable[..., Path]


class Heard:
    """A progress that remembers what was said; ``interrupt`` makes its first step a Ctrl-C."""

    def __init__(self, *, interrupt: bool = False) -> None:
        self.lines: list[str] = []
        self.steps = 0
        self.interrupt = interrupt

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        def advance(steps: int = 1) -> None:
            self.steps += steps
            if self.interrupt:
                raise KeyboardInterrupt

        yield advance

    def say(self, message: str) -> None:
        self.lines.append(message)


def worker_processes(anywhere: str = "") -> list[int]:
    """Build processes of this one; or, of any parent, those with a file open under a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"qdm_deploy.engines.worker" not in (process / "cmdline").read_bytes():
                continue
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            opened = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue  # it ended meanwhile
        if any(name.startswith(anywhere) for name in opened) if anywhere else parent == os.getpid():
            found.append(int(process.name))
    return found


def test_an_engine_removed_before_it_was_read_is_built_again(
    blocks: Blocks, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, entry, removals = blocks("int8"), EngineCache.entry, ["once"]

    def raced(self: EngineCache, *arguments: Any, **options: Any) -> Any:
        found = entry(self, *arguments, **options)
        if removals:
            removals.clear()
            self.remove(found[0].name)
        return found

    monkeypatch.setattr(EngineCache, "entry", raced)
    heard = Heard()
    assert engine_from_onnx(graph, cache=cache, progress=heard).path.exists()
    assert "was removed by another process and is built again" in "".join(heard.lines)


def test_planned_convolutions_are_compiled_in_int8(blocks: Blocks, cache: EngineCache) -> None:
    heard = Heard()
    engine = engine_from_onnx(blocks("int8", "int8", "int8"), cache=cache, progress=heard)

    assert engine.path.stat().st_size > 10_000
    assert not engine.from_cache
    assert heard.steps == 5  # those of the builder's outermost phase
    assert "SM 8.9" in heard.lines[0]
    summary = engine.audit.summary()
    assert {key: summary[key] for key in ("convolutions", "convolutions_int8", "planned", "planned_int8")} == {
        "convolutions": 3,
        "convolutions_int8": 3,
        "planned": 3,
        "planned_int8": 3,
    }
    # Shift and quantization ride in the norm's kernel, save in the first block: the input comes in another layout.
    assert summary["quantizes"] == 1
    assert summary["dequantizes"] == summary["fake_quantizes"] == summary["round_trips"] == 0
    fused = [kernel for kernel in engine.audit.kernels if "block1.norm/node" in kernel.onnx_nodes and kernel.inputs]
    assert [kernel.outputs[-1].dtype for kernel in fused] == ["Int8"]
    assert "block1.u.q/node" in fused[0].onnx_nodes


def test_float_convolution_is_counted_and_fails_only_when_planned(blocks: Blocks, cache: EngineCache) -> None:
    graph = blocks("int8", "float16")
    engine = engine_from_onnx(graph, cache=cache)
    assert engine.audit.summary()["convolutions_int8"] == 1

    by_weight = [PlannedLayer("block0.weight"), PlannedLayer("block1.weight")]
    failures = engine.audit.failures(by_weight)
    assert [failure.name for failure in failures] == ["block1.weight"]
    assert "multiplies Half activations with Half weights" in failures[0].reason
    with pytest.raises(EngineError, match=r"1 of 2 planned INT8 layers .*\n  block1.weight: kernel block1.conv/node"):
        engine_from_onnx(graph, cache=cache, planned=by_weight)


def test_turing_has_no_int8_convolutions_and_the_build_says_so(blocks: Blocks, cache: EngineCache) -> None:
    graph = blocks("int8")
    with pytest.raises(EngineError, match=r"1 of 1 planned INT8 layers .*\n  block0.conv/node: .* Half activations"):
        engine_from_onnx(graph, cache=cache, sm="7.5")
    engine = engine_from_onnx(graph, cache=cache, sm="7.5", planned=())
    assert engine.from_cache  # it was built all the same, and its log can be read
    summary = engine.audit.summary()
    assert {key: summary[key] for key in ("convolutions", "convolutions_int8", "planned", "planned_int8")} == {
        "convolutions": 1,
        "convolutions_int8": 0,
        "planned": 1,
        "planned_int8": 0,
    }
    assert summary["dequantizes"] == 1  # of the weights, on every run
    assert summary["round_trips"] == 1  # of the activations


def test_fused_matrix_products_share_an_int8_kernel(new_graph: type, cache: EngineCache, tmp_path: Path) -> None:
    graph = new_graph()
    x = graph.dequantized("x")
    q, k = (graph.node("MatMul", [x, graph.int8_weight(f"{n}.weight", (64, 64), 1)], n) for n in ("q", "attention.k"))
    graph.node("Add", [q, k], "y")
    engine = engine_from_onnx(graph.save(tmp_path / "g.onnx", shape=(16, 64)), cache=cache)
    assert engine.audit.summary()["gemms_int8"] == 1
    planned = [PlannedLayer("q.weight", "gemm"), PlannedLayer("attention.k.weight", "gemm")]
    assert engine.audit.failures(planned) == ()
    assert engine.audit.summary()["planned_int8"] == 2
    assert engine.audit.summary()["quantizes"] == 1  # nothing before it to fuse with


def test_unknown_layer_is_a_failure(blocks: Blocks, cache: EngineCache) -> None:
    with pytest.raises(EngineError, match=r"no convolution or matrix product with the node or weight name 'no\.such'"):
        engine_from_onnx(blocks("int8"), cache=cache, planned=[PlannedLayer("no.such")])


def test_engine_comes_from_the_cache_until_its_plan_changes(blocks: Blocks, cache: EngineCache) -> None:
    graph = blocks("int8")
    first = engine_from_onnx(graph, cache=cache)
    again = engine_from_onnx(graph, cache=cache)
    assert again.from_cache
    assert (again.key, again.path, again.audit) == (first.key, first.path, first.audit)

    good = first.path.read_bytes()
    first.path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    heard = Heard()
    rebuilt = engine_from_onnx(graph, cache=cache, progress=heard)
    assert not rebuilt.from_cache
    assert any("engine.plan was changed after it was built" in line for line in heard.lines)
    assert engine_from_onnx(graph, cache=cache).from_cache


def test_external_data_is_found_and_part_of_the_key(blocks: Blocks, cache: EngineCache, tmp_path: Path) -> None:
    model = onnx.load(blocks("int8"))
    path = tmp_path / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=256)
    engine = engine_from_onnx(
        path,
        cache=cache,
        profile=BatchProfile(1, 2, 2),
        options=BuildOptions(2, workspace_bytes=1 << 30, auxiliary_streams=0),
    )
    assert engine.audit.summary()["convolutions_int8"] == 1
    (entry,) = cache.list_engines()
    assert entry.meta is not None
    assert entry.meta.identity.data_sha256 == {"weights.bin": sha256_of(tmp_path / "weights.bin")}


def test_builder_crash_is_an_error_that_names_the_signal(new_graph: type, cache: EngineCache, tmp_path: Path) -> None:
    graph = new_graph()
    table = graph.constant("table", np.array([0.02, 0.03], np.float16))
    scale = graph.node("Gather", [table, "t"], "scale", axis=0)
    x = graph.dequantized("x", runtime_scale=scale)
    graph.node("Conv", [x, graph.int8_weight("weight", (32, 32, 3, 3))], "y", pads=[1] * 4)
    path = graph.save(tmp_path / "runtime_scale.onnx")
    with pytest.raises(EngineError, match=r"crashed with SIGSEGV while .*runtime_scale.onnx") as caught:
        engine_from_onnx(path, cache=cache)
    log = Path(str(caught.value).rsplit("The builder's log: ", 1)[1])
    assert "QuantizeLinear" in log.read_text()
    assert cache.list_engines() == ()
    assert not list(cache.root.glob(".*tmp*"))


def test_build_killed_from_outside_points_to_memory(blocks: Blocks, cache: EngineCache) -> None:
    class Killing(Heard):
        def say(self, message: str) -> None:
            threading.Timer(0.0, self.kill).start()

        @staticmethod
        def kill() -> None:
            while not (children := worker_processes()):
                time.sleep(0.001)
            os.kill(children[0], signal.SIGKILL)

    with pytest.raises(ResourceProblem, match=r"blocks.onnx was killed \(SIGKILL\).* while .* the profile \(1:4:16\)"):
        engine_from_onnx(blocks("int8"), cache=cache, progress=Killing())


def test_build_ends_with_the_process_that_asked_for_it(blocks: Blocks, cache: EngineCache) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from contextlib import contextmanager\n"
        "from qdm_deploy.engines.cache import EngineCache\n"
        "from qdm_deploy.engines.engine import engine_from_onnx\n"
        "class Dying:\n"
        "    def say(self, message): pass\n"
        "    @contextmanager\n"
        "    def task(self, description, total):\n"
        "        yield lambda steps=1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "engine_from_onnx(Path(sys.argv[1]), cache=EngineCache(Path(sys.argv[2])), progress=Dying())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    graph = blocks(*["int8"] * 12)
    parent = subprocess.Popen([sys.executable, "-c", code, str(graph), str(cache.root)], env=environment)
    assert parent.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while worker_processes(anywhere=str(cache.root)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker_processes(anywhere=str(cache.root)) == []
    assert not list(cache.root.glob("**/engine.plan"))
    assert not engine_from_onnx(graph, cache=cache).from_cache  # its lock and its leftovers are in nobody's way
    assert not list(cache.root.glob(".*tmp*"))


def child_processes() -> set[str]:
    """Of all threads of this process; those that nobody has waited for are among them."""
    return {child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}


def test_ctrl_c_ends_the_build_process_and_leaves_nothing(blocks: Blocks, cache: EngineCache) -> None:
    before = child_processes()
    with pytest.raises(KeyboardInterrupt):
        engine_from_onnx(blocks("int8"), cache=cache, progress=Heard(interrupt=True))
    assert not list(cache.root.glob("*.tmp*")) + list(cache.root.glob(".*tmp*"))
    assert cache.list_engines() == ()
    assert child_processes() == before


@pytest.mark.parametrize(
    ("zero_point", "scale", "message"),
    [
        (3, 0.02, r"node 'x.q/node' \(QuantizeLinear\): .*\nshift the values with a Sub"),
        (0, 0.0, r"node 'x.q/node' \(QuantizeLinear\): .*\na scale is zero or negative"),
    ],
)
def test_parser_errors_name_the_node_and_what_to_do(
    new_graph: type, cache: EngineCache, tmp_path: Path, zero_point: int, scale: float, message: str
) -> None:
    graph = new_graph()
    graph.node("Relu", [graph.dequantized("x", zero_point=zero_point, scale=scale)], "y")
    with pytest.raises(EngineError, match=message):
        engine_from_onnx(graph.save(tmp_path / "g.onnx"), cache=cache)


def test_unknown_operator_is_named(new_graph: type, cache: EngineCache, tmp_path: Path) -> None:
    graph = new_graph()
    graph.node("Frobnicate", ["x"], "z", domain="acme")
    graph.node("Relu", ["z"], "y")
    with pytest.raises(EngineError, match=r"node 'z/node' \(Frobnicate\).*\nTensorRT has no importer"):
        engine_from_onnx(graph.save(tmp_path / "g.onnx"), cache=cache)


def test_mixed_types_are_explained_without_the_missing_gpu(new_graph: type, cache: EngineCache, tmp_path: Path) -> None:
    graph = new_graph()
    graph.node("Add", ["x", graph.constant("one", np.ones(1, np.float32))], "y")
    with pytest.raises(EngineError, match=r"'y/node' \(Add\)[\s\S]*nothing is cast implicitly") as caught:
        engine_from_onnx(graph.save(tmp_path / "g.onnx"), cache=cache)
    assert "CUDA" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "shape", "message"),
    [
        (4, (32, 8, 8), "no input of .* has a dynamic batch axis, so the batch profile 1:4:16"),
        ("B", (32, "H", 8), r"input 'x' of .* has the shape \(-1, 32, -1, 8\): only its first axis"),
    ],
)
def test_only_the_batch_is_dynamic(
    new_graph: type, cache: EngineCache, tmp_path: Path, batch: int | str, shape: tuple[int | str, ...], message: str
) -> None:
    graph = new_graph()
    graph.node("Relu", ["x"], "y")
    with pytest.raises(EngineError, match=message):
        engine_from_onnx(graph.save(tmp_path / "g.onnx", batch=batch, shape=shape), cache=cache)


def test_truncated_graph_is_refused(blocks: Blocks, cache: EngineCache) -> None:
    graph = blocks("int8")
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(EngineError, match=r"blocks.onnx is not an ONNX file, or is cut short"):
        engine_from_onnx(graph, cache=cache)


@pytest.mark.parametrize("sm", ["9.0", "8.7", "sm_89", ""])
def test_unknown_capability_lists_the_allowed_ones(blocks: Blocks, cache: EngineCache, sm: str) -> None:
    with pytest.raises(InputError, match=f"compute capability '{sm}'; it builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"):
        engine_from_onnx(blocks("int8"), cache=cache, sm=sm)


def test_two_processes_build_once(blocks: Blocks, cache: EngineCache) -> None:
    graph = blocks("int8")
    code = (
        "import sys; from pathlib import Path\n"
        "from qdm_deploy.engines.cache import EngineCache\n"
        "from qdm_deploy.engines.engine import engine_from_onnx\n"
        "engine = engine_from_onnx(Path(sys.argv[1]), cache=EngineCache(Path(sys.argv[2])))\n"
        "print(engine.from_cache, engine.key)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(graph), str(cache.root)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    answers = sorted(child.communicate(timeout=60)[0].split() for child in children)
    assert [answer[0] for answer in answers] == ["False", "True"]
    assert answers[0][1] == answers[1][1]
    assert len(cache.list_engines()) == 1


def test_engine_reports_a_missing_library(blocks: Blocks, cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        EnvironmentProblem, match=r"needs the Python module 'tensorrt'.*pip install 'qdm-deploy\[tensorrt\]'"
    ):
        engine_from_onnx(blocks("int8"), cache=cache, backend="tensorrt")


def test_a_capability_that_this_version_does_not_know_is_said_with_what_to_do() -> None:
    library = SimpleNamespace(__version__="1.2.0", ComputeCapability=SimpleNamespace(__members__={"SM89": 1}))
    with pytest.raises(EnvironmentProblem, match=r"1\.2\.0 cannot build for compute capability '12\.1' yet"):
        _set_capability(library, None, FLAVOURS["tensorrt-rtx"], "12.1")
