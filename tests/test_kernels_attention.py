"""Rotary embedding into the cache, and attention over it."""

import kernelcases as cases
import kernelkit as kit
import kvkit
import naive
import numpy as np
import pytest

from edgeq.kernels import isa as isas
from edgeq.kernels import keys, layout, values
from edgeq.kernels.llvm import Emit, Value

each_isa = pytest.mark.parametrize("isa", kit.ISAS)
by_types = pytest.mark.parametrize("types", kvkit.PAIRS, ids=".".join)
by_query = pytest.mark.parametrize(
    ("isa", "types", "queries"),
    [(i, types, n) for i in kit.ISAS for types in kvkit.PAIRS for n in kit.queries_of(i, types[0])],
)


# -- rope ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("halves", [False, True], ids=["pairs", "halves"])
@each_isa
def test_rope(isa: str, halves: bool, norm: bool) -> None:
    """Neighbours or halves; all of a head or part of it; heads that are no whole vectors."""
    for dim, turned in ((64, 64), (64, 32), (20, 20), (80, 20), (2, 2)):
        for tokens, position, threads in ((1, 0, 1), (1, 37, 3), (5, 30, 2), (20, 3, 5)):
            shape = {"dim": dim, "turned": turned, "halves": halves, "norm": norm}
            cases.rope(isa, tokens=tokens, position=position, threads=threads, **shape)


@by_types
@each_isa
def test_rope_into_every_type(isa: str, types: tuple[str, str]) -> None:
    """Heads of one, several and part of a block of 32, rotated in blocks of 2 to 256."""
    for dim in (64, 20, 2, 40, 80, 96, 128, 256):
        shape = {"dim": dim, "turned": dim, "halves": True, "norm": True, "types": types}
        cases.rope(isa, tokens=3, position=30, threads=2, **shape)


@each_isa
def test_rope_of_single_heads(isa: str) -> None:
    shape = {"dim": 32, "turned": 16, "halves": True, "threads": 2}
    cases.rope(isa, tokens=3, position=2, heads=1, kv_heads=1, **shape)
    cases.rope(isa, tokens=3, position=2, heads=6, kv_heads=6, **shape)


# -- attention -------------------------------------------------------------------------------------
@by_query
def test_attend(isa: str, types: tuple[str, str], queries: int) -> None:
    """Query tiles that cut a token's heads apart or join tokens; contexts of part of a vector, of
    exactly one step of 256 keys, and of several.
    """
    for share, tokens, position, dim, threads in (
        (1, 1, 0, 64, 1),
        (2, 1, 254, 64, 2),
        (3, 1, 255, 20, 1),
        (4, 1, 256, 32, 3),
        (1, 20, 0, 32, 5),
        (2, 9, 250, 16, 2),
        (4, 3, 510, 80, 1),
        (3, 17, 300, 8, 3),
        (2, 5, 70, 96, 2),
        (4, 2, 33, 256, 1),
    ):
        shape = {"dim": dim, "heads": 2 * share, "kv_heads": 2, "threads": threads, "types": types}
        for span in (1, 2, 99):
            cases.attend(isa, queries, tokens=tokens, position=position, span=span, **shape)


@each_isa
def test_attend_to_one_of_many(isa: str) -> None:
    """Scores far apart: the softmax of a later step replaces what an earlier one summed."""
    for queries in kit.QUERIES:
        for span in (1, 9):
            shape = {"dim": 64, "heads": 4, "kv_heads": 1, "scale": 60.0, "span": span}
            cases.attend(isa, queries, tokens=3, position=590, **shape)


@by_types
@each_isa
def test_bits_depend_neither_on_threads_nor_on_company(isa: str, types: tuple[str, str]) -> None:
    """Ranges of keys are at fixed places: also of a token alone and of the same among others, where
    one more range begins.
    """
    queries = kit.queries_of(isa, types[0])[0]
    shape = {"dim": 64, "heads": 4, "kv_heads": 2, "span": 1, "types": types}
    alone = [
        cases.attend(isa, queries, tokens=1, position=253 + t, **shape).copy() for t in range(7)
    ]
    for threads in (1, 2, 5):
        more = {"threads": threads, **shape}
        together = cases.attend(isa, queries, tokens=7, position=253, **more)
        np.testing.assert_array_equal(together, np.concatenate(alone))


