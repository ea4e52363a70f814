import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.openvino.session import OpenVinoSession
from qdm_deploy.errors import BundleError, InputError
from qdm_deploy.runtime.cpu import available_cores, cpu_flags, cpu_model, saturates_int8
from qdm_deploy.runtime.session import StepOutput

# One of every column: p, q, clip, a, b, g, c0, c1, c2, d, u, v, w.
STEP = (1.1, -0.5, 1, 0.3, 0.7, 0.1, 0.2, -0.1, 0.05, 0.1, 0.6, 0.3, 0.1)


def inputs_for(rows: int, *, conditional: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(rows)
    image = (rows, 3, 4, 4)
    given: dict[str, Any] = {
        "sample": rng.standard_normal(image, dtype=np.float32),
        "timestep": np.arange(rows, dtype=np.int64),
        "coefficients": np.tile(np.array(STEP, np.float32), (rows, 1)),
        "noise": rng.standard_normal(image, dtype=np.float32),
        "history": rng.standard_normal((image[0], 3 * image[1], *image[2:]), dtype=np.float32),
    }
    if conditional:
        given["class_labels"] = np.arange(rows, dtype=np.int64) % 5
        given["guidance"] = np.ones(rows, np.float32)
        given["unconditional_row"] = given["owner_row"] = np.arange(rows, dtype=np.int64)
    return given


def test_names_and_description(open_on: Any, labelled: Any) -> None:
    with open_on(labelled.graph) as session:
        assert session.interface.input_names == (
            "sample",
            "timestep",
            "coefficients",
            "noise",
            "history",
            "class_labels",
            "guidance",
            "unconditional_row",
            "owner_row",
        )
        assert session.max_batch is None
        first = session.describe()
    with open_on(labelled.graph) as session:
        assert session.describe() == first
    assert first["threads"] == 2
    assert first["precision"] == "f32"
    assert re.fullmatch("[0-9a-f]{64}", str(first["graph_sha256"]))


def test_inputs_are_only_read_and_a_result_holds_until_the_next_run(open_on: Any, plain: Any) -> None:
    given = inputs_for(4)
    before = {name: value.copy() for name, value in given.items()}
    with open_on(plain.graph) as session:
        result = session.run(given)
        assert isinstance(result, StepOutput)
        assert result.next_sample.dtype == result.x0.dtype == np.float32
        assert result.next_sample.shape == result.x0.shape == (4, 3, 4, 4)
        assert result.next_history.shape == (4, 9, 4, 4)
        kept = result.next_sample.copy(), result.x0.copy()
        for name, value in given.items():
            np.testing.assert_array_equal(value, before[name])
            value[...] = 0
        np.testing.assert_array_equal(result.next_sample, kept[0])
        np.testing.assert_array_equal(result.x0, kept[1])
        again = session.run(before)
        np.testing.assert_array_equal(again.next_sample, kept[0])


def test_sliced_inputs_are_read_right(open_on: Any, plain: Any) -> None:
    wide = inputs_for(6)
    with open_on(plain.graph) as session:
        expected = session.run({name: value[::2].copy() for name, value in wide.items()}).next_sample.copy()
        np.testing.assert_array_equal(
            session.run({name: value[::2] for name, value in wide.items()}).next_sample, expected
        )


def test_many_batch_sizes_in_turn(open_on: Any, plain: Any) -> None:
    with open_on(plain.graph) as session:
        first = session.run(inputs_for(1)).next_sample.copy()
        for rows in (2, 3, 4, 5, 6):
            assert session.run(inputs_for(rows)).next_sample.shape[0] == rows
        np.testing.assert_array_equal(session.run(inputs_for(1)).next_sample, first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": None}, r"the step graph takes sample, .*; missing: noise; unknown: none"),
        ({"extra": np.zeros(2)}, r"missing: none; unknown: extra"),
        ({"timestep": np.zeros(2, np.int32)}, r"timestep is int32 \[2\]; the step graph takes int64 \[2\]"),
        (
            {"sample": np.zeros((2, 3, 4, 5), np.float32)},
            r"sample is float32 \[2, 3, 4, 5\]; .* float32 \[2, 3, 4, 4\]",
        ),
        ({"noise": np.zeros((3, 3, 4, 4), np.float32)}, r"noise is float32 \[3, 3, 4, 4\]; .* \[2, 3, 4, 4\]"),
        ({"sample": np.zeros((0, 3, 4, 4), np.float32)}, "sample has 0 rows; one run takes at least 1"),
        ({"sample": np.array(0, np.float32)}, "sample has 0 rows"),
        ({"owner_row": np.array([0, 2])}, r"owner_row holds \[0, 2\]; rows of this batch are 0 to 1"),
        ({"unconditional_row": np.array([-1, 0])}, r"unconditional_row holds \[-1, 0\]"),
    ],
)
def test_wrong_inputs_are_refused(open_on: Any, labelled: Any, change: dict[str, Any], message: str) -> None:
    given = {**inputs_for(2, conditional=True), **change}
    with open_on(labelled.graph) as session, pytest.raises(InputError, match=message):
        session.run({name: value for name, value in given.items() if value is not None})


