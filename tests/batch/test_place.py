"""Which part of a job a process makes, as its launcher tells it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.batch.place import Place, find_place
from qdm_deploy.errors import InputError

SLURM = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1",
         "SLURM_ARRAY_TASK_STEP": "2"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, "one machine")),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, Place(3, 4, "SLURM_ARRAY_TASK_ID")),
        (SLURM, Place(2, 4, "SLURM_ARRAY_TASK_ID")),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Place(0, 2, "RANK")),
        ({"RANK": "7"}, Place(0, 1, "one machine")),
        ({"JOB_COMPLETION_INDEX": "9", "JOB_COMPLETIONS": "10"}, Place(9, 10, "JOB_COMPLETION_INDEX")),
    ],
)
def test_a_launcher_says_which_part(environment: dict[str, str], place: Place) -> None:
    assert find_place(None, None, environment) == place
    assert find_place(1, 8, environment) == Place(1, 8, "--rank and --world")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"},
            r"SLURM array task 7 \(first 3, step 1\) has no place among 2 tasks: .* --array=0-1; give --rank",
        ),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "4"}, r"SLURM array task 4 \(first 1, step 2\) has no place among 4 tasks"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, r"the variable SLURM_ARRAY_TASK_COUNT is ''; it should be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK is 2 and WORLD_SIZE is 2; ranks are 0 to 1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, r"the variable RANK is 'one'; it should be a number"),
        ({"JOB_COMPLETION_INDEX": "1"}, r"JOB_COMPLETION_INDEX is set and JOB_COMPLETIONS is not"),
        (
            {**SLURM, "RANK": "0", "WORLD_SIZE": "1"},
            r"two launchers say which part this is: SLURM_ARRAY_TASK_ID and RANK; give --rank and --world",
        ),
    ],
)
def test_what_a_launcher_leaves_open_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_place(None, None, environment)


def test_workers_split_a_place_without_gap_or_overlap() -> None:
    parts = [find_place(rank, 3, {}).split(worker, 2) for rank in range(3) for worker in range(2)]
    assert {part.world for part in parts} == {6}
    assert sorted(part.rank for part in parts) == list(range(6))


def test_the_command_says_which_variables_it_used(
    classes: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    command: list[Any] = [sys.executable, "-m", "qdm_deploy.cli.main", "batch", classes, "--num", 40, "--out", tmp_path,
                          "--shard-size", 5, "--steps", 1, "--threads", 1, "--json"]  # fmt: skip
    done = subprocess.run([str(word) for word in command], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "part 2 of 4, from SLURM_ARRAY_TASK_ID" in done.stderr
    document = json.loads(done.stdout)
    assert document["command"] == "batch"
    assert document["place"] == {"rank": 2, "world": 4, "source": "SLURM_ARRAY_TASK_ID"}
    assert (document["made"]["shards"], document["shards"], document["complete"]) == (2, 2, False)
    assert sorted(re.findall(r"\d+", path.name)[0] for path in tmp_path.glob("*.tar")) == ["00002", "00006"]
