import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qdm_deploy.artifacts import Bundle, FileEntry, Manifest, canonical_json, check_bundle
from qdm_deploy.artifacts.manifest import MAX_MANIFEST_BYTES, read_manifest, relative_path_problem, role_of
from qdm_deploy.errors import BundleError

Forge = Callable[[Path, Callable[[dict[str, Any]], object]], None]
Edit = Callable[[dict[str, Any]], object]


def refused(bundle: Path, message: str) -> None:
    """Both ways of opening, and ``check_bundle``, refuse with a message that names the folder."""
    for check in ("full", "sizes"):
        with pytest.raises(BundleError, match=message) as caught:
            Bundle.open(bundle, check=check)
        assert str(bundle) in str(caught.value)
    (finding,) = check_bundle(bundle)
    assert re.search(message, finding)


# --------------------------------------------------------------------------------------------------------- round trip


def test_round_trip(bundle: Path) -> None:
    content = (bundle / "manifest.json").read_bytes()
    manifest = Manifest.from_bytes(content)
    assert manifest.to_bytes() == content
    assert (manifest.name, manifest.targets, manifest.compatibility.opset) == ("tiny", ("onnxruntime",), 21)
    assert manifest.provenance == {"source": "a test", "samples": [1, 2.5, None, True]}


def test_bundle_id_is_the_hash_of_the_canonical_manifest(bundle: Path) -> None:
    import hashlib

    document = json.loads((bundle / "manifest.json").read_bytes())
    recorded = document.pop("bundle_id")
    assert recorded == hashlib.sha256(canonical_json(document)).hexdigest() == read_manifest(bundle).bundle_id


def test_defaults_that_are_not_in_the_file_do_not_change_the_id(bundle: Path, forge: Forge) -> None:
    """A bundle from before a field with a default was added keeps opening, under its own id."""
    forge(bundle, lambda document: document["pipeline"].pop("makes"))
    opened = Bundle.open(bundle)
    assert opened.pipeline.makes == "pixels"
    assert opened.id == json.loads((bundle / "manifest.json").read_bytes())["bundle_id"]


# ----------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("3.0", r"its schema is 3\.0, and this qdm-deploy reads 2\.x: update qdm-deploy"),
        ("1.1", r"its schema is 1\.1, and this qdm-deploy reads 2\.x: build it again with `qdm-deploy build`"),
        ("1", "its schema_version is '1', and MAJOR.MINOR"),
        ("1.0-beta", "its schema_version is '1.0-beta'"),
        (1.0, r"its schema_version is 1\.0, and"),
        (None, "its schema_version is None"),
    ],
)
def test_other_major_versions_are_refused(bundle: Path, forge: Forge, version: object, message: str) -> None:
    forge(bundle, lambda document: document.update(schema_version=version, unknown="field"))
    refused(bundle, message)


def test_a_newer_minor_version_with_known_fields_opens(bundle: Path, forge: Forge) -> None:
    forge(bundle, lambda document: document.update(schema_version="2.7"))
    assert Bundle.open(bundle).manifest.schema_version == "2.7"


def test_unknown_fields_are_refused(bundle: Path, forge: Forge) -> None:
    forge(bundle, lambda document: document.update(licence="MIT"))
    refused(bundle, "licence: Extra inputs are not permitted, given 'MIT': build it again")
    forge(bundle, lambda document: document.update(schema_version="2.7"))
    refused(bundle, r"licence: .*its schema 2\.7 is newer: update qdm-deploy")


@pytest.mark.parametrize("required", ["999", "0.1.1", "1.0"])
def test_a_bundle_for_a_newer_runtime_is_refused(bundle: Path, forge: Forge, required: str) -> None:
    forge(bundle, lambda document: document["compatibility"].update(min_runtime=required))
    refused(bundle, rf"it needs qdm-deploy {required} or newer, and this is \d.*: update qdm-deploy")


