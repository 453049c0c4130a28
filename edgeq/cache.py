"""The KV cache: keys and values of every position seen, f16, allocated once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RequestError, ResourceError
from edgeq.kernels.layout import TILE_KEYS, padded
from edgeq.models.arch import Arch

__all__ = ["KV_TYPES", "KvCache", "allocate", "bytes_per_position"]

KV_TYPES = ("f16",)


@dataclass(frozen=True)
class KvCache:
    """Per layer: K [kv_head][context/16][head_dim][16] and V [kv_head][context][padded head_dim],
    f16.
    """

    context: int  # positions, a multiple of TILE_KEYS
    k: NDArray[np.float16]  # [layers, values of a layer]
    v: NDArray[np.float16]

    @property
    def nbytes(self) -> int:
        return int(self.k.nbytes + self.v.nbytes)


def bytes_per_position(arch: Arch) -> int:
    """Cache bytes that one position takes."""
    per_head = 2 * (arch.head_dim + padded(arch.head_dim))
    return arch.block_count * arch.head_count_kv * per_head


def allocate(
    arch: Arch, context: int, kind: str = "f16", *, available: int | None = None
) -> KvCache:
    """Room for `context` positions. `available`: bytes of memory that may be used.

    Raises RequestError for an unknown type, ResourceError when it does not fit (with the largest
    context that does).
    """
    if kind not in KV_TYPES:
        raise RequestError(f"KV cache type {kind!r}: expected one of {', '.join(KV_TYPES)}")
    context = (context + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS
    need = context * bytes_per_position(arch)
    if available is not None and need > available:
        fits = max(available // bytes_per_position(arch) // TILE_KEYS * TILE_KEYS, 0)
        raise ResourceError(
            f"KV cache for context {context} needs {need >> 20} MiB, {available >> 20} MiB of "
            f"memory are free: use -c {fits} or less"
        )
    heads, layers = arch.head_count_kv * context, arch.block_count
    k = np.zeros((layers, heads * arch.head_dim), np.float16)
    return KvCache(context, k, np.zeros((layers, heads * padded(arch.head_dim)), np.float16))
