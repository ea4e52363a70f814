"""The HTTP side of serving; its modules need the extra ``serve`` and are imported inside functions."""
