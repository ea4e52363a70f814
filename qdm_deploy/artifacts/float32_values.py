"""Which values of a graph stay float32 where the rest is bfloat16.

ONNX types cannot say it to OpenVINO: what a kernel of integers writes has the type that the session asks for, and not
the type of a Cast behind it (docs/adr/0021). So the names stand in the graph's metadata, and the session hands them on.
"""

from collections.abc import Iterable

__all__ = ["FLOAT32_VALUES_KEY", "join_names", "split_names"]

# In a model's metadata. A graph that has it is computed in bfloat16, but for what makes these values.
FLOAT32_VALUES_KEY = "qdm.float32_values"


def join_names(names: Iterable[str]) -> str:
    """The metadata's text for these values."""
    return "\n".join(names)


def split_names(text: str) -> frozenset[str]:
    """The names that ``join_names`` was given."""
    return frozenset(text.split("\n")) - {""}
