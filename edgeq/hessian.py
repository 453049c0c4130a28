"""Hessians of a layer's output error: the mean of x xᵀ over the tokens of a calibration text.

GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323) needs one for the input x [n_in] of every
weight. Weights that read the same input share one. A file is GGUF, general.type = "hessian", with a
tensor NAME.hessian F32 [n_in, n_in] for the first weight of each group; hessian.weights lists all
weights, hessian.stored at the same place the one whose Hessian is theirs, hessian.tokens the number
of tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.closing import Closing
from edgeq.errors import FormatError, RequestError
from edgeq.gguf import Gguf, GgufWriter, TensorSpec, open_gguf

__all__ = ["Hessians", "read", "specs", "tensor_name", "write"]

Array = NDArray[np.float32]

_SUFFIX, _TYPE = ".hessian", "hessian"


class Hessians(Closing):
    """An open file; made by `read`. Use it in a `with` statement, or close it."""

    def __init__(self, gguf: Gguf, stored: Mapping[str, str]) -> None:
        self.path = gguf.path
        self.weights: Mapping[str, str] = stored  # weight -> weight whose Hessian it shares
        self.tokens: int = gguf.get("hessian.tokens", int)
        self._gguf = gguf

    def close(self) -> None:
        """Let go of the file."""
        self._gguf.close()

    def size(self, stored: str) -> int:
        """Inputs of a stored Hessian."""
        return self._gguf.tensors[tensor_name(stored)].shape[0]

    def get(self, weight: str) -> Array | None:
        """Mean of x xᵀ for the input of a weight, a copy: float32 [n_in, n_in]; None if unknown.

        Raises FormatError when it holds NaN, Inf, or a diagonal below 0.
        """
        if weight not in self.weights:
            return None
        name = tensor_name(self.weights[weight])
        found = self._gguf.tensor(name).view("<f4").astype(np.float32)
        # A sum is finite only if all of its terms are: no second array of this size.
        if not np.isfinite(found.sum(dtype=np.float64)) or not (found.diagonal() >= 0).all():
            raise FormatError(f"{self.path}: tensor {name}: expected finite means of x xᵀ")
        return found


def tensor_name(weight: str) -> str:
    """Name of the tensor that a file keeps under the first weight of a group."""
    return weight + _SUFFIX


def read(path: Path | str) -> Hessians:
    """Open a file of Hessians; matrices are read when asked for.

    Raises FormatError for another kind of file, ResourceError when it cannot be opened.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tiny-hessian.gguf"
    >>> group = ("blk.0.attn_q.weight", "blk.0.attn_k.weight")
    >>> write(path, {group: np.eye(2, dtype=np.float32)}, tokens=100)
    >>> with read(path) as hessians:
    ...     hessians.get("blk.0.attn_k.weight").tolist(), hessians.get("output.weight")
    ([[1.0, 0.0], [0.0, 1.0]], None)
    """
    gguf = open_gguf(path)
    try:
        return Hessians(gguf, _stored(gguf))
    except BaseException:
        gguf.close()
        raise


def _stored(gguf: Gguf) -> dict[str, str]:
    kind = gguf.get("general.type", str, "absent")
    if kind != _TYPE:
        advice = "give a file made by `edgeq calibrate --hessian`"
        raise FormatError(f"{gguf.path}: general.type = {kind}: expected {_TYPE}: {advice}")
    weights, stored = gguf.get("hessian.weights", "strs"), gguf.get("hessian.stored", "strs")
    if len(weights) != len(stored):
        counts = f"{len(weights)} names in hessian.weights, {len(stored)} in hessian.stored"
        raise FormatError(f"{gguf.path}: {counts}: expected as many")
    for name in dict.fromkeys(stored):
        info = gguf.tensors.get(tensor_name(name))
        square = info is not None and len(info.shape) == 2 and info.shape[0] == info.shape[1]
        if info is None or not square or info.format.name != "F32":
            raise FormatError(f"{gguf.path}: {tensor_name(name)}: expected a square F32 tensor")
    return dict(zip(weights, stored, strict=True))


def specs(
    groups: Iterable[tuple[Sequence[str], int]], tokens: int
) -> tuple[dict[str, Any], list[TensorSpec]]:
    """Metadata and tensors of a file, for (weights that share an input, its width) pairs."""
    groups = list(groups)
    f32 = blocks.get("F32")
    metadata = {
        "general.type": _TYPE,
        "hessian.weights": [name for names, _ in groups for name in names],
        "hessian.stored": [names[0] for names, _ in groups for _ in names],
        "hessian.tokens": np.uint64(tokens),
    }
    return metadata, [TensorSpec(tensor_name(names[0]), (n, n), f32) for names, n in groups]


def write(
    path: Path | str,
    matrices: Mapping[tuple[str, ...], Array],
    *,
    tokens: int,
    force: bool = False,
) -> None:
    """Write means of x xᵀ [n_in, n_in], each for the weights that share this input.

    Raises RequestError for a matrix that is not square, ResourceError when the file exists (unless
    `force`) or the disk is full.
    """
    for names, h in matrices.items():
        if h.ndim != 2 or h.shape[0] != h.shape[1]:
            raise RequestError(f"Hessian of {names[0]}: shape {h.shape}: expected [n_in, n_in]")
    metadata, tensors = specs([(names, len(h)) for names, h in matrices.items()], tokens)
    with GgufWriter(path, metadata, tensors, force=force) as writer:
        for names, h in matrices.items():
            writer.write(tensor_name(names[0]), h.astype(np.float32))
