"""A model's tensors, bound to the shapes that its properties demand: read-only views on the mapped
file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.errors import ModelError
from edgeq.models.arch import Arch

if TYPE_CHECKING:
    from edgeq.gguf import Gguf, TensorInfo

__all__ = ["Layer", "Matrix", "Weights", "bind", "sketch"]

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix in its file format."""

    name: str
    format: BlockFormat
    rows: int
    cols: int
    data: NDArray[np.uint8]  # [rows, row_bytes], mapped
    bias: Vector | None = None

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    @property
    def row_bytes(self) -> int:
        return blocks.row_bytes(self.format, self.cols)


@dataclass(frozen=True)
class Layer:
    """One transformer block; names as in GGUF."""

    attn_norm: Vector
    attn_q: Matrix
    attn_k: Matrix
    attn_v: Matrix
    attn_output: Matrix
    ffn_norm: Vector
    ffn_gate: Matrix
    ffn_up: Matrix
    ffn_down: Matrix
    attn_q_norm: Vector | None = None
    attn_k_norm: Vector | None = None


@dataclass(frozen=True)
class Weights:
    """All tensors of a model."""

    token_embd: Matrix
    layers: tuple[Layer, ...]
    output_norm: Vector
    output: Matrix  # the embedding matrix where the file has none
    rope_freqs: Vector | None
    unused: tuple[str, ...]  # tensors of the file that no part of the model asks for

    @property
    def matrices(self) -> list[Matrix]:
        """Every matrix that is multiplied with."""
        parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        return [getattr(layer, part) for layer in self.layers for part in parts] + [self.output]


class _Binder:
    def __init__(self, gguf: "Gguf") -> None:
        self.gguf = gguf
        self.missing: list[str] = []
        self.used: set[str] = set()

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        weight = f"{name}.weight"
        info = self._info(weight)
        if info is None:
            self.missing.append(weight)
            return Matrix(weight, blocks.get("F32"), 0, 0, np.empty((0, 0), np.uint8))
        self._check(weight, info.shape, (rows, cols))
        data = self.gguf.tensor(weight)
        return Matrix(
            weight, info.format, rows, cols, data, self.vector(f"{name}.bias", rows, optional=True)
        )

    def vector(self, name: str, length: int, *, optional: bool = False) -> Vector | None:
        info = self._info(name)
        if info is None:
            if not optional:
                self.missing.append(name)
            return None
        self._check(name, info.shape, (length,))
        values = np.ascontiguousarray(blocks.decode(self.gguf.tensor(name), info.format))
        if not np.isfinite(values).all():
            raise ModelError(f"{self.gguf.path}: tensor {name} holds NaN or Inf: convert it again")
        return values

    def _info(self, name: str) -> "TensorInfo | None":
        self.used.add(name)
        return self.gguf.tensors.get(name)

    def needed(self, name: str, length: int) -> Vector:
        found = self.vector(name, length)
        return np.empty(0, np.float32) if found is None else found

    def _check(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise ModelError(
                f"{self.gguf.path}: tensor {name} has shape {list(shape)}: "
                f"expected {list(expected)} from the metadata"
            )


def bind(gguf: "Gguf", arch: Arch) -> Weights:
    """Tensors of `gguf` for a model of properties `arch`.

    Raises ModelError naming what is missing (up to ten tensors) or has another shape than the
    metadata demands.
    """
    b, d = _Binder(gguf), arch.embedding_length
    embedding = b.matrix("token_embd", arch.vocab_size, d)
    layers = tuple(_layer(b, arch, f"blk.{i}") for i in range(arch.block_count))
    norm = b.needed("output_norm.weight", d)
    tied = "output.weight" not in gguf.tensors
    output = embedding if tied else b.matrix("output", arch.vocab_size, d)
    if b.missing:
        shown = ", ".join(b.missing[:10]) + (" ..." if len(b.missing) > 10 else "")
        raise ModelError(
            f"{gguf.path}: {len(b.missing)} tensors are missing: {shown}: is the file complete?"
        )
    rope = b.vector("rope_freqs.weight", arch.rope.dim // 2, optional=True)
    if rope is not None and not (rope > 0).all():
        raise ModelError(f"{gguf.path}: tensor rope_freqs.weight: expected values above 0")
    return Weights(embedding, layers, norm, output, rope, _unused(b))


class _Sketcher:
    """A binder without a file: formats by name, no data."""

    def __init__(self, formats: Mapping[str, BlockFormat]) -> None:
        self._formats = formats

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        fmt, data = self._formats[f"{name}.weight"], np.empty((0, 0), np.uint8)
        return Matrix(name, fmt, rows, cols, data)

    def needed(self, name: str, length: int) -> Vector:
        return np.empty(0, np.float32)


def sketch(arch: Arch, formats: Mapping[str, BlockFormat]) -> Weights:
    """Weights of a model that is not there, without data; formats: of matrices by their names."""
    b, d = _Sketcher(formats), arch.embedding_length
    embedding = b.matrix("token_embd", arch.vocab_size, d)
    tied = "output.weight" not in formats
    output = embedding if tied else b.matrix("output", arch.vocab_size, d)
    layers = tuple(_layer(b, arch, f"blk.{i}") for i in range(arch.block_count))
    return Weights(embedding, layers, np.empty(0, np.float32), output, None, ())


def _unused(b: _Binder) -> tuple[str, ...]:
    """Names that nothing asked for. One that would change the result is an error."""
    names = [name for name in b.gguf.tensors if name not in b.used]
    for name in names:
        if name.endswith(".bias") or "norm" in name or name.startswith("blk."):
            raise ModelError(
                f"{b.gguf.path}: tensor {name} has no place in this architecture: the model would "
                "compute something else than it was trained to"
            )
    return tuple(names)


def _layer(b: "_Binder | _Sketcher", arch: Arch, at: str) -> Layer:
    d, ff = arch.embedding_length, arch.feed_forward_length
    q, kv = arch.head_count * arch.head_dim, arch.head_count_kv * arch.head_dim
    return Layer(
        attn_norm=b.needed(f"{at}.attn_norm.weight", d),
        attn_q=b.matrix(f"{at}.attn_q", q, d),
        attn_k=b.matrix(f"{at}.attn_k", kv, d),
        attn_v=b.matrix(f"{at}.attn_v", kv, d),
        attn_output=b.matrix(f"{at}.attn_output", d, q),
        ffn_norm=b.needed(f"{at}.ffn_norm.weight", d),
        ffn_gate=b.matrix(f"{at}.ffn_gate", ff, d),
        ffn_up=b.matrix(f"{at}.ffn_up", ff, d),
        ffn_down=b.matrix(f"{at}.ffn_down", d, ff),
        attn_q_norm=b.needed(f"{at}.attn_q_norm.weight", arch.head_dim) if arch.qk_norm else None,
        attn_k_norm=b.needed(f"{at}.attn_k_norm.weight", arch.head_dim) if arch.qk_norm else None,
    )
