"""Importance matrices: how strongly each input channel of each weight is used, from calibration.

Files of llama-imatrix and for llama-quantize: GGUF, and the older .dat. In GGUF each weight has two
F32 tensors, NAME.in_sum2 [n_mat, n_in] and NAME.counts [n_mat, 1]; the metadata say on which text
and in chunks of how many tokens they were collected (llama.cpp, tools/imatrix). n_mat is 1, or the
number of experts in a tensor that holds a matrix for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.errors import FormatError, RequestError
from edgeq.gguf import Gguf, GgufWriter, TensorSpec, open_gguf
from edgeq.imatrix import dat

__all__ = ["Imatrix", "merge", "read", "write"]

Array = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_TYPE = "imatrix"


@dataclass(frozen=True, slots=True)
class Imatrix:
    """Sums over the tokens of a text, by GGUF name of the weight.

    >>> one = {"blk.0.attn_q.weight": np.array([[8, 2]], np.float32)}
    >>> Imatrix(one, {"blk.0.attn_q.weight": np.array([4], np.float32)}).importance()
    {'blk.0.attn_q.weight': array([2. , 0.5], dtype=float32)}
    """

    sums: Mapping[str, Array]  # [n_mat, n_in]: x² of each input channel, added over tokens
    counts: Mapping[str, Array]  # [n_mat]: how many tokens
    datasets: tuple[str, ...] = ()  # names of the texts
    chunk_count: int = 0
    chunk_size: int = 512  # tokens

    def importance(self) -> dict[str, Array]:
        """Mean of x² per input channel: float32 [n_in], of experts [n_mat, n_in].

        A matrix that saw no token is all ones: nothing is known about it.
        """
        return {name: _means(sums, self.counts[name]) for name, sums in self.sums.items()}


def _means(sums: Array, counts: Array) -> Array:
    seen = counts[:, None] > 0
    means = np.where(seen, sums / np.where(seen, counts[:, None], 1), 1).astype(np.float32)
    return means[0] if len(means) == 1 else means


def merge(parts: Sequence[Imatrix]) -> Imatrix:
    """What one run over all the texts would have found: sums and counts add.

    The chunk size is the first one's. Raises RequestError when there is nothing to merge, or a
    weight has another shape in another part: they are of different models.
    """
    if not parts:
        raise RequestError("merge: no importance matrix: expected at least one")
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.float64]] = {}
    for part in parts:
        for name, values in part.sums.items():
            if name in sums and sums[name].size != values.size:
                shapes = f"{list(sums[name].shape)} and {list(values.shape)}"
                raise RequestError(f"merge: {name} has shapes {shapes}: expected the same model's")
            # A .dat file does not tell experts apart: what it counted holds for each of them.
            n_mat = max(len(values), len(sums.get(name, values)))
            old = sums[name].reshape(n_mat, -1) if name in sums else 0
            sums[name] = old + values.astype(np.float64).reshape(n_mat, -1)
            counts[name] = np.zeros(n_mat) + counts.get(name, 0) + part.counts[name]
    size = parts[0].chunk_size
    return Imatrix(
        {name: values.astype(np.float32) for name, values in sums.items()},
        {name: values.astype(np.float32) for name, values in counts.items()},
        tuple(dict.fromkeys(name for part in parts for name in part.datasets)),
        sum(-(-part.chunk_count * part.chunk_size // max(size, 1)) for part in parts),
        size,
    )


def read(path: Path | str) -> Imatrix:
    """An importance matrix from a GGUF or .dat file.

    Raises FormatError, naming file and tensor, for another kind of file and for values that are no
    sums of squares; ResourceError when it cannot be opened.
    """
    path = Path(path)
    if dat.looks_like(path):
        found = Imatrix(*dat.read(path))
    else:
        with open_gguf(path) as gguf:
            found = _from_gguf(gguf)
    _check(found, path)
    return found


def write(imatrix: Imatrix, path: Path | str, *, force: bool = False) -> None:
    """Write the GGUF file that llama-imatrix would; the name appears when it is complete.

    Raises ResourceError when the file exists (unless `force`) or the disk is full.
    """
    f32 = blocks.get("F32")
    tensors: dict[str, Array] = {}
    for name in sorted(imatrix.sums):
        one = len(imatrix.sums[name]) == 1  # GGUF drops dimensions of 1 at the end
        tensors[name + _SUMS] = imatrix.sums[name][0] if one else imatrix.sums[name]
        counts = imatrix.counts[name]
        tensors[name + _COUNTS] = counts if one else counts.reshape(-1, 1)
    metadata = {
        "general.type": _TYPE,
        "imatrix.datasets": list(imatrix.datasets),
        "imatrix.chunk_count": np.uint32(imatrix.chunk_count),
        "imatrix.chunk_size": np.uint32(imatrix.chunk_size),
    }
    specs = [TensorSpec(name, values.shape, f32) for name, values in tensors.items()]
    with GgufWriter(path, metadata, specs, force=force) as writer:
        for name, values in tensors.items():
            writer.write(name, values.astype(np.float32))


def _from_gguf(gguf: Gguf) -> Imatrix:
    kind = gguf.get("general.type", str, "absent")
    if kind != _TYPE:
        advice = "give a file made by `edgeq calibrate` or llama-imatrix"
        raise FormatError(f"{gguf.path}: general.type = {kind}: expected {_TYPE}: {advice}")
    stored = {name[: -len(_SUMS)] for name in gguf.tensors if name.endswith(_SUMS)}
    counted = {name[: -len(_COUNTS)] for name in gguf.tensors if name.endswith(_COUNTS)}
    for name in sorted(stored ^ counted):
        raise FormatError(f"{gguf.path}: {name}: expected both {_SUMS} and {_COUNTS} of it")
    return Imatrix(
        {name: _matrix(gguf, name + _SUMS) for name in sorted(stored)},
        {name: _matrix(gguf, name + _COUNTS).reshape(-1) for name in sorted(stored)},
        tuple(gguf.get("imatrix.datasets", "strs")),
        _positive(gguf, "imatrix.chunk_count", 0),
        _positive(gguf, "imatrix.chunk_size", 1),
    )


def _matrix(gguf: Gguf, name: str) -> Array:
    """A copy [n_mat, n]: the file may go."""
    info = gguf.tensors[name]
    if info.format.name != "F32" or len(info.shape) > 2:
        what = f"{info.format.name} of shape {list(info.shape)}"
        raise FormatError(f"{gguf.path}: tensor {name}: {what}: expected F32 of one or two axes")
    return gguf.tensor(name).view("<f4").reshape(-1, info.shape[-1]).astype(np.float32)


def _positive(gguf: Gguf, key: str, least: int) -> int:
    value = gguf.get(key, int)
    if not least <= value < 1 << 32:
        raise FormatError(f"{gguf.path}: {key} = {value}: expected at least {least}")
    return value


def _check(found: Imatrix, path: Path) -> None:
    """Refuse what cannot be sums of squares over tokens. Raises FormatError."""
    if not found.sums:
        raise FormatError(f"{path}: no entries: expected the statistics of at least one weight")
    for name, sums in found.sums.items():
        counts = found.counts[name]
        if len(counts) != len(sums):
            sizes = f"{len(counts)} counts for {len(sums)} matrices"
            raise FormatError(f"{path}: {name}: {sizes}: expected one for each")
        _check_values(sums, f"{path}: {name}{_SUMS}")
        _check_values(counts, f"{path}: {name}{_COUNTS}")


def _check_values(values: NDArray[Any], what: str) -> None:
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        at, value = int(np.argmax(bad)), values[bad][0]
        raise FormatError(f"{what}: value {at} is {value}: expected finite numbers >= 0")
