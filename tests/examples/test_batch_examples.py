"""The launchers of batch jobs: each example runs what it claims, on one machine."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.batch import batch_status, verify_batch

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def bundle(write_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "classes.qdm", conditional=True)


@pytest.fixture
def environment(repository: Path, tmp_path: Path) -> dict[str, str]:
    """A PATH on which ``qdm-deploy`` is this checkout, and ``scontrol`` notes what it is asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "qdm-deploy").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qdm_deploy.cli.main "$@"\n')
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/requeued"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    foreign = ("SLURM_", "RANK", "WORLD_SIZE", "JOB_COMPLETION")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    paths = os.pathsep.join(str(repository / part) for part in ("", "calibration", "export"))
    return {**plain, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def test_a_slurm_array_makes_all_shards(
    repository: Path, bundle: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for task in (1, 2):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"}
        command = [repository / "examples" / "slurm_batch.sh", bundle, out, "20", "--shard-size", "5", "--steps", "1"]
        done = subprocess.run(command, env={**environment, **array}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"part {task - 1} of 2, from SLURM_ARRAY_TASK_ID" in done.stderr
    assert verify_batch(out).ok
    assert not (tmp_path / "requeued").exists()


def test_a_slurm_task_that_runs_out_of_time_is_queued_again(
    repository: Path, bundle: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_JOB_ID": "77"}
    command = [repository / "examples" / "slurm_batch.sh", bundle, out, "100000", "--shard-size", "50", "--steps", "2"]
    with subprocess.Popen(command, env={**environment, **array}, stderr=subprocess.PIPE, text=True) as script:
        end = time.monotonic() + 60
        while not list(out.glob("shard-*.json")):
            assert script.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        script.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B: does
        _, said = script.communicate(timeout=60)
    assert script.returncode == 0, said
    assert "stopped by SIGUSR1" in said
    assert (tmp_path / "requeued").read_text() == "requeue 77_0\n"
    assert batch_status(out).left_over == 0


def test_the_kubernetes_job_is_valid_and_its_command_works(
    repository: Path, bundle: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    import yaml

    job: dict[str, Any] = yaml.safe_load((repository / "examples" / "kubernetes_batch.yaml").read_text())
    kubernetes_validate.validate(job, "1.31", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": {**job["spec"], "completion": 8}}, "1.31", strict=True)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables == {"JOB_COMPLETIONS": str(spec["completions"])}
    words = [*container["command"], *container["args"]]
    grace = next(float(word.partition("=")[2]) for word in words if word.startswith("--grace"))
    assert grace < pod["terminationGracePeriodSeconds"]
    (tmp_path / "fashion.qdm").symlink_to(bundle)
    changes = [("/data/", f"{tmp_path}/"), ("--num=1000000", "--num=40")]
    for old, new in changes:
        assert any(old in word for word in words)
        words = [word.replace(old, new) for word in words]
    index = {**variables, "JOB_COMPLETION_INDEX": "3"}
    done = subprocess.run(
        [*words, "--shard-size=5", "--steps=1"],
        env={**environment, **index},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "part 3 of 8, from JOB_COMPLETION_INDEX" in done.stderr
    assert [path.name for path in (tmp_path / "samples").glob("*.tar")] == ["shard-00003.tar"]


@pytest.mark.slow
def test_torchrun_gives_each_process_its_part(bundle: Path, environment: dict[str, str], tmp_path: Path) -> None:
    if find_spec("torch") is None:
        pytest.skip("torch is not installed, and torchrun comes with it")
    # Without "--" it would take --num for a short form of its own --numa-binding.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "--",
               "qdm-deploy", "batch", bundle, "--num", "20", "--out", tmp_path / "out", "--shard-size", "5", "--steps",
               "1", "--threads", "1"]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"part (\d) of 2, from RANK", done.stderr)) == ["0", "1"]
    assert verify_batch(tmp_path / "out").ok


@pytest.mark.slow
def test_ray_makes_the_same_bytes(script: Script, bundle: Path, tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    from qdm_deploy.batch import BatchOptions, generate_batch

    options = ["--num", 20, "--parts", 3, "--steps", 1, "--shard-size", 5, "--backend", "onnxruntime"]
    done = script("ray_batch.py", bundle, tmp_path / "ray", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["3 of 3 parts are done, 20 new images", "20 images, all intact"]
    generate_batch(
        BatchOptions(
            bundle=bundle, out=tmp_path / "here", count=20, steps=1, shard_size=5, backend="onnxruntime", threads=1
        )
    )
    for path in sorted((tmp_path / "here").glob("*.tar")):
        assert (tmp_path / "ray" / path.name).read_bytes() == path.read_bytes()
    again = script("ray_batch.py", bundle, tmp_path / "ray", *options)
    assert "3 of 3 parts are done, 0 new images" in again.stdout


@pytest.mark.slow
def test_ray_starts_a_killed_task_again(
    repository: Path, bundle: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    out = tmp_path / "out"
    command = [sys.executable, repository / "examples" / "ray_batch.py", bundle, out, "--num", "6000", "--parts", "3",
               "--steps", "3", "--shard-size", "100", "--backend", "onnxruntime"]  # fmt: skip
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            end = time.monotonic() + 200
            # The name of a shard that is being written tells who writes it.
            while not (
                len(list(out.glob("shard-*.json"))) > 2
                and (found := [re.search(r"-(\d+)-[0-9a-f]{8}$", path.name) for path in out.glob(".shard-*.tar.tmp-*")])
            ):
                assert running.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            assert found[0] is not None
            os.kill(int(found[0][1]), signal.SIGKILL)
            printed, _ = running.communicate(timeout=200)
        finally:
            running.kill()
    assert running.returncode == 0, printed
    assert "worker died or was killed" in printed
    assert printed.splitlines()[-1] == "6000 images, all intact"
