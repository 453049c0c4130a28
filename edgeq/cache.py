"""The KV cache: keys and values of every position seen, allocated once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RequestError, ResourceError
from edgeq.kernels.layout import KV_BITS, TILE_KEYS, kv_blocks, kv_bytes
from edgeq.kernels.program import aligned
from edgeq.models.arch import Arch

__all__ = [
    "KV_TYPES",
    "KvCache",
    "allocate",
    "bytes_per_position",
    "common",
    "kv_types",
    "rounded",
    "turn",
]

KV_TYPES = tuple(KV_BITS)
PAGE = 4096  # bytes: no system has smaller pages


@dataclass(frozen=True)
class KvCache:
    """Keys and values of all layers; how a layer lies in memory: `kernels.layout.kv_wide`."""

    context: int  # positions, a multiple of TILE_KEYS
    types: tuple[str, str]  # of keys, of values
    turns: tuple[int, int]  # sizes of the blocks that are rotated, 1 = none
    memory: tuple[NDArray[np.uint8], NDArray[np.uint8]]  # [layers, bytes of a layer] each
    scales: tuple[int, int]  # where in a layer its scales start

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.memory)

    def touch(self) -> None:
        """Make sure that every page is there: a system hands one out when it is first written."""
        for part in self.memory:
            part.reshape(-1)[::PAGE] = 0

    def addresses(self, layer: int) -> dict[str, int]:
        """Of the four arrays of a layer, by the names of the kernels' arguments."""
        k, v = (int(part[layer].ctypes.data) for part in self.memory)
        k_scales, v_scales = k + self.scales[0], v + self.scales[1]
        return {"k_cache": k, "v_cache": v, "k_scales": k_scales, "v_scales": v_scales}


def kv_types(kv: str | Sequence[str]) -> tuple[str, str]:
    """Types of keys and of values, from one for both or a pair.

    Raises RequestError for anything else.

    >>> kv_types("q8_0"), kv_types(("q8_0", "f16"))
    (('q8_0', 'q8_0'), ('q8_0', 'f16'))
    """
    pair = (kv, kv) if isinstance(kv, str) else tuple(kv)
    for kind in pair:
        if kind not in KV_TYPES:
            raise RequestError(f"KV cache type {kind!r}: expected one of {', '.join(KV_TYPES)}")
    if len(pair) != 2:
        raise RequestError(
            f"KV cache types {pair}: expected one, or one for keys and one for values"
        )
    return pair[0], pair[1]


def turn(kind: str, head_dim: int) -> int:
    """Size of the blocks of a head that are rotated: for types with a scale per block, which a few
    large values would spoil, the largest power of two that divides it; else 1, which is none.

    >>> turn("q4_0", 64), turn("q4_0", 80), turn("f16", 64)
    (64, 16, 1)
    """
    return head_dim & -head_dim if kv_blocks(kind) else 1


def bytes_per_position(arch: Arch, types: tuple[str, str]) -> int:
    """Cache bytes that one position takes."""
    heads = arch.block_count * arch.head_count_kv
    return heads * sum(sum(kv_bytes(kind, arch.head_dim)) for kind in types)


def allocate(
    arch: Arch, context: int, types: tuple[str, str] = ("f16", "f16"), *, available: int
) -> KvCache:
    """Room for `context` positions, whose pages are there after `touch`. available: bytes of memory
    that may be used.

    Raises ResourceError when it does not fit (with the largest context that does).
    """
    context = rounded(context)
    each = bytes_per_position(arch, types)
    if context * each > available:
        raise _too_large(context, each, available)
    rows = arch.head_count_kv * context
    sizes = [[rows * part for part in kv_bytes(kind, arch.head_dim)] for kind in types]
    try:
        k, v = (aligned(arch.block_count * sum(size)) for size in sizes)
    except MemoryError:
        raise _too_large(context, each, available) from None
    return KvCache(
        context,
        types,
        (turn(types[0], arch.head_dim), turn(types[1], arch.head_dim)),
        (k.reshape(arch.block_count, -1), v.reshape(arch.block_count, -1)),
        (sizes[0][0], sizes[1][0]),
    )


def _too_large(context: int, each: int, available: int) -> ResourceError:
    fits = max(available // each // TILE_KEYS * TILE_KEYS, 0)
    return ResourceError(
        f"KV cache for context {context} needs {context * each >> 20} MiB, {available >> 20} MiB "
        f"of memory are free: use -c {fits} or less"
    )


def rounded(context: int) -> int:
    """Positions for which there is room in a cache for `context` of them.

    >>> rounded(33)
    64
    """
    return (context + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning: what a cache that holds `a` has of `b`.

    >>> common([1, 5, 7], [1, 5, 8, 9])
    2
    """
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
