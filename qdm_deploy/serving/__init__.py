"""Serving a bundle: step-level continuous batching, and HTTP."""
