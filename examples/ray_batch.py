"""A batch job on a Ray cluster: one task for each part of the shards.

    python examples/ray_batch.py fashion.qdm samples --num 1000000 --parts 64 --cpus 4 --address auto

A task whose machine dies is started again by Ray, on another one, and makes what is missing; run the whole script
again after anything worse. BUNDLE and OUT are on a file system that all machines share. Needs
`pip install 'qdm-deploy[ray]'`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import ray

from qdm_deploy.batch import BatchOptions, generate_batch, verify_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, required=True, help="images of the whole job")
    parser.add_argument("--parts", type=int, default=8, help="tasks; more than run at once is fine")
    parser.add_argument("--cpus", type=int, default=1, help="cores of each task")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--format", default="webdataset")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--address", help="address of a running cluster; without it, Ray starts on this machine")
    given = parser.parse_args()
    options = BatchOptions(
        bundle=given.bundle.resolve(),
        out=given.out.resolve(),
        count=given.num,
        steps=given.steps,
        backend=given.backend,
        shard_size=given.shard_size,
        format=given.format,
        threads=given.cpus,
    )

    ray.init(address=given.address, num_cpus=None if given.address else given.cpus * 2, include_dashboard=False)

    @ray.remote(num_cpus=given.cpus, max_retries=5)
    def part(rank: int) -> int:
        return generate_batch(replace(options, rank=rank, world=given.parts)).images

    waiting = [part.remote(rank) for rank in range(given.parts)]
    made = 0
    while waiting:
        done, waiting = ray.wait(waiting)
        made += sum(ray.get(done))
        print(f"{given.parts - len(waiting)} of {given.parts} parts are done, {made} new images", flush=True)
    found = verify_batch(options.out)
    print("\n".join(found.findings) or f"{found.images} images, all intact")
    ray.shutdown()


if __name__ == "__main__":
    main()
