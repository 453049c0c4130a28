"""What the inputs of a matrix have in common: H = mean of x x^T, and its Cholesky factors."""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RequestError

__all__ = ["Hessian"]

DAMPING = 0.01  # of the mean diagonal, at first
GROWTH = 10.0  # when that does not make the matrix positive definite
ATTEMPTS = 6
SMALL = 64  # rows of a triangle that is inverted as any matrix

Array = NDArray[np.float32]


class Hessian:
    """Second moments of a matrix's inputs, in proportion: the mean of the diagonal is 1.

    Channels that were never active keep a diagonal of 1 and no relation to others, so that errors
    are neither pushed into them nor out of them.

    >>> hessian = Hessian(np.array([[2, 0], [0, 6]], np.float32))
    >>> hessian.matrix.tolist()
    [[0.5, 0.0], [0.0, 1.5]]
    """

    def __init__(self, moments: NDArray[np.floating[Any]], name: str = "Hessian") -> None:
        """moments: [n, n], symmetric and without negative diagonal entries.

        Raises RequestError, which begins with `name`, for anything else.
        """
        n = len(moments)
        if moments.ndim != 2 or moments.shape != (n, n):
            raise RequestError(f"{name}: shape {moments.shape}: expected [n, n]")
        diagonal = np.diagonal(moments)
        if not np.isfinite(moments).all() or (diagonal < 0).any():
            raise RequestError(f"{name}: expected finite numbers, and none below 0 on the diagonal")
        self._name = name
        matrix = np.array(moments, np.float32)
        dead = diagonal <= 0
        mean = float(diagonal.mean(dtype=np.float64)) or 1.0
        matrix /= np.float32(mean)
        matrix[dead] = 0
        matrix[:, dead] = 0
        matrix[dead, dead] = 1
        self.matrix: Array = matrix

    def prepare(self) -> None:
        """Do what takes long. Raises RequestError as `feedback` does."""
        _ = self.feedback

    @cached_property
    def feedback(self) -> Array:
        """Upper triangular U, float32 [n, n], with U^T U = (H + damping)^-1.

        Row j says how the error of column j is spread over the columns after it (Frantar et al.
        2022, arXiv:2210.17323, section 3.3). Raises RequestError when H is far from being positive
        definite.
        """
        eye = np.arange(len(self.matrix))
        damping = DAMPING
        for _ in range(ATTEMPTS):
            # Of the matrix turned by 180 degrees: its lower factor, turned back, is an upper one.
            turned = self.matrix[::-1, ::-1].astype(np.float64)
            turned[eye, eye] += damping
            try:
                lower = np.linalg.cholesky(turned)
            except np.linalg.LinAlgError:
                damping *= GROWTH
                continue
            del turned  # a large model's take gigabytes
            _invert_lower(lower)
            return np.ascontiguousarray(lower[::-1, ::-1], np.float32)
        raise RequestError(f"{self._name}: not positive semidefinite: collect it again")


def _invert_lower(lower: NDArray[np.floating[Any]]) -> None:
    """Invert a lower triangular matrix [n, n] in place, half by half: a quarter of the work that
    a general inverse takes, and no copies.
    """
    n = len(lower)
    if n <= SMALL:
        lower[:] = np.tril(np.linalg.inv(lower))
        return
    half = n // 2
    above, below, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(above)
    _invert_lower(below)
    corner[:] = -(below @ (corner @ above))