# -- emitted code, on every instruction set that can be run or emulated ----------------------------
@pytest.mark.parametrize("kind", layout.KV_BITS)
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_stored_and_read(isa: str, kind: str, rng: np.random.Generator) -> None:
    """A tile of keys and of values: bit for bit as defined, then scores and weighted sums."""
    queries, dim, tile = 4, 80, layout.TILE_KEYS
    module, wide = isas.modules()[isa], layout.kv_wide(kind, dim)
    x = (3 * rng.standard_normal((1, tile, dim))).astype(np.float32)
    q = rng.standard_normal((queries, wide)).astype(np.float32)
    q[:, dim:] = 0
    k_cache, k_scales = (a.copy() for a in kvkit.packed(kind, 0 * x, module.OFFSET, keys=True))
    v_cache, v_scales = (a.copy() for a in kvkit.packed(kind, 0 * x, module.OFFSET, keys=False))
    asked = np.zeros(queries * wide * 4, np.uint8)
    s = np.zeros((queries, layout.KEYS), np.float32)
    o, folded = np.zeros((queries, wide), np.float32), np.zeros_like(s)
    code = kit.native(_tile_code(kind, queries, tile, wide), "i" * 12, isa)
    code(x, dim, wide, k_cache, k_scales, v_cache, v_scales, q, asked, s, folded, o)
    for cache, scales, of_keys in ((k_cache, k_scales, True), (v_cache, v_scales, False)):
        expected, expected_scales = kvkit.packed(kind, x, module.OFFSET, keys=of_keys)
        np.testing.assert_array_equal(cache.reshape(-1), expected.reshape(-1))
        np.testing.assert_array_equal(scales.view(np.uint16), expected_scales.view(np.uint16))
    kept = kvkit.kept(kind, x)[0]
    seen = kvkit.asked(q) if layout.kv_blocks(kind) else q
    scores = seen[:, :dim].astype(np.float64) @ kept.T
    np.testing.assert_allclose(s[:, :tile], scores, rtol=1e-5, atol=2e-4)
    sums = s[:, :tile].astype(np.float64) @ kept
    np.testing.assert_allclose(o[:, :dim], sums, rtol=1e-5, atol=1e-2)


def _tile_code(kind: str, queries: int, tile: int, wide: int):
    """Stores x [tile][dim] as keys and as values, scores q against it, weighs it by the scores."""

    def emit(e: Emit, *args: Value) -> None:
        x, dim, wide_, k, kd, v, vd, q, asked, s, folded, o = args
        x, k, kd, v, vd, q, asked, s, folded, o = (
            e.pointer(a) for a in (x, k, kd, v, vd, q, asked, s, folded, o)
        )
        unit = 4 if layout.kv_blocks(kind) else layout.KV_BITS[kind] // 8
        for i in range(tile):
            row = e.at(x, e.b.mul(dim, e.i64(4 * i)))
            keys.store_key(e, kind, row, dim, e.at(k, unit * i), e.at(kd, 2 * i))
            place = e.at(v, i * wide * layout.KV_BITS[kind] // 8)
            values.store_value(e, kind, row, dim, place, e.at(vd, 2 * i))
        if layout.kv_blocks(kind):
            scales = e.at(asked, queries * wide)
            starts = e.at(scales, queries * wide // 8)
            for i in range(queries):
                row, at = e.at(q, 4 * wide * i), i * wide // 8
                codes = e.at(asked, wide * i)
                keys.store_query(e, kind, row, wide_, codes, e.at(scales, at), e.at(starts, at))
        else:
            keys.turn_queries(e, queries, q, wide_, asked)
        keys.score_keys(e, kind, queries, k, kd, asked, wide_, dim, s)
        row = e.b.mul(wide_, e.i64(4))
        values.weigh_values(e, kind, queries, v, vd, wide_, s, folded, e.i64(tile), o, row)

    return emit


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
@each_isa
def test_stored_extremes(isa: str, kind: str) -> None:
    """Zeros, values below the smallest scale, large ones, infinities and NaNs: none is hidden."""
    module = isas.modules()[isa]
    rows = np.zeros((32, 32), np.float32)
    rows[1], rows[2, 5], rows[3] = 1e-9, 3e-6, np.linspace(-6e4, 6e4, 32)
    rows[4, 7], rows[5, 9], rows[6, 0], rows[6, 31] = np.nan, np.inf, -5, 5
    cache, scales = kvkit.arrays(kind, 1, 32, 32, keys=False)

    def emit(e: Emit, x: Value, v: Value, d: Value) -> None:
        x, v, d = (e.pointer(a) for a in (x, v, d))
        for i in range(7):
            place = e.at(v, i * 32 * layout.KV_BITS[kind] // 8)
            values.store_value(e, kind, e.at(x, 128 * i), e.i64(32), place, e.at(d, 2 * i))

    kit.native(emit, "iii", isa)(rows, cache, scales)
    with np.errstate(invalid="ignore"):
        got, _ = kvkit.unpacked(kind, cache, scales, (1, 32, 32), module.OFFSET, keys=False)
    got = got[0]
    assert (np.abs(got[:2]) <= 1e-8).all()
    for i in (2, 3, 6):
        assert np.abs(got[i] - rows[i]).max() <= max(np.abs(rows[i]).max() / 7.5, 4e-6)
    assert np.isnan(got[4, 7])
    assert not np.isfinite(got[5, 9])


# -- rotation --------------------------------------------------------------------------------------
def test_the_rotation_is_its_own_inverse_and_keeps_products(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 96))
    turned = naive.hadamard(a, 32)
    np.testing.assert_allclose(naive.hadamard(turned, 32), a, atol=1e-12)
    assert turned @ naive.hadamard(b, 32) == pytest.approx(a @ b)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_rotation_spreads_outliers(kind: str, rng: np.random.Generator) -> None:
    """A few channels that are always large, as keys have them."""
    x = rng.standard_normal((64, 128)).astype(np.float32)
    x[:, [3, 40]] += 30

    def error(rows: np.ndarray, back: int) -> float:
        kept = naive.hadamard(kvkit.kept(kind, rows.astype(np.float32)), back)
        return float(np.linalg.norm(kept - x) / np.linalg.norm(x))

    assert error(naive.hadamard(x, 128), 128) < 0.7 * error(x, 1)
