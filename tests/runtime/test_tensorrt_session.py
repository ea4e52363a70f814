"""The logic of the GPU session on a device that is not there.

No machine that runs the default tests has a GPU, so two things are replaced, and only these: the CUDA functions
(``LateDevice``, whose memory is host memory) and the TensorRT module (``Library``, whose engine computes with ONNX
Runtime on the memory at the addresses it was given). What the GPU itself does is in test_tensorrt_gpu.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.tensorrt.session import TensorRtSession
from qdm_deploy.engines.flavour import FLAVOURS, Flavour
from qdm_deploy.engines.gpu import Gpu
from qdm_deploy.errors import BundleError, EngineError, InputError, ResourceProblem
from qdm_deploy.runtime.denoise import denoise
from qdm_deploy.runtime.session import StepInputs, StepLoop
from tests.runtime.late_device import Context, LateDevice, Library

GPU = Gpu("Test GPU", "9.0", "580.65.06 (CUDA 13.0)")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def flavour(request: pytest.FixtureRequest) -> Flavour:
    return FLAVOURS[request.param]


@pytest.fixture
def device() -> LateDevice:
    return LateDevice()


Open = Callable[..., TensorRtSession]


@pytest.fixture
def open_session(flavour: Flavour, device: LateDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    def open_(model: Any, plan: bytes = b"good plan", **options: Any) -> TensorRtSession:
        library = Library(model.graph, device)
        monkeypatch.setattr(Flavour, "load", lambda self: library)
        path = tmp_path / "engine.plan"
        path.write_bytes(plan)
        session = TensorRtSession(flavour, path, device, gpu=GPU, graph_sha256="0" * 64, **options)
        session.library = library  # type: ignore[attr-defined]
        return session

    return open_


def inputs_of(model: Any, rows: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    image = (rows, *model.spec.sample_shape)
    return {
        "sample": rng.standard_normal(image).astype(np.float32),
        "timestep": rng.integers(0, 100, rows),
        "coefficients": rng.standard_normal((rows, model.spec.interface.num_coefficients)).astype(np.float32),
        "noise": rng.standard_normal(image).astype(np.float32),
        "history": rng.standard_normal((rows, 3 * image[1], *image[2:])).astype(np.float32),
    }


def test_a_step_is_the_graphs_own(open_session: Open, plain: Any) -> None:
    with open_session(plain) as session, OnnxRuntimeSession(plain.graph, threads=1) as reference:
        for seed, rows in enumerate((2, 6, 2, 2, 1)):
            inputs = inputs_of(plain, rows, seed)
            given = {name: array.copy() for name, array in inputs.items()}
            result, expected = session.run(inputs), reference.run(inputs)
            np.testing.assert_array_equal(result.next_sample, expected.next_sample)
            np.testing.assert_array_equal(result.x0, expected.x0)
            for name, array in inputs.items():
                np.testing.assert_array_equal(array, given[name])


def test_steps_are_recorded_once_per_batch_size_and_replayed(
    plain: Any, open_session: Open, flavour: Flavour, device: LateDevice
) -> None:
    with open_session(plain) as session:
        for rows in (1, 2, 1, 2, 2):
            session.run(inputs_of(plain, rows))
        library = session.library  # type: ignore[attr-defined]
        recorded = not flavour.records_graphs
        assert device.calls.count("record") == (2 if recorded else 0)
        assert device.calls.count("launch") == (3 if recorded else 0)
        assert library.strategies == (["user", "user"] if recorded else ["whole"])
        assert library.specializations == ([None, None] if recorded else ["eager"])
        assert len(library.scratch) == (1 if recorded else 0)  # contexts share it
        for rows in (3, 4, 5, 1):  # a fifth batch size drops the one used longest ago, and 1 is recorded again
            session.run(inputs_of(plain, rows))
        assert device.calls.count("record") == (6 if recorded else 0)
        assert len(device.graphs) == (4 if recorded else 0)


def test_without_cuda_graphs_nothing_is_recorded(
    plain: Any, open_session: Open, flavour: Flavour, device: LateDevice
) -> None:
    with open_session(plain, cuda_graphs=False) as session, OnnxRuntimeSession(plain.graph, threads=1) as reference:
        for rows in (3, 2, 3):
            inputs = inputs_of(plain, rows)
            np.testing.assert_array_equal(session.run(inputs).x0, reference.run(inputs).x0)
        assert session.describe()["cuda_graphs"] == "off"
        assert "record" not in device.calls
        assert session.library.strategies == ["off" if flavour.records_graphs else "user"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m", "euler"])
def test_a_loop_on_the_device_gives_the_samples_of_the_loop_on_the_host(
    open_session: Open, labelled: Any, make_table: Any, sampler: str, device: LateDevice
) -> None:
    table, seeds = make_table(sampler, 9), range(8)
    sampling, how = labelled.sampling(table, seeds, np.arange(8) % 5, guidance=3.0), {"batch_size": 3}
    with open_session(labelled) as session, OnnxRuntimeSession(labelled.graph, threads=1) as reference:
        assert isinstance(session, StepLoop)
        assert not isinstance(reference, StepLoop)
        expected = denoise(reference, sampling, **how)
        np.testing.assert_array_equal(denoise(session, sampling, **how), expected)
        device.calls.clear()
        seen: list[int] = []
        watched = denoise(session, sampling, on_step=lambda step, _: seen.append(step), **how)
        np.testing.assert_array_equal(watched, expected)
        assert seen == list(range(9))


def test_a_loop_waits_for_old_copies_only_and_fetches_once(
    plain: Any, make_table: Any, open_session: Open, device: LateDevice
) -> None:
    table = make_table("ddim", 12)
    with open_session(plain) as session:
        denoise(session, plain.sampling(table, range(4)))  # records the graph where the session does
        device.calls.clear()
        denoise(session, plain.sampling(table, range(4)))
        calls = list(device.calls)
    # The host waits for the stream once, at the end; before, only for copies it queued four steps earlier.
    assert calls[-3:] == ["download", "download", "synchronize"]
    assert (calls.count("download"), calls.count("synchronize"), calls.count("wait")) == (3, 1, 12)
    # DDIM uses no noise: each step sends timestep and coefficients.
    assert calls.count("upload") == len(inputs_of(plain, 1)) + 2 * 12


def test_arrays_of_a_step_may_be_filled_again_at_once(plain: Any, open_session: Open) -> None:
    inputs = inputs_of(plain, 2)
    rng = np.random.default_rng(3)
    rows = [inputs_of(plain, 2, seed) for seed in range(10)]

    def steps() -> Iterator[StepInputs]:
        step = {name: np.empty_like(inputs[name]) for name in ("timestep", "coefficients", "noise")}
        for values in rows:
            for name, array in step.items():
                array[:] = values[name]
            yield StepInputs(step["timestep"], 0.1 * step["coefficients"], step["noise"])
            step["timestep"][:] = rng.integers(0, 100)
            step["noise"][:] = np.nan

    with open_session(plain) as session, OnnxRuntimeSession(plain.graph, threads=1) as reference:
        state = dict(inputs)
        for values in rows:
            state |= {name: values[name] for name in ("timestep", "noise")}
            state["coefficients"] = 0.1 * values["coefficients"]
            result = reference.run(state)
            state |= {"sample": result.next_sample, "history": result.next_history}
        found = session.run_steps(inputs, steps())
        np.testing.assert_array_equal(found.next_sample, state["sample"])
        np.testing.assert_array_equal(found.next_history, state["history"])


def test_what_does_not_fit_is_refused(plain: Any, open_session: Open) -> None:
    with open_session(plain) as session:
        assert session.max_batch == 6
        with pytest.raises(InputError, match="sample has 7 rows; one run takes 1 to 6"):
            session.run(inputs_of(plain, 7))
        with pytest.raises(InputError, match="the loop has no steps"):
            session.run_steps(inputs_of(plain, 2), [])
        wrong = StepInputs(np.zeros(3, np.int64), np.zeros((2, 7), np.float32))
        with pytest.raises(InputError, match=r"timestep of step 0 is int64 \[3\]; the step graph takes int64 \[2\]"):
            session.run_steps(inputs_of(plain, 2), [wrong])
    with pytest.raises(ValueError, match="this TensorRtSession is closed"):
        session.run(inputs_of(plain, 2))


def test_everything_is_given_back(plain: Any, open_session: Open, device: LateDevice) -> None:
    session = open_session(plain)
    session.run(inputs_of(plain, 2))
    session.run(inputs_of(plain, 3))
    assert device.blocks
    session.close()
    session.close()
    assert (device.blocks, device.pinned, device.streams, device.events, device.graphs) == ({}, set(), set(), {}, {})


def test_an_engine_that_cannot_be_loaded_leaves_nothing_behind(
    plain: Any, open_session: Open, flavour: Flavour, device: LateDevice
) -> None:
    with pytest.raises(EngineError, match=f"{flavour.backend} 11.1.0 cannot load .*engine.plan: magicTag does not"):
        open_session(plain, plan=b"bad plan")
    assert (device.blocks, device.streams) == ({}, set())


def test_a_full_gpu_says_nothing_against_the_engine(plain: Any, open_session: Open, device: LateDevice) -> None:
    with pytest.raises(ResourceProblem, match=r"cannot load the engine .*: the GPU's memory ran out"):
        open_session(plain, plan=b"too large")
    assert (device.blocks, device.streams) == ({}, set())


def test_a_refused_step_says_what_the_library_logged(plain: Any, open_session: Open) -> None:
    with open_session(plain) as session:
        session.library.broken = True  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="cannot run a step of 2 rows: the engine is broken"):
            session.run(inputs_of(plain, 2))


@pytest.mark.parametrize("flavour", ["tensorrt"], indirect=True)
def test_as_many_batch_sizes_stay_recorded_as_are_asked_for(plain: Any, open_session: Open, device: LateDevice) -> None:
    with open_session(plain, kept_batch_sizes=6) as session:
        for rows in (1, 2, 3, 4, 5, 6, 1, 2, 3):
            session.run(inputs_of(plain, rows))
        assert (device.calls.count("record"), device.calls.count("launch")) == (6, 3)


def test_a_shape_that_was_refused_half_way_is_set_anew(
    plain: Any, open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_session(plain) as session, OnnxRuntimeSession(plain.graph, threads=1) as reference:
        session.run(inputs_of(plain, 2))
        take = Context.set_input_shape
        monkeypatch.setattr(
            Context, "set_input_shape", lambda self, name, shape: name != "noise" and take(self, name, shape)
        )
        with pytest.raises(EngineError, match="cannot take 3 rows of noise"):
            session.run(inputs_of(plain, 3))
        monkeypatch.undo()
        np.testing.assert_array_equal(session.run(inputs_of(plain, 2)).x0, reference.run(inputs_of(plain, 2)).x0)


@pytest.mark.parametrize("flavour", ["tensorrt"], indirect=True)
def test_what_cannot_be_recorded_runs_all_the_same(
    plain: Any, open_session: Open, device: LateDevice, caplog: pytest.LogCaptureFixture
) -> None:
    with open_session(plain) as session, OnnxRuntimeSession(plain.graph, threads=1) as reference:
        device.refuse_capture = True
        for _ in range(3):
            np.testing.assert_array_equal(session.run(inputs_of(plain, 2)).x0, reference.run(inputs_of(plain, 2)).x0)
        assert device.captured is None
        assert device.calls.count("launch") == 0
        assert len(session.library.strategies) == 1  # type: ignore[attr-defined]  # one context, kept
        assert "steps of 2 rows run without a CUDA graph" in caplog.text
        assert caplog.text.count("invalidated") == 1  # not at every step
        assert "invalidated" in str(session.describe()["cuda_graphs"])
        device.refuse_capture = False
        for _ in range(2):  # another batch size is tried anew
            np.testing.assert_array_equal(session.run(inputs_of(plain, 3)).x0, reference.run(inputs_of(plain, 3)).x0)
        assert device.calls.count("launch") == 1


def test_an_engine_of_something_else_is_refused(
    plain: Any, open_session: Open, device: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "get_tensor_location", lambda self, name: "host" if name == "timestep" else "device")
    with pytest.raises(BundleError, match="reads timestep on the host, as a shape"):
        open_session(plain)
    monkeypatch.undo()
    assert device.blocks == {}


def test_describe_says_what_ran(plain: Any, open_session: Open, flavour: Flavour) -> None:
    with open_session(plain) as session:
        assert session.describe() == {
            "backend": flavour.backend,
            "version": "11.1.0",
            "device": "Test GPU",
            "compute_capability": "9.0",
            "driver": "580.65.06 (CUDA 13.0)",
            "precision": "the graph's own (strongly typed)",
            "profile": "1:4:6",
            "cuda_graphs": "tensorrt-rtx" if flavour.records_graphs else "qdm-deploy",
            "graph_sha256": "0" * 64,
        }
