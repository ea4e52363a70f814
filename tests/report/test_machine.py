import json
import platform
import socket
from importlib.metadata import version
from pathlib import Path

from qdm_deploy.report import library_versions, machine_card

CPUINFO = """processor\t: 0
model name\t: Example 9000
flags\t\t: fpu amx_int8 avx2 avx512_vnni sse

processor\t: 1
model name\t: Example 9000
"""


def test_card_of_a_described_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO, encoding="utf-8")
    card = machine_card(cpuinfo)
    assert card["cpu"] == "Example 9000"
    assert card["instruction_sets"] == ["avx2", "avx512_vnni", "amx_int8"]
    assert card["architecture"] == platform.machine()
    assert 1 <= int(str(card["cores_usable"])) <= int(str(card["cores_present"]))
    assert json.loads(json.dumps(card)) == card


def test_card_of_an_undescribed_cpu(tmp_path: Path) -> None:
    card = machine_card(tmp_path / "missing")
    assert (card["cpu"], card["instruction_sets"]) == ("unknown", [])


def test_card_does_not_name_the_host() -> None:
    assert not [value for value in machine_card().values() if str(value) == socket.gethostname()]
    assert set(machine_card()) == {
        "cpu", "cores_usable", "cores_present", "instruction_sets", "architecture", "os", "kernel",
    }  # fmt: skip


def test_versions_of_what_is_installed() -> None:
    versions = library_versions()
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == version("numpy")
    assert "onnxruntime-gpu" not in versions or version("onnxruntime-gpu") == versions["onnxruntime-gpu"]
