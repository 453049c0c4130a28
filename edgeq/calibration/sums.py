"""What calibration adds up over tokens: squares of inputs, and their outer products."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.imatrix import Imatrix

__all__ = ["Group", "Outer", "Sums", "passes"]

Array = NDArray[np.float32]
Group = tuple[tuple[str, ...], int]  # weights that share an input, its width


class Sums:
    """Sums of x² per input channel, in float64: half a million tokens lose nothing."""

    def __init__(self) -> None:
        self.sums: dict[str, NDArray[np.float64]] = {}  # [n_mat, n_in]
        self.counts: dict[str, NDArray[np.float64]] = {}  # [n_mat]

    def add(self, names: Sequence[str], x: Array) -> None:
        """Input x [n, n_in] of all these weights, for n tokens.

        Raises ModelError when a value is not finite.

        >>> sums = Sums()
        >>> sums.add(["a.weight"], np.array([[1, 2], [3, 0]], np.float32))
        >>> sums.sums["a.weight"].tolist(), sums.counts["a.weight"].tolist()
        ([[10.0, 4.0]], [2.0])
        """
        squares = _squares(x, names[0])
        for name in names:
            self._add(name, squares[None], np.array([len(x)], np.float64))

    def add_routed(self, name: str, x: Array, experts: NDArray[np.integer], n_mat: int) -> None:
        """Input x [n, n_in] of a weight of n_mat experts; experts [n, used]: where each token went.

        >>> sums = Sums()
        >>> sums.add_routed("a.weight", np.array([[1], [2]], np.float32), np.array([[0], [2]]), 3)
        >>> sums.sums["a.weight"].tolist(), sums.counts["a.weight"].tolist()
        ([[1.0], [0.0], [4.0]], [1.0, 0.0, 1.0])
        """
        rows = [x[(experts == expert).any(axis=1)] for expert in range(n_mat)]
        squares = np.stack([_squares(seen, name) for seen in rows])
        self._add(name, squares, np.array([len(seen) for seen in rows], np.float64))

    def _add(self, name: str, squares: NDArray[np.float64], counts: NDArray[np.float64]) -> None:
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares
        self.counts[name] = self.counts[name] + counts if name in self.counts else counts

    def imatrix(self, datasets: Iterable[str], chunk_count: int, chunk_size: int) -> Imatrix:
        """The sums so far, as a file holds them."""
        return Imatrix(
            {name: values.astype(np.float32) for name, values in self.sums.items()},
            {name: values.astype(np.float32) for name, values in self.counts.items()},
            tuple(datasets),
            chunk_count,
            chunk_size,
        )


def _squares(x: Array, name: str) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    squares: NDArray[np.float64] = np.einsum("tc,tc->c", wide, wide)
    # What float32 cannot hold would be infinite in the file.
    if not (squares < np.finfo(np.float32).max).all():
        token, channel = np.argwhere(~(np.abs(x) < 1e18))[0]
        raise ModelError(
            f"{name}: input channel {channel} is {x[token, channel]} at token {token} of a batch: "
            "expected finite numbers: is the model damaged, or does it overflow in this format?"
        )
    return squares


class Outer:
    """Sums of x xᵀ, float32 [n_in, n_in], for groups of weights."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.sums = {names[0]: np.zeros((n, n), np.float32) for names, n in groups}

    def add(self, names: Sequence[str], x: Array) -> None:
        """Input x [n, n_in] of a group; of others nothing is kept."""
        if names[0] in self.sums:
            # NumPy sees that both are one array, and computes one triangle only.
            self.sums[names[0]] += x.T @ x


def passes(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """Groups in order, cut so that the Hessians of each part take at most `budget` bytes; a group
    that alone takes more is a part of its own.

    >>> [len(part) for part in passes([(("a",), 10), (("b",), 10), (("c",), 30)], 1000)]
    [2, 1]
    """
    parts: list[list[Group]] = []
    room = 0
    for names, n in groups:
        if not parts or room < 4 * n * n:
            parts.append([])
            room = budget
        parts[-1].append((names, n))
        room -= 4 * n * n
    return parts
