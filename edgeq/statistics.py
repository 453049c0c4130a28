"""What is known about the inputs of each matrix, by GGUF name: importance and Hessians."""

from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RequestError
from edgeq.quantizers import Hessian

if TYPE_CHECKING:
    from edgeq.hessian import Hessians

__all__ = ["Statistics"]

Array = NDArray[np.float32]


class Statistics:
    """Importance [cols] and Hessians [cols, cols] of matrices, for scaled columns where `scaled`.

    >>> known = Statistics({"blk.0.attn_q.weight": np.array([4.0, 1.0], np.float32)})
    >>> known.scale("blk.0.attn_q.weight", np.array([2.0, 1.0], np.float32))
    >>> known.importance("blk.0.attn_q.weight").tolist()
    [1.0, 1.0]
    """

    def __init__(
        self, importance: Mapping[str, Array] | None = None, hessians: "Hessians | None" = None
    ) -> None:
        """importance: mean square activation of each column. hessians: an open file."""
        self._importance = importance or {}
        self._hessians = hessians
        self._scales: dict[str, Array] = {}
        self._diagonals: dict[str, Array] = {}
        self._ready: dict[str, Hessian] = {}  # the last ones asked for, the very last at the end
        self._lock = Lock()

    def __bool__(self) -> bool:
        return bool(self._importance) or self._hessians is not None

    @property
    def has_hessians(self) -> bool:
        return self._hessians is not None

    def scale(self, name: str, factors: Array) -> None:
        """From now on columns of a matrix are `factors` times what they were, inputs as much less.

        factors: float32 [cols], all above 0.
        """
        self._scales[name] = self._scales.get(name, np.float32(1)) * factors
        self._ready.clear()

    def importance(self, name: str) -> Array | None:
        """Mean square input of each column [cols] (from the Hessian where nothing else says), or
        None.

        Raises FormatError for a damaged file of Hessians.
        """
        known = self._importance.get(name)
        if known is None:
            known = self._diagonal(name)
        if known is None or name not in self._scales:
            return known
        return known / self._scales[name] ** 2

    def _diagonal(self, name: str) -> Array | None:
        """Of the Hessian of a matrix, read once for all that share it."""
        if self._hessians is None or not self.knows(name):
            return None
        stored = self._hessians.weights[name]
        with self._lock:
            if stored not in self._diagonals:
                moments = self._hessians.get(name)
                assert moments is not None
                self._diagonals[stored] = np.array(np.diagonal(moments))
            return self._diagonals[stored]

    def moments(self, name: str) -> Array | None:
        """Mean of x x^T over the inputs x, float32 [cols, cols], or None.

        Raises FormatError for a damaged file.
        """
        found = None if self._hessians is None else self._hessians.get(name)
        if found is None or name not in self._scales:
            return found
        inverse: Array = np.float32(1) / self._scales[name]
        scaled: Array = found * inverse * inverse[:, None]
        return scaled

    def knows(self, name: str) -> bool:
        """Whether there is a Hessian of this matrix."""
        return self._hessians is not None and name in self._hessians.weights

    def hessian(self, name: str) -> Hessian | None:
        """The same, factored for quantizers, and kept for others with the same inputs.

        May be called from several threads: the first one does the work. Raises RequestError for one
        that is no such mean, FormatError for a damaged file.
        """
        if self._hessians is None or not self.knows(name):
            return None
        key = name if name in self._scales else self._hessians.weights[name]
        with self._lock:
            found = self._ready.pop(key, None)
            if found is None:
                moments = self.moments(name)
                assert moments is not None
                found = Hessian(moments, f"Hessian of {name}")
                found.prepare()
            # Threads work on neighbouring matrices: the one before may still be needed.
            self._ready = {**dict(list(self._ready.items())[-1:]), key: found}
            return found

    def check(self, shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
        """Refuse Hessians of another model. Raises RequestError."""
        if self._hessians is None:
            return
        for name, stored in self._hessians.weights.items():
            size = self._hessians.size(stored)
            if size != shapes.get(name, (0,))[-1]:
                raise RequestError(
                    f"{self._hessians.path}: {name}: Hessian of {size} inputs: {where} has "
                    f"{shapes.get(name, 'no such tensor')}: expected Hessians of the same model"
                )
