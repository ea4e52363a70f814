"""Starts workers of a batch job and kills them, many times a second.

A new interpreter takes a second to import what a worker needs, and a killed worker a few milliseconds: so this process
imports everything once and forks. Each worker is a process of its own that does what ``qdm-deploy batch`` does; it is
killed with SIGKILL after a random time. Arguments: a JSON object with ``options`` (of BatchOptions), ``kills`` and
``seed``. Prints one JSON object: how many were killed, and where in their work.
"""

import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import onnxruntime  # noqa: F401  the child must not import it

from qdm_deploy.batch import BatchOptions, generate_batch
from qdm_deploy.batch.job import JOB_NAME

WORKERS = 2


def start(options: BatchOptions) -> int:
    """A worker; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            generate_batch(options)
            code = 0
        finally:
            os._exit(code)
    return pid


def state(out: Path) -> str:
    """What a kill left in the folder, besides complete shards."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    temporary = [name for name in names if re.match(r"\..+\.tmp-", name)]
    unmarked = [name for name in names if name.endswith(".tar") and name.replace(".tar", ".json") not in names]
    if JOB_NAME not in names:
        return "before the job was written"
    if unmarked:
        return "between a shard and its marker"
    return "inside a shard" if temporary else "between shards"


def main() -> None:
    """Kill until it is enough, then let one run end."""
    request = json.loads(sys.argv[1])
    options = BatchOptions(**{**request["options"], "bundle": Path(request["options"]["bundle"]),
                              "out": Path(request["options"]["out"])})  # fmt: skip
    chance = random.Random(request["seed"])
    where: Counter[str] = Counter()
    failed = 0
    while where.total() < request["kills"]:
        # Two workers race for the same shards: neither knows of the other.
        pids = [start(options) for _ in range(WORKERS)]
        for pid in pids:
            time.sleep(chance.uniform(0.0, request["longest"]))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                where[state(options.out)] += 1
            else:
                failed += os.WEXITSTATUS(status) != 0
        shards = sorted(options.out.glob("shard-*.json")) if options.out.is_dir() else []
        if len(shards) * options.shard_size > 0.9 * options.count:
            # Nearly done: somebody loses half of it, so that there is work for the next ones.
            for marker in chance.sample(shards, len(shards) // 2):
                marker.with_suffix(".tar").unlink(missing_ok=True)
                marker.unlink()
    pids = [start(options) for _ in range(WORKERS)]
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps({"where": where, "failed": failed, "ends": ends}))


main()
