import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from qdm_deploy.backends.doctor import Finding, Machine, Module, examine


def by_name(cache: Path, machine: Machine | None = None, modules: tuple[Module, ...] = ()) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(cache, modules=modules, machine=machine)}


def script(folder: Path, text: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_this_machine_can_run_the_tests(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    assert [finding for finding in findings if finding.status == "FAIL"] == []
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    assert named["onnxruntime"].detail == f"onnxruntime {version('onnxruntime')}: backend onnxruntime"
    assert "CPUExecutionProvider" in named["onnxruntime providers"].detail
    assert named["python"].detail.startswith(sys.version.split()[0])
    assert named["cores"].detail.startswith(f"{len(os.sched_getaffinity(0))} usable")
    for name in ("openvino", "torch", "onnx", "diffusers"):
        assert (named[name].status, named[name].detail.split(":")[0]) == ("OK", f"{name} {version(name)}")
    assert {finding.fix == "" for finding in findings if finding.status == "OK"} == {True}


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qdm_deploy.backends.doctor import examine\n"
        f"examine(Path({str(tmp_path)!r}))\n"
        "print([name for name in ('torch', 'onnx', 'openvino', 'diffusers', 'tensorrt_rtx') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_broken_onnxruntime_is_a_finding(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path\n"
        "from qdm_deploy.backends.doctor import examine\n"
        f"for finding in examine(Path({str(tmp_path)!r}), modules=()):\n"
        "    print(finding.status, finding.name, finding.detail)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "FAIL onnxruntime providers onnxruntime cannot be imported" in done.stdout


@pytest.mark.parametrize(
    ("need", "status", "detail", "fix"),
    [
        ("required", "FAIL", "not installed, so no flying", "pip install wings"),
        ("part", "WARN", "not installed, so no flying", "pip install wings"),
        ("extra", "OK", "not installed; optional, for flying", ""),
    ],
)
def test_missing_modules(tmp_path: Path, need: str, status: str, detail: str, fix: str) -> None:
    module = Module(("no-such-wings",), "no_such_wings", "flying", "pip install wings", need)  # type: ignore[arg-type]
    assert by_name(tmp_path, modules=(module,))["no_such_wings"] == Finding("no_such_wings", status, detail, fix)  # type: ignore[arg-type]


def test_cpu_and_memory_are_read(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Fast One\nflags\t\t: fpu avx2 amx_int8 avx512_vnni\n")
    (tmp_path / "meminfo").write_text("MemTotal:  16777216 kB\nMemAvailable:   8388608 kB\nHugePages_Total: 0\n")
    machine = Machine(cpuinfo=tmp_path / "cpuinfo", meminfo=tmp_path / "meminfo", memory_limit=tmp_path / "memory.max")
    found = by_name(tmp_path, machine)
    assert found["cpu"] == Finding(
        "cpu", "OK", "Fast One: amx_int8 (INT8 matrices), avx512_vnni (INT8), avx2 (vectors)"
    )
    assert found["memory"] == Finding("memory", "OK", "8.0 GiB available")
    (tmp_path / "memory.max").write_text("max\n")
    assert by_name(tmp_path, machine)["memory"].detail == "8.0 GiB available"
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert by_name(tmp_path, machine)["memory"] == Finding(
        "memory", "WARN", "1.0 GiB available", "a build wants 2 GiB or more"
    )


def test_a_cpu_without_int8_and_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Old One\nflags\t\t: fpu avx2\n")
    old = by_name(tmp_path, Machine(cpuinfo=tmp_path / "cpuinfo"))["cpu"]
    assert old == Finding(
        "cpu",
        "WARN",
        "Old One: avx2 (vectors); this CPU's INT8 products saturate, "
        "so that exact INT8 is little faster than float here",
        "on a CPU with AVX-VNNI, AVX512-VNNI or AMX it is some 3 times as fast as float",
    )
    (tmp_path / "cpuinfo").write_text("model name\t: Older One\nflags\t\t: fpu sse4_1\n")
    older = by_name(tmp_path, Machine(cpuinfo=tmp_path / "cpuinfo"))["cpu"]
    assert (older.status, older.detail) == ("WARN", "Older One: none of the instruction sets that INT8 needs")
    assert "VNNI or AMX" in older.fix
    nothing = by_name(tmp_path, Machine(cpuinfo=tmp_path / "absent", meminfo=tmp_path / "absent"))
    assert nothing["cpu"].detail == "unknown model; its instruction sets cannot be read here"
    assert nothing["memory"] == Finding("memory", "WARN", "cannot be read here")


def test_cache_folder(tmp_path: Path) -> None:
    deep = tmp_path / "not" / "yet" / "there"
    assert by_name(deep)["cache"] == Finding("cache", "OK", f"{deep} can be written")
    assert not deep.exists()
    assert f"GiB free at {tmp_path}" in by_name(deep)["disk"].detail
    (tmp_path / "file").write_text("")
    found = by_name(tmp_path / "file" / "cache")["cache"]
    assert (found.status, found.detail) == (
        "WARN",
        f"{tmp_path / 'file' / 'cache'} cannot be written: {tmp_path / 'file'} is not a folder",
    )


def test_gpu_that_answers(tmp_path: Path) -> None:
    smi = script(tmp_path, "echo 'NVIDIA H200, 580.1, 143771 MiB, 9.0'")
    assert by_name(tmp_path, Machine(nvidia_smi=smi))["gpu"] == Finding(
        "gpu", "OK", "NVIDIA H200, 580.1, 143771 MiB, 9.0"
    )


def test_gpu_that_does_not_answer(tmp_path: Path) -> None:
    smi = script(tmp_path, "echo 'NVIDIA-SMI has failed: no driver'; exit 9")
    found = by_name(tmp_path, Machine(nvidia_smi=smi))["gpu"]
    assert found == Finding(
        "gpu", "WARN", "nvidia-smi fails: NVIDIA-SMI has failed: no driver", "check the NVIDIA driver"
    )
    Path(smi).write_text("no interpreter line")
    Path(smi).write_bytes(b"\x00\x01")
    assert by_name(tmp_path, Machine(nvidia_smi=smi))["gpu"].detail.startswith("nvidia-smi does not answer")
    silent = by_name(tmp_path, Machine(nvidia_smi=script(tmp_path, "exit 0"), nvidia_driver=tmp_path / "absent"))
    assert silent["gpu"].detail.startswith("no NVIDIA GPU")


def test_driver_without_nvidia_smi(tmp_path: Path) -> None:
    driver = tmp_path / "version"
    machine = Machine(nvidia_smi=str(tmp_path / "absent"), nvidia_driver=driver)
    assert by_name(tmp_path, machine)["gpu"].detail.startswith("no NVIDIA GPU")
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module 580.1\nGCC version: 12\n")
    found = by_name(tmp_path, machine)["gpu"]
    assert found.detail == "driver without nvidia-smi: NVRM version: NVIDIA UNIX Open Kernel Module 580.1"
    assert "--gpus all" in found.fix
