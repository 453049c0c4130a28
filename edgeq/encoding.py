"""From the rows of a source to the bytes of a file: what a method does with each tensor."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError, RequestError
from edgeq.gguf import TensorSpec
from edgeq.native import ready
from edgeq.quantizers import check_needs, find, needs, quantize, thread_count
from edgeq.sources import Source
from edgeq.statistics import Statistics
from edgeq.stream import Chunk, Encoded

__all__ = ["Encoder"]


@dataclass(frozen=True, slots=True)
class Encoder:
    """From float32 rows to the bytes of a format."""

    method: str
    statistics: Statistics
    threads: int | None

    def check(self, source: Source) -> None:
        """Refuse bad settings before work. Raises RequestError."""
        thread_count(self.threads)
        known = self.statistics
        check_needs(self.method, importance=bool(known), hessians=known.has_hessians)
        self.statistics.check(source.shapes, source.path)

    def method_for(self, spec: TensorSpec) -> str:
        """What really quantizes a tensor: matrices without a Hessian are searched, and floats are
        all the same to every method ("rtn" spares the import of compiled code).
        """
        if spec.format.value == "x":
            return "rtn"
        if needs(self.method) == "hessian" and not self.statistics.knows(spec.name):
            return "search"
        return self.method

    def uncovered(self, specs: Iterable[TensorSpec]) -> list[str]:
        """A warning when the method has to leave matrices of the layers to another one.

        Tables and experts never have a Hessian and do not count.
        """
        matrices = [
            spec
            for spec in specs
            if spec.name.startswith("blk.") and len(spec.shape) == 2 and spec.format.value != "x"
        ]
        left = [spec.name for spec in matrices if self.method_for(spec) != self.method]
        if not left:
            return []
        return [
            f"no Hessian for {len(left)} of {len(matrices)} matrices of the layers, such as "
            f"{left[0]}: they are left to search: calibrate the whole model"
        ]

    def __call__(self, spec: TensorSpec, chunk: Chunk) -> Encoded:
        """Bytes of some rows of a tensor. Raises ModelError."""
        if chunk.raw is not None:
            return Encoded(chunk.raw, True)
        assert chunk.w is not None
        # Plain rounding leaves integers alone only where the source says that they are some.
        plain = self.method == "rtn" and chunk.grid is None
        found = None if plain else ready(spec.format, chunk.w, chunk.grid)
        if found is None:
            return Encoded(self._quantize(spec, chunk.start, chunk.w), False)
        kept = find(self.method).pack(found.fields, spec.format)
        if found.exact.all():
            return Encoded(kept, True)
        others = self._quantize(spec, chunk.start, chunk.w)
        shape = (*found.exact.shape, -1)
        both = np.where(found.exact[..., None], kept.reshape(shape), others.reshape(shape))
        return Encoded(both.reshape(kept.shape), False)

    def _quantize(self, spec: TensorSpec, start: int, w: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Bytes [n, row_bytes] of rows w [n, cols] from row `start` on. Raises ModelError."""
        if spec.format.name == "F32":
            return np.ascontiguousarray(w).view(np.uint8)
        method, known = self.method_for(spec), self.statistics
        moments = known.hessian(spec.name) if needs(method) == "hessian" else None
        weights = known.importance(spec.name) if moments is None else None
        if weights is not None and weights.ndim == 2:  # one row of weights for each expert
            return self._experts(spec, start, w, weights)
        try:
            return quantize(w, spec.format, weights, method, 1, moments)
        except RequestError as error:  # settings are checked: it is about the values
            raise ModelError(f"{spec.name}, rows from {start} on: {error}") from error

    def _experts(
        self, spec: TensorSpec, start: int, w: NDArray[np.float32], weights: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """Rows from `start` on of a tensor [n_mat, rows, cols], each with weights of its expert."""
        rows, done, parts = spec.shape[-2], 0, list[NDArray[np.uint8]]()
        while done < len(w):
            expert, row = divmod(start + done, rows)
            stop = min(done + rows - row, len(w))
            one = dataclasses.replace(self, statistics=Statistics({spec.name: weights[expert]}))
            parts.append(one._quantize(spec, start + done, w[done:stop]))
            done = stop
        return np.concatenate(parts)
