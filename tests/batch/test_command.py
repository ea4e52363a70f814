"""``qdm-deploy batch``, ``batch status`` and ``batch verify`` on the command line."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qdm_deploy.batch import BatchOptions
from qdm_deploy.cli.main import cli

QUICK = "--num 13 --shard-size 5 --batch-size 4 --steps 1 --threads 1 --backend onnxruntime"


def invoke(*words: object) -> Any:
    return CliRunner().invoke(cli, [part for word in words for part in str(word).split()])


def test_every_option_is_on_the_command_line() -> None:
    named = {parameter.name for parameter in cli.commands["batch"].params if parameter.expose_value}
    assert named == {field.name for field in fields(BatchOptions)}


def test_defaults_are_those_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(options: Any, progress: Any) -> Any:
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("qdm_deploy.batch.generate_batch", record)
    assert invoke("batch x.qdm --num 5 --out out").exit_code == 130
    assert seen == [BatchOptions(bundle=Path("x.qdm"), out=Path("out"), count=5)]


def test_make_look_and_check(classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = invoke("batch", classes, QUICK, "--out", out, "--rank 0 --world 2")
    assert made.exit_code == 0, made.output
    assert "10 images" not in made.output
    assert "8 images in 2 shards, " in made.output
    assert "unfinished: 2 of 3 shards, 8 of 13 images, " in made.output
    status = json.loads(invoke("batch status --json", out).stdout)
    assert (status["command"], status["missing"], status["complete"]) == ("batch status", [1], False)
    found = invoke("batch --json verify", out)
    assert found.exit_code == 1
    document = json.loads(found.stdout)
    assert (document["command"], document["ok"], document["bad"]) == ("batch verify", False, [1])
    assert document["findings"] == ["shard-00001.tar is missing: pictures 5 to 9 are not there"]
    assert invoke("batch -q", classes, QUICK, "--out", out).stdout == f"{out}\n"
    assert invoke("batch status -q", out).stdout == "3 of 3 shards, 13 of 13 images\n"
    again = invoke("batch", classes, QUICK, "--out", out)
    assert again.stdout.startswith("nothing was missing\ncomplete: 3 of 3 shards, 13 of 13 images, ")
    good = invoke("batch verify", out)
    assert (good.exit_code, good.stdout) == (0, f"{out} is good: 13 images are there and intact\n")


def test_a_changed_command_is_exit_code_2(classes: Path, tmp_path: Path) -> None:
    assert invoke("batch", classes, QUICK, "--out", tmp_path).exit_code == 0
    done = invoke("batch", classes, QUICK, "--out", tmp_path, "--steps 2 --json")
    assert done.exit_code == 2
    assert "belongs to another job (steps: 1 there, 2 here)" in json.loads(done.stdout)["error"]["message"]


def test_help_names_all_three_commands() -> None:
    text = invoke("batch --help").output
    assert "qdm-deploy batch status DIR    How far a job is." in text
    for other in ("status", "verify"):
        assert f"Examples:\n  qdm-deploy batch {other}" in invoke(f"batch {other} --help").output
    assert invoke("batch status").exit_code == 2
    assert invoke("batch x.qdm --out y").exit_code == 2
