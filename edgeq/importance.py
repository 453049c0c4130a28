"""Which column matters how much, for a conversion: a mapping, or an importance matrix of a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import imatrix
from edgeq.errors import FormatError, RequestError
from edgeq.imatrix import Imatrix
from edgeq.text import printable

__all__ = ["Given", "Importance", "resolve"]

Array = NDArray[np.float32]
Given = Mapping[str, NDArray[np.float32]] | Imatrix | Path | str

# What calibration leaves out unless it is asked: no news for the user.
_LEFT_OUT = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class Importance:
    """Mean square activation of the columns of some tensors, checked against their shapes.

    metadata: what llama-quantize notes about it in the file it writes.
    """

    values: Mapping[str, Array] = field(default_factory=dict)  # [cols], of experts [n_mat, cols]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def missing(self, names: list[str]) -> list[str]:
        """A warning when some of these tensors are not covered, though others are."""
        lost = [name for name in names if name not in self.values and name not in _LEFT_OUT]
        if not self.values or not lost:
            return []
        shown = ", ".join(lost[:5]) + ", ..." * (len(lost) > 5)
        return [f"importance: no entry for {shown}: all columns count the same there"]


def resolve(given: Given | None, shapes: Mapping[str, tuple[int, ...]], model: Path) -> Importance:
    """Importance for tensors of these shapes (row length last), out of what a user gave.

    Raises RequestError for values that do not fit the tensors of `model`, FormatError and
    ResourceError for a file.
    """
    if given is None:
        return Importance()
    if isinstance(given, Path | str):
        path = Path(given)
        found = imatrix.read(path)
        return Importance(
            _fitting(found.importance(), shapes, model, FormatError, f"{path}: "),
            _keys(found, path),
        )
    if isinstance(given, Imatrix):
        return Importance(_fitting(given.importance(), shapes, model, RequestError))
    return Importance(_fitting(given, shapes, model, RequestError))


def _keys(found: Imatrix, path: Path) -> dict[str, Any]:
    texts = {"quantize.imatrix.dataset": found.datasets[0]} if found.datasets else {}
    return {
        "quantize.imatrix.file": path.name,
        **texts,
        "quantize.imatrix.entries_count": np.uint32(len(found.sums)),
        "quantize.imatrix.chunks_count": np.uint32(found.chunk_count),
    }


def _fitting(
    given: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    model: Path,
    kind: type[FormatError | RequestError],
    where: str = "",
) -> dict[str, Array]:
    """The values as the tensors need them. Raises an error of `kind`, which begins with `where`."""
    unknown = sorted(str(name) for name in given if name not in shapes)
    if unknown:
        names = ", ".join(printable(name) for name in unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise kind(
            f"{where}importance: {model} has no tensor {names}: expected names as "
            "`edgeq inspect --tensors` shows them: is it of another model?"
        )
    return {
        name: _shaped(np.asarray(values), shapes[name], kind, f"{where}importance of {name}")
        for name, values in given.items()
    }


def _shaped(
    values: NDArray[Any],
    shape: tuple[int, ...],
    kind: type[FormatError | RequestError],
    what: str,
) -> Array:
    experts = shape[-3:-2]
    if experts and values.size == experts[0] * shape[-1]:  # old files do not tell experts apart
        values = values.reshape(*experts, shape[-1])
    fits = values.shape in (shape[-1:], (*experts, shape[-1]))
    if not fits or not np.isfinite(values).all() or values.min() < 0:
        expected = f"{shape[-1]} finite numbers >= 0, one for each column"
        raise kind(f"{what}: shape {values.shape}: expected {expected}")
    return values.astype(np.float32)