def test_rows_above_max_batch_are_refused(plain: Any) -> None:
    class TwoRows(OnnxRuntimeSession):
        max_batch = 2

    with TwoRows(plain.graph) as session, pytest.raises(InputError, match="sample has 3 rows; one run takes 1 to 2"):
        session.run(inputs_for(3))


def test_a_closed_session_says_so(open_on: Any, plain: Any) -> None:
    session = open_on(plain.graph)
    session.close()
    session.close()
    with pytest.raises(ValueError, match=f"this {type(session).__name__} is closed"):
        session.run(inputs_for(1))


def test_missing_and_damaged_graphs(open_on: Any, plain: Any, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(BundleError, match=r"the step graph .*absent\.onnx does not exist"):
        open_on(tmp_path / "absent.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(plain.graph.read_bytes()[:-700])
    with pytest.raises(BundleError, match=r"(?s)cannot load .*damaged\.onnx: .*Verify the bundle"):
        open_on(damaged)
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    with pytest.raises(BundleError, match=r"empty\.onnx"):
        open_on(empty)
    assert capfd.readouterr().err == ""


def test_weights_beside_the_graph_are_found(open_on: Any, plain: Any, tmp_path: Path) -> None:
    model = onnx.load(plain.graph)
    # A size between the tables and the shapes, which shape inference has to find in the graph itself.
    onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=200)
    assert (tmp_path / "weights.bin").stat().st_size > 0
    with open_on(plain.graph) as session:
        expected = session.run(inputs_for(2)).next_sample.copy()
    with open_on(tmp_path / "outside.onnx") as session:
        np.testing.assert_array_equal(session.run(inputs_for(2)).next_sample, expected)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BundleError, match=r"(?s)cannot load .*outside\.onnx: .*weights\.bin"):
        open_on(tmp_path / "outside.onnx")


