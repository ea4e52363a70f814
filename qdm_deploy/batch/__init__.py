"""Generating very many images: a pure function of a job and an index, committed shard by shard."""

from qdm_deploy.batch.generation import BatchResult, generate_batch
from qdm_deploy.batch.options import FORMATS, BatchOptions
from qdm_deploy.batch.status import BatchStatus, BatchVerification, batch_status, verify_batch

__all__ = [
    "FORMATS",
    "BatchOptions",
    "BatchResult",
    "BatchStatus",
    "BatchVerification",
    "batch_status",
    "generate_batch",
    "verify_batch",
]
