"""The KV cache in NumPy: values as a type keeps them, packed as kernels read them, and unpacked."""

import naive
import numpy as np

from edgeq.kernels import layout

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}
TILE = layout.TILE_KEYS
PAIRS = [("f16", "f16"), ("q8_0", "q4_0"), ("q4_0", "q8_0"), ("bf16", "f32"), ("f32", "bf16")]


def context(positions: int) -> int:
    return -(-positions // TILE) * TILE


def arrays(
    kind: str, heads: int, positions: int, dim: int, *, keys: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(codes or values, scales) of an empty cache whose every byte is 0xA5."""
    wide, tiles = layout.kv_wide(kind, dim), positions // TILE
    if layout.kv_blocks(kind):
        per = wide * layout.KV_BITS[kind] // 8
        codes = np.full((heads, positions * per), 0xA5, np.uint8)
        return codes, np.full((heads, tiles, wide // 32, TILE), 0xA5A5, np.uint16)
    shape = (heads, tiles, wide, TILE) if keys else (heads, positions, wide)
    size = layout.KV_BITS[kind] // 8
    filled = np.full((*shape, size), 0xA5, np.uint8).view(DTYPES[kind])[..., 0]
    return filled, np.zeros(0, np.uint16)


def packed(kind: str, x: np.ndarray, offset: int, *, keys: bool) -> tuple[np.ndarray, np.ndarray]:
    """(codes or values, scales) of f32 x [heads, positions, dim]."""
    heads, positions, dim = x.shape
    wide, tiles = layout.kv_wide(kind, dim), positions // TILE
    full = np.zeros((heads, positions, wide), np.float32)
    full[..., :dim] = x
    if not layout.kv_blocks(kind):
        bits = (naive.bf16_bits(full) if kind == "bf16" else full).astype(DTYPES[kind])
        tiled = bits.reshape(heads, tiles, TILE, wide).swapaxes(2, 3)
        return np.ascontiguousarray(tiled if keys else bits), np.zeros(0, np.uint16)
    found = [naive.kv_block(kind, block) for block in full.reshape(-1, 32)]
    q = np.array([codes for codes, _ in found]).reshape(heads, tiles, TILE, wide // 32, 32)
    d = np.array([d for _, d in found], np.float16).reshape(heads, tiles, TILE, wide // 32)
    scales = np.ascontiguousarray(d.swapaxes(2, 3))
    if keys:
        words = q.reshape(heads, tiles, TILE, wide // 4, 4).swapaxes(2, 3)
        if kind == "q8_0":
            return np.ascontiguousarray((words + offset).astype(np.uint8)), scales
        return (words[:, :, ::2] | words[:, :, 1::2] << 4).astype(np.uint8), scales
    if kind == "q8_0":
        return q.astype(np.int8).view(np.uint8), scales
    return (q[..., :16] | q[..., 16:] << 4).astype(np.uint8), scales


def unpacked(
    kind: str, stored: np.ndarray, scales: np.ndarray, shape: tuple[int, ...], offset: int,
    *, keys: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(float64 values, scales of their blocks), each [heads, positions, wide]."""
    heads, positions, dim = shape
    wide, tiles = layout.kv_wide(kind, dim), positions // TILE
    if not layout.kv_blocks(kind):
        if kind == "bf16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        x = stored.astype(np.float64)
        x = x.swapaxes(2, 3).reshape(heads, positions, wide) if keys else x
        return x, np.zeros_like(x)
    b = stored.reshape(heads, -1)
    if keys:
        units = wide // 4 if kind == "q8_0" else wide // 8
        b = b.reshape(heads, tiles, units, TILE, 4)
        if kind == "q4_0":
            b = np.stack([b & 15, b >> 4], 3).reshape(heads, tiles, wide // 4, TILE, 4)
        q = b.swapaxes(2, 3).reshape(heads, positions, wide).astype(int)
        q = q - (8 if kind == "q4_0" else offset)
        q = (q + 128) % 256 - 128
    elif kind == "q8_0":
        q = b.view(np.int8).reshape(heads, positions, wide).astype(int)
    else:
        halves = b.reshape(heads, positions, wide // 32, 16)
        q = np.concatenate([halves & 15, halves >> 4], -1).reshape(heads, positions, wide) - 8.0
    d = scales.view(np.float16).swapaxes(2, 3).reshape(heads, positions, wide // 32)
    d = np.repeat(d.astype(np.float64), 32, axis=2)
    return q * d, d


def kept(kind: str, x: np.ndarray) -> np.ndarray:
    """float64 of the same shape: what a cache of a type keeps of f32 x [..., dim]."""
    flat = x.reshape(1, -1, x.shape[-1])
    full = np.zeros((1, context(flat.shape[1]), x.shape[-1]), np.float32)
    full[:, : flat.shape[1]] = flat
    values, _ = unpacked(kind, *packed(kind, full, 0, keys=False), full.shape, 0, keys=False)
    return values[0, : flat.shape[1], : x.shape[-1]].reshape(x.shape)


def check_stored(
    kind: str,
    rows: np.ndarray,
    cache: np.ndarray,
    scales: np.ndarray,
    position: int,
    keys: bool,
    offset: int,
) -> None:
    """Each value is within half a step of the type; nothing else in the cache is touched."""
    tokens, heads, dim = rows.shape
    positions = cache.size // heads // layout.kv_wide(kind, dim)
    positions *= 8 // layout.KV_BITS[kind] if layout.kv_blocks(kind) else 1
    shape = heads, positions, dim
    got, d = unpacked(kind, cache, scales, shape, offset, keys=keys)
    new = slice(position, position + tokens)
    error = np.abs(got[:, new, :dim] - rows.swapaxes(0, 1))
    steps = {"f32": 2**-22, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-20, "q4_0": 2**-20}
    # The largest value of q4_0 on the side where codes end at 7 may be a whole step away.
    whole = {"q8_0": 0.501, "q4_0": 1.001}.get(kind, 0) * np.abs(d[:, new, :dim])
    assert (error <= steps[kind] * np.abs(rows.swapaxes(0, 1)) + whole + 4e-6).all()
    if layout.kv_blocks(kind):  # the scale is no larger than the block needs
        full = np.zeros((heads, tokens, layout.kv_wide(kind, dim)))
        full[..., :dim] = np.abs(rows.swapaxes(0, 1))
        peak = full.reshape(heads, tokens, -1, 32).max(-1).repeat(32, -1)
        assert (np.abs(d[:, new]) <= peak / (127 if kind == "q8_0" else 8) * 1.001 + 1e-7).all()
        np.testing.assert_array_equal(got[:, new, dim:], 0)
    fresh, fresh_scales = arrays(kind, heads, positions, dim, keys=keys)
    before, _ = unpacked(kind, fresh, fresh_scales, shape, offset, keys=keys)
    np.testing.assert_array_equal(np.delete(got, new, 1), np.delete(before, new, 1))
    if not layout.kv_blocks(kind):
        np.testing.assert_array_equal(got[:, new, dim:], before[:, new, dim:])


def asked(q: np.ndarray) -> np.ndarray:
    """Queries as keys of codes see them: int8 with a scale per 32."""
    wide = layout.kv_wide("q8_0", q.shape[-1])
    full = np.zeros((*q.shape[:-1], wide), np.float32)
    full[..., : q.shape[-1]] = q
    found = [naive.quantize32(block) for block in full.reshape(-1, 32)]
    values = np.array([codes * np.float64(d) for codes, d in found])
    return values.reshape(full.shape)[..., : q.shape[-1]]