@pytest.mark.parametrize("required", ["0", "0.1", "0.1.0", "0.0.99"])
def test_a_bundle_for_this_runtime_or_an_older_one_opens(bundle: Path, forge: Forge, required: str) -> None:
    forge(bundle, lambda document: document["compatibility"].update(min_runtime=required))
    assert check_bundle(bundle) == []


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"PK\x03\x04\xff", "is not JSON"),
        (b"[]", "holds a list, and an object is expected"),
        (b'{"schema_version": NaN}', "is not JSON: NaN is not a JSON number"),
        (b'{"schema_version": 1e999999', "is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON"),
        ('{"schema_version": "1.0"}'.encode("utf-16"), "is not JSON"),
        (b'{"schema_version": "2.0", "name": "\\ud800"}', r"name.*is not valid Unicode"),
        (b'{"schema_version": "2.0", "provenance": {"psnr": 1e999}}', r"provenance\.psnr is inf"),
        (b'{"schema_version": "2.0"}', "name: Field required.*more"),
    ],
)
def test_what_is_not_a_manifest_is_refused(bundle: Path, content: bytes, message: str) -> None:
    (bundle / "manifest.json").write_bytes(content)
    refused(bundle, rf"manifest\.json cannot be used, .*{message}")


def test_a_manifest_that_is_too_large_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes() + b" " * MAX_MANIFEST_BYTES)
    refused(bundle, rf"manifest\.json is larger than the allowed {MAX_MANIFEST_BYTES} bytes")


def test_an_endless_manifest_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    with open(path, "r+b") as stream:
        stream.truncate(1 << 40)  # a sparse file: 1 TiB to read, nothing on the disk
    refused(bundle, r"manifest\.json is larger")


def test_a_missing_manifest_is_refused(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    refused(bundle, r"has no manifest\.json: .*`qdm-deploy build`, or copy it again")


@pytest.mark.parametrize("make", ["missing", "file"])
def test_what_is_not_a_folder_is_refused(tmp_path: Path, make: str) -> None:
    if make == "file":
        (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / make, "is not a folder; give the folder of a bundle")


@pytest.mark.parametrize("kind", ["symbolic link", "hard links", "pipe", "folder"])
def test_a_manifest_that_is_no_regular_file_is_refused(bundle: Path, tmp_path: Path, kind: str) -> None:
    import os

    path, moved = bundle / "manifest.json", tmp_path / "moved"
    path.rename(moved)
    make: dict[str, Callable[[], object]] = {
        "symbolic link": lambda: path.symlink_to(moved),
        "hard links": lambda: path.hardlink_to(moved),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    make[kind]()
    refused(bundle, rf"manifest\.json cannot be read .*{kind}")


def test_a_reformatted_manifest_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(canonical_json(json.loads(path.read_bytes())))
    refused(bundle, r"manifest\.json cannot be used, it was reformatted or edited")


def test_a_repeated_key_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'  "name"', b'  "name": "other",\n  "name"', 1))
    refused(bundle, "it was reformatted or edited")


def test_an_edited_manifest_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"opset": 21', b'"opset": 22'))
    refused(
        bundle,
        r"it was changed after it was written: its bundle_id is '[0-9a-f]{64}', and its content gives [0-9a-f]{64}",
    )


# ------------------------------------------------------------------------------------------------ paths and file lists

BAD_PATHS = {
    "parent": "../secret.json",
    "parent inside": "unet/../../secret.json",
    "dot": "./unet/x.json",
    "absolute": "/etc/x.json",
    "drive": "C:/x.json",
    "backslash": "unet\\x.json",
    "backslash parent": "..\\x.json",
    "empty": "",
    "double slash": "unet//x.json",
    "trailing slash": "unet/x.json/",
    "trailing dot": "unet./x.json",
    "space": "a b.json",
    "newline": "x.json\n",
    "null": "x\x00.json",
    "composed": "\u00e9.json",
    "decomposed": "e\u0301.json",
    "right-to-left": "\u202enosj.json",
    "full-width dots": "\uff0e\uff0e/x.json",
    "colon": "x:stream.json",
    "too long": "x" * 200 + ".json",
    "pickle": "unet/weights.pt",
    "engine": "unet/model.engine",
    "plugin": "unet/plugin.so",
    "script": "unet/run.py",
    "no suffix": "unet/weights",
}


@pytest.mark.parametrize("path", BAD_PATHS.values(), ids=BAD_PATHS.keys())
def test_a_path_that_may_not_be_in_a_bundle_is_refused(bundle: Path, forge: Forge, path: str) -> None:
    entry = {"path": path, "size": 0, "sha256": "0" * 64, "role": "other"}
    forge(bundle, lambda document: document["files"].append(entry))
    refused(bundle, rf"files\.6\.path: the path {re.escape(ascii(path))} (has|is no kind of file)")
    assert relative_path_problem(path)


