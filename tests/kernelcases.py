"""One run of a compiled kernel against its slow twin, with shapes and the place of every array
given: the same cases run on ordinary memory and beside a forbidden page.

Each function raises AssertionError when the kernel's result is wrong.
"""

import ctypes

import kernelkit as kit
import kvkit
import naive
import numpy as np

from edgeq import blocks
from edgeq.cache import turn
from edgeq.kernels import isa as isas
from edgeq.kernels import layout
from edgeq.kernels.dot import sums_of
from edgeq.kernels.panel import Lanes, lanes_of
from edgeq.kernels.program import arguments

MARK = np.float32(-7.75)  # stands where a kernel must not write


def generator(*seed: object) -> np.random.Generator:
    return np.random.default_rng(list(repr(seed).encode()))


def state(tokens: int, position: int, place: kit.Place) -> np.ndarray:
    return place(np.array([tokens, position], np.int64))


def at(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def touch(offset: int, *, place: kit.Place) -> None:
    """Read one byte at an offset into four."""
    four = place(np.zeros(4, np.uint8))
    ctypes.string_at(at(four) + offset, 1)


# -- matrix products -------------------------------------------------------------------------------
def product(
    op: str,
    isa: str,
    name: str,
    *,
    rows: int,
    cols: int,
    tokens: int,
    threads: int = 1,
    bias: bool = False,
    add: bool = False,
    panels: int = 2,
    chunk: int = 16,
    place: kit.Place = kit.anywhere,
) -> None:
    """matvec or matmul: out (+)= w · x (+ bias), and nothing else in out is touched."""
    fmt, module = blocks.get(name), isas.modules()[isa]
    rng = generator(op, name, rows, cols, tokens)
    w = place(kit.packed(fmt, rows, cols, rng))
    columns = module.TILE_COLS if op == "matmul" else 1
    lanes = lanes_of(fmt, module) if op == "matmul" and fmt.value != "x" else None
    given, x = inputs(isa, fmt, floats(rng, tokens, cols), columns, place, lanes)
    stride = rows + 3
    before = np.full((tokens, stride), MARK)
    before[:, :rows] = floats(rng, tokens, rows)
    out, shift = place(before), floats(rng, rows)
    shift_at = place(shift)
    size = layout.panel_bytes(cols, fmt.group, module.WIDTH // 4, fmt.value == "x")
    scratch_bytes = layout.matmul_scratch(panels * size, module.WIDTH // 4, module.TILE_COLS)
    scratch_bytes = layout.MATVEC_SCRATCH if op == "matvec" else scratch_bytes
    taken = place(np.zeros(1, np.int64))
    scratch, words = place(np.zeros(threads * scratch_bytes, np.uint8)), state(tokens, 0, place)
    args = arguments(
        layout.MATMUL,
        state=at(words),
        w=at(w),
        rows=rows,
        cols=cols,
        row_bytes=w.shape[1],
        **{key: at(value) for key, value in given.items()},
        out=at(out),
        stride=stride,
        bias=at(shift_at) if bias else 0,
        add=int(add),
        scratch=at(scratch),
        scratch_bytes=scratch_bytes,
        group=panels,
        ahead=layout.PREFETCH,
        chunk=chunk,
        taken=at(taken),
        private=0,
    )
    kit.run(f"{op}/{name}", isa, place(args), threads)
    expected = x @ blocks.decode(w, fmt).astype(np.float64).T
    expected += (shift if bias else 0) + (before[:, :rows] if add else 0)
    limit = 5e-7 * (np.abs(x) @ kit.reach(w, fmt).T + 8)
    assert (np.abs(out[:, :rows] - expected) <= limit).all()
    assert (out[:, rows:] == MARK).all()


def inputs(
    isa: str,
    fmt: blocks.BlockFormat,
    x: np.ndarray,
    columns: int,
    place: kit.Place,
    lanes: Lanes | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(arrays x, xd, xs for the kernel, float64 [tokens, cols] that they stand for).

    lanes: of the panel that they are multiplied with; none for rows.
    """
    if fmt.value == "x":
        spare = -len(x) % columns
        full = np.concatenate([x, np.full((spare, x.shape[1]), np.nan, np.float32)])
        nothing = place(np.zeros(0, np.float32))
        return {"x": place(full), "xd": nothing, "xs": nothing}, x.astype(np.float64)
    codes = kit.quantize(x)
    sums = lanes.sums if lanes else sums_of(fmt, isas.modules()[isa])
    arrays = {
        "x": kit.in_order(codes.q, isa)
        if columns == 1
        else kit.interleaved(codes.q, columns, isas.modules()[isa].UNIT),
        "xd": kit.interleaved(codes.d, columns),
        "xs": kit.interleaved(codes.named(sums), columns),
    }
    return {key: place(value) for key, value in arrays.items()}, codes.values


# -- activations -----------------------------------------------------------------------------------
def embed(
    isa: str,
    name: str,
    *,
    tokens: int,
    cols: int,
    threads: int = 1,
    place: kit.Place = kit.anywhere,
) -> None:
    """Rows of the embedding matrix, decoded."""
    fmt = blocks.get(name)
    rng = generator(name, tokens, cols)
    w = place(kit.packed(fmt, 7, cols, rng))
    ids = rng.integers(0, 7, tokens).astype(np.int32)
    ids[-1] = 6  # the last row ends where memory ends
    ids_at, out = place(ids), place(np.zeros((tokens, cols), np.float32))
    words = state(tokens, 0, place)
    places = {"state": at(words), "ids": at(ids_at), "w": at(w), "out": at(out)}
    args = arguments(layout.EMBED, row_bytes=w.shape[1], cols=cols, **places)
    kit.run(f"embed/{name}", isa, args, threads)
    limit = 2e-7 * kit.reach(w, fmt)[ids]
    assert (np.abs(out - blocks.decode(w, fmt)[ids].astype(np.float64)) <= limit).all()


def gather(
    isa: str,
    *,
    tokens: int,
    wanted: int,
    cols: int,
    threads: int = 1,
    place: kit.Place = kit.anywhere,
) -> None:
    """The last `wanted` of `tokens` rows."""
    x = place(floats(generator(tokens, cols), tokens, cols))
    out = place(np.zeros((wanted, cols), np.float32))
    words, out_words = state(tokens, 0, place), state(wanted, 0, place)
    places = {"state": at(words), "out_state": at(out_words), "x": at(x), "out": at(out)}
    kit.run("gather", isa, arguments(layout.GATHER, cols=cols, **places), threads)
    np.testing.assert_array_equal(out, x[tokens - wanted :])


def prepare(
    isa: str,
    columns: int,
    *,
    mode: int,
    tokens: int,
    cols: int,
    threads: int = 1,
    quantized: bool = True,
    private: bool = False,
    place: kit.Place = kit.anywhere,
) -> None:
    """Mode 0: nothing, 1: RMS norm, 2: SiLU gate; then int8 tiles of `columns` columns."""
    rng = generator(mode, tokens, cols)
    stride = cols + 5 if mode else cols
    x, up = (place(3 * floats(rng, tokens * stride - (stride - cols))) for _ in range(2))
    weight = place(floats(rng, cols)) if mode == 1 else up
    source = _rows(x, tokens, stride, cols)
    expected = source.astype(np.float64)
    if mode == 1:
        expected = np.array([naive.rms_norm(row, weight, 1e-5) for row in source])
    elif mode == 2:
        ups = _rows(up, tokens, stride, cols)
        expected = np.array([naive.silu_gate(g, u) for g, u in zip(source, ups)])
    values = -(-tokens // columns) * columns * cols if quantized else 0
    counts = {"h": tokens * cols, "d": values // 32, "sums16": values // 16, "sums32": values // 32}
    counts |= {"ints16": values // 16, "ints32": values // 32, "q": -(-values // 4)}
    copies = threads if private else 1
    out = place(np.full((copies, sum(counts.values())), MARK))
    starts = dict(zip(counts, np.cumsum([0, *counts.values()]), strict=False))
    places = {name: at(out) + 4 * int(start) for name, start in starts.items()}
    words = state(tokens, 0, place)
    args = arguments(
        layout.PREPARE,
        state=at(words),
        mode=mode,
        x=at(x),
        x_stride=stride,
        weight=at(weight),
        eps=1e-5,
        cols=cols,
        **{**places, "q": places["q"] if quantized else 0},
        private=4 * out.shape[1] if private else 0,
    )
    kit.run(f"prepare/{columns}", isa, args, threads)
    for copy in out:
        parts = {name: copy[start : start + counts[name]] for name, start in starts.items()}
        h = parts["h"].reshape(tokens, cols) if mode else source
        np.testing.assert_allclose(h, expected, rtol=2e-6, atol=1e-30)
        if quantized:
            check_codes(isa, h, columns, parts)


def _rows(x: np.ndarray, tokens: int, stride: int, cols: int) -> np.ndarray:
    """[tokens, cols] of rows that start `stride` apart; the last one is cut after cols."""
    return np.array([x[t * stride : t * stride + cols] for t in range(tokens)])


def check_codes(isa: str, h: np.ndarray, columns: int, parts: dict[str, np.ndarray]) -> None:
    q, d = parts["q"].view(np.int8), parts["d"]
    tokens, expected = len(h), kit.quantize(h)
    wanted = kit.in_order(expected.q, isa) if columns == 1 else expected.q
    unit = isas.modules()[isa].UNIT
    np.testing.assert_array_equal(kit.separated(q, columns, tokens, unit), wanted)
    np.testing.assert_array_equal(kit.separated(d, columns, tokens), expected.d)
    for group in (16, 32):
        whole = kit.separated(parts[f"ints{group}"].view(np.int32), columns, tokens)
        np.testing.assert_array_equal(whole, expected.negative(group))
        got = kit.separated(parts[f"sums{group}"], columns, tokens)
        limit = 2e-7 * np.repeat(expected.d, 32 // group, axis=1) * 127 * group
        assert (np.abs(got - expected.sums(group)) <= limit).all()
    spare = -tokens % columns  # columns without a token stay as they were
    there = kit.separated(q.view(np.float32), columns, tokens + spare, unit // 4)
    assert (there[tokens:] == MARK).all()
    assert (kit.separated(d, columns, tokens + spare)[tokens:] == MARK).all()


# -- attention -------------------------------------------------------------------------------------
def rope(
    isa: str,
    *,
    tokens: int,
    position: int,
    dim: int,
    turned: int,
    halves: bool,
    heads: int = 4,
    kv_heads: int = 2,
    norm: bool = False,
    types: tuple[str, str] = ("f16", "f16"),
    threads: int = 1,
    place: kit.Place = kit.anywhere,
) -> None:
    """q, k rotated in place (the first `turned` of `dim`), k and v stored in the cache."""
    rng = generator(tokens, position, dim, turned, halves, norm)
    context, pairs = kvkit.context(position + tokens), turned // 2
    q = floats(rng, tokens, heads, dim)
    k, v = floats(rng, tokens, kv_heads, dim), floats(rng, tokens, kv_heads, dim)
    angles = rng.uniform(-3, 3, (tokens, pairs))
    q_norm, k_norm = floats(rng, dim), floats(rng, dim)
    step, gap, scale = (1, pairs, 0.125) if halves else (2, 1, 0.125)
    k_cache, k_scales = kvkit.arrays(types[0], kv_heads, context, dim, keys=True)
    v_cache, v_scales = kvkit.arrays(types[1], kv_heads, context, dim, keys=False)
    arrays = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    arrays |= {"k_scales": k_scales, "v_scales": v_scales}
    arrays |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    arrays |= {"q_norm": q_norm, "k_norm": k_norm} if norm else {}
    there = {key: place(a) for key, a in arrays.items()}
    words = state(tokens, position, place)
    places = {"q_norm": 0, "k_norm": 0, "state": at(words)}
    places |= {key: at(a) for key, a in there.items()}
    spread = [turn(kind, dim) for kind in types]
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "context": context}
    turns = {"pairs": pairs, "step": step, "gap": gap, "eps": 1e-6, "scale": scale}
    turns |= {"k_turn": spread[0], "v_turn": spread[1]}
    kit.run(
        f"rope/{'.'.join(types)}", isa, arguments(layout.ROPE, **places, **sizes, **turns), threads
    )

    def turn_rows(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
        rotated = np.array([
            [
                naive.rotate(naive.rms_norm(r, weight, 1e-6) if norm else r, angles[t], step, gap)
                for r in rows[t]
            ]
            for t in range(tokens)
        ])  # fmt: skip
        return naive.hadamard(rotated, spread[0])

    np.testing.assert_allclose(there["q"], turn_rows(q, q_norm) * scale, rtol=5e-6, atol=5e-6)
    expected = turn_rows(k, k_norm), naive.hadamard(v, spread[1])
    for letter, kind, rows in zip("kv", types, expected, strict=True):
        cache, scales = there[f"{letter}_cache"], there[f"{letter}_scales"]
        kvkit.check_stored(
            kind, rows, cache, scales, position, letter == "k", isas.modules()[isa].OFFSET
        )


def attend(
    isa: str,
    queries: int,
    *,
    tokens: int,
    position: int,
    dim: int,
    heads: int,
    kv_heads: int,
    types: tuple[str, str] = ("f16", "f16"),
    span: int = 1000,
    threads: int = 1,
    scale: float = 1.0,
    place: kit.Place = kit.anywhere,
) -> np.ndarray:
    """Causal attention of tokens at `position` on over all keys before and among them; the result.
    What lies in the cache after them is poison.
    """
    rng = generator(dim, heads, kv_heads)
    context, seen = kvkit.context(position + tokens), position + tokens
    k, v = (floats(rng, 640, kv_heads, dim).swapaxes(0, 1)[:, :context] for _ in range(2))
    q = floats(rng, 640, heads, dim)[position:seen]
    q = (scale / np.sqrt(np.float32(dim)) * q).astype(np.float32)
    k[:, seen:], v[:, seen:] = 60000, 60000
    offset = isas.modules()[isa].OFFSET
    k_cache, k_scales = kvkit.packed(types[0], k, offset, keys=True)
    v_cache, v_scales = kvkit.packed(types[1], v, offset, keys=False)
    scratch_bytes = layout.attend_scratch(dim, queries)
    tiles = kv_heads * -(-tokens * (heads // kv_heads) // queries)
    ranges = -(-seen // layout.KEYS)
    arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "out": np.zeros_like(q)}
    arrays |= {"k_scales": k_scales, "v_scales": v_scales, "done": np.zeros(tiles, np.int64)}
    arrays["scratch"] = np.full(threads * scratch_bytes, 0xFF, np.uint8)
    arrays["parts"] = np.full(tiles * ranges * layout.attend_part(dim, queries), 0xFF, np.uint8)
    there = {key: place(a) for key, a in arrays.items()}
    words = state(tokens, position, place)
    places = {key: at(a) for key, a in there.items()}
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "context": context}
    sizes |= {"v_turn": turn(types[1], dim), "scratch_bytes": scratch_bytes, "span": span}
    args = arguments(layout.ATTEND, state=at(words), **places, **sizes)
    kit.run(f"attend/{queries}.{'.'.join(types)}", isa, args, threads)
    asked = kvkit.asked(q) if layout.kv_blocks(types[0]) else q
    keys, values = (
        kvkit.kept(kind, x[:, :seen]).swapaxes(0, 1) for kind, x in zip(types, (k, v), strict=True)
    )
    expected = naive.attention(asked, keys, values, position)
    expected = naive.hadamard(expected, turn(types[1], dim))
    np.testing.assert_allclose(there["out"], expected, rtol=2e-5, atol=3e-6 * scale**2)
    assert not there["done"].any()
    return there["out"]
