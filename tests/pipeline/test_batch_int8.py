"""Batch generation with a real INT8 network, whose kernels may round differently in another company of rows."""

from pathlib import Path

import pytest

from qdm_deploy.batch import BatchOptions, generate_batch, verify_batch


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_workers_and_ranks_change_no_byte(labels: Path, tmp_path: Path, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")

    def make(out: Path, **changes: int) -> None:
        options = {"count": 22, "shard_size": 6, "batch_size": 4, "steps": 3, "threads": 2, **changes}
        generate_batch(BatchOptions(bundle=labels, out=out, backend=backend, sampler="ddpm", guidance=1.5, **options))  # type: ignore[arg-type]

    make(tmp_path / "whole")
    make(tmp_path / "parts", rank=2, world=3)
    make(tmp_path / "parts", workers=2)
    assert verify_batch(tmp_path / "parts").ok
    for path in (tmp_path / "whole").glob("*.tar"):
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()
