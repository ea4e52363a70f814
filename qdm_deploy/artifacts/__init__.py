"""Values on disk: bundles, saved records, and files that are complete or absent."""

from qdm_deploy.artifacts.bundle import Bundle, BundleWriter, check_bundle
from qdm_deploy.artifacts.files import canonical_json, new_directory, new_file, sha256_of
from qdm_deploy.artifacts.manifest import Compatibility, FileEntry, Manifest
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.artifacts.record import read_record, tool_versions, write_record

__all__ = [
    "Bundle",
    "BundleWriter",
    "Compatibility",
    "FileEntry",
    "Manifest",
    "PipelineSpec",
    "canonical_json",
    "check_bundle",
    "new_directory",
    "new_file",
    "read_record",
    "sha256_of",
    "tool_versions",
    "write_record",
]