@pytest.mark.parametrize("path", ["model_index.json", "LICENSE", ".gitattributes.txt", "a/b/c/d-e_f.0.safetensors"])
def test_ordinary_paths_are_allowed(path: str) -> None:
    assert relative_path_problem(path) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("UNET/other.json", "UNET and unet differ in upper and lower case only"),
        ("unet/Weights.bin", r"unet/Weights\.bin and unet/weights\.bin differ in upper"),
        ("MANIFEST.json", r"MANIFEST\.json and manifest\.json differ"),
        ("manifest.json", r"the file manifest\.json is listed twice, or is the manifest itself"),
        ("unet/weights.bin", r"the file unet/weights\.bin is listed twice"),
    ],
)
def test_paths_that_are_one_file_somewhere_are_refused(bundle: Path, forge: Forge, path: str, message: str) -> None:
    entry = {"path": path, "size": 0, "sha256": "0" * 64, "role": "other"}
    forge(bundle, lambda document: document["files"].append(entry))
    refused(bundle, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["files"][0].update(size=-1), r"files\.0\.size: .*given -1"),
        (lambda d: d["files"][0].update(size="2"), r"files\.0\.size: .*given '2'"),
        (lambda d: d["files"][0].update(size=2.0), r"files\.0\.size: .*given 2\.0"),
        (lambda d: d["files"][0].update(sha256="F" * 64), r"files\.0\.sha256: .*given 'F"),
        (lambda d: d["files"][0].update(sha256="f" * 63), r"files\.0\.sha256"),
        (lambda d: d["files"][0].update(role="<script>"), r"files\.0\.role: .*given '<script>'"),
        (lambda d: d.update(name="\x1b[2J"), r"name: .*given '\\x1b\[2J'"),
        (lambda d: d.update(name=""), "name: .*at least 1 character"),
        (lambda d: d.update(targets=[]), "targets: .*at least 1 item"),
        (lambda d: d.update(targets=["../x"]), r"targets\.0: .*given '\.\./x'"),
        (lambda d: d.update(targets=["tensorrt"]), r"targets \['tensorrt'\]: .*missing: \['tensorrt'\]"),
        (lambda d: d.update(targets=["float", "float"]), r"targets \['float', 'float'\]: each needs one"),
        (lambda d: d.update(created="yesterday"), "created: .*'yesterday'"),
        (
            lambda d: d.update(created="2026-01-31T12:00:00+01:00"),
            r"created: '2026-01-31T12:00:00\+01:00' is not a UTC",
        ),
        (lambda d: d.update(created="2026-01-31T12:00:00"), "created: '2026-01-31T12:00:00' is not a UTC"),
        (lambda d: d["compatibility"].update(opset=0), r"compatibility\.opset: .*given 0"),
        (lambda d: d["compatibility"].update(min_runtime="latest"), r"compatibility\.min_runtime: .*given 'latest'"),
        (
            lambda d: d["pipeline"]["components"][0].update(num_train_timesteps=0),
            r"pipeline\.components\.0\.denoiser\.num_train_timesteps: .*given 0",
        ),
        (lambda d: d["pipeline"].update(name="a\x1b[2Jb"), r"pipeline\.name: .*pattern"),
        (lambda d: d["pipeline"].update(components=[]), r"pipeline\.components: .*at least 1 item"),
        (lambda d: d.update(recipe=[]), r"recipe: .*given \[\]"),
    ],
)
def test_a_field_outside_its_range_is_refused(bundle: Path, forge: Forge, edit: Edit, message: str) -> None:
    forge(bundle, edit)
    refused(bundle, message)


def test_a_value_is_cut_to_a_line_in_messages(bundle: Path, forge: Forge) -> None:
    forge(bundle, lambda document: document.update(created=["x" * 10_000]))
    (finding,) = check_bundle(bundle)
    assert len(finding) < 600
    assert "\n" not in finding


def test_a_file_entry_checks_its_path_in_python_too() -> None:
    with pytest.raises(ValidationError, match=r"the path '\.\./x\.json' has the part '\.\.'"):
        FileEntry(path="../x.json", size=0, sha256="0" * 64, role="other")


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("unet/tensorrt.onnx", "graph"),
        ("unet/weights.bin", "weights"),
        ("unet/float.onnx.data", "weights"),
        ("unet/plan.json", "plan"),
        ("unet/plan.safetensors", "plan"),
        ("scheduler/scheduler_config.json", "scheduler"),
        ("selftest/inputs.safetensors", "selftest"),
        ("report.html", "report"),
        ("model_index.json", "other"),
    ],
)
def test_roles(path: str, role: str) -> None:
    assert role_of(path) == role
