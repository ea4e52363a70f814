"""Integrals of Lagrange polynomials over one step: the weights of a linear multistep method with uneven steps."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["lagrange_integrals"]

# Exact for polynomials up to degree 47, and to float64 for exp over the lengths of log sigma that a run spans.
_POINTS, _POINT_WEIGHTS = np.polynomial.legendre.leggauss(24)


def lagrange_integrals(
    nodes: NDArray[np.float64], end: float, weight: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None
) -> NDArray[np.float64]:
    """The integrals from 0 to ``end`` of the polynomials that are 1 at one node and 0 at the others.

    Args:
        nodes: [order] float64, distinct.
        end: Where the integrals end; below 0 as well.
        weight: A factor under the integral, 1 unless given.

    Returns:
        [order] float64.
    """
    at = (_POINTS + 1.0) * (end / 2.0)
    shares = _POINT_WEIGHTS * (end / 2.0)
    if weight is not None:
        shares = shares * weight(at)
    polynomials = [
        np.prod([(at - other) / (node - other) for other in np.delete(nodes, index)], axis=0) * np.ones_like(at)
        for index, node in enumerate(nodes)
    ]
    return np.asarray(np.stack(polynomials) @ shares)