def test_other_graphs_are_no_step_graphs(open_on: Any, plain: Any, labelled: Any, tmp_path: Path) -> None:
    def changed(name: str, source: Any, change: Any) -> Path:
        model = onnx.load(source.graph)
        change(model.graph)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    def fixed_batch(graph: Any) -> None:
        for value in (*graph.input, *graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2

    with pytest.raises(BundleError, match=r"fixed\.onnx is not a step graph: sample has the shape \[2, 3, 4, 4\]"):
        open_on(changed("fixed.onnx", plain, fixed_batch))
    with pytest.raises(BundleError, match="a step graph has no next_history"):
        open_on(changed("half.onnx", plain, lambda graph: graph.output.pop()))
    with pytest.raises(BundleError, match="a conditional step graph has no guidance, unconditional_row or owner_row"):
        open_on(changed("other.onnx", labelled, lambda graph: _unguided(graph)))
    with pytest.raises(BundleError, match="timestep is neither float32 nor int64"):
        open_on(changed("int32.onnx", plain, lambda graph: _set_type(graph, "timestep", onnx.TensorProto.INT32)))


def _set_type(graph: Any, name: str, kind: int) -> None:
    next(item for item in graph.input if item.name == name).type.tensor_type.elem_type = kind


def _unguided(graph: Any) -> None:
    """Drop guidance and the twin's row, keeping the owner's."""
    for name in ("guidance", "unconditional_row"):
        graph.input.remove(next(item for item in graph.input if item.name == name))
    for node in list(graph.node):
        if node.output[0] in ("e_null", "direction", "strength", "guided"):
            graph.node.remove(node)
        elif node.output[0] == "e":
            node.input[:] = ["e_own", "e_own"]


def test_threads_default_to_the_cores_of_this_process(plain: Any) -> None:
    cores = len(os.sched_getaffinity(0))
    for kind in (OnnxRuntimeSession, OpenVinoSession):
        with kind(plain.graph) as session:
            assert 1 <= int(str(session.describe()["threads"])) <= cores


def test_cores_obey_the_cgroup(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    affinity = len(os.sched_getaffinity(0))
    for text, expected in [
        ("max 100000\n", affinity),
        ("50000 100000\n", 1),
        ("100000 100000", 1),
        ("9900000 100000", affinity),
    ]:
        quota.write_text(text)
        assert available_cores(quota) == expected
    assert available_cores(tmp_path / "absent") == affinity


def test_cpu_information(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz: x\nflags\t\t: fpu avx2 amx_bf16\n\nflags\t: other\n"
    )
    assert cpu_flags(info) == {"fpu", "avx2", "amx_bf16"}
    assert cpu_model(info) == "Some CPU @ 2.0GHz: x"
    assert (cpu_flags(tmp_path / "absent"), cpu_model(tmp_path / "absent")) == (frozenset(), "")


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [
        ({"avx2"}, True),
        ({"avx2", "avx512f", "avx512bw"}, True),
        ({"avx2", "avx_vnni"}, False),
        ({"avx2", "avx512f", "avx512_vnni"}, False),
        ({"avx2", "avx512_vnni", "amx_int8"}, False),
        ({"asimddp"}, False),
        (set(), False),
    ],
)
def test_products_of_u8_and_s8_saturate_without_vnni(flags: set[str], saturates: bool) -> None:
    assert saturates_int8(frozenset(flags)) == saturates


def test_the_sampler_update_stays_float32_under_bf16(labelled: Any) -> None:
    given = inputs_for(3, conditional=True)
    given["coefficients"] = np.tile(np.array([0, 1, 3.0e38, 1.2345678, *[0] * 9], np.float32), (3, 1))
    given["guidance"][:] = 1
    with OpenVinoSession(labelled.graph, precision="bf16") as session:
        result = session.run(given)
        next_sample, x0 = result.next_sample.copy(), result.x0.copy()
        assert session.describe()["precision"] == "bf16"
    np.testing.assert_array_equal(next_sample, given["sample"] * np.float32(1.2345678))
    expected = np.concatenate(
        [labelled.network(given["sample"][i : i + 1], i, given["class_labels"][i : i + 1]) for i in range(3)]
    )
    error = np.square(x0 - expected).sum()
    assert 10 * np.log10(np.square(expected).sum() / error) > 35


def test_openvino_is_imported_without_telemetry(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from qdm_deploy.backends.openvino.graph import import_openvino\n"
        "print(import_openvino().__name__, [name for name in sys.modules if name.startswith('openvino_telemetry')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.stdout.strip() == "openvino []"
    assert list(tmp_path.iterdir()) == []


def test_backends_load_no_heavy_module() -> None:
    code = (
        "import sys\n"
        "import qdm_deploy.backends.opening, qdm_deploy.runtime.denoise, qdm_deploy.backends.doctor\n"
        "print([name for name in ('torch', 'onnx', 'openvino', 'tensorrt', 'tensorrt_rtx') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
