"""The words that each instruction set provides: dot, lookup, conversions of halves."""

from collections.abc import Callable

import kernelkit as kit
import numpy as np
import pytest
from llvmlite import ir

from edgeq.errors import KernelError
from edgeq.kernels import isa as isas
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, Emit, Value, vector

HALVES = np.arange(65536, dtype=np.uint16)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best that runs here, unless told otherwise; a name that does not run is refused."""
    monkeypatch.delenv("EDGEQ_ISA", raising=False)
    assert isas.choose().NAME == kit.BEST
    for name in kit.ISAS:
        monkeypatch.setenv("EDGEQ_ISA", name)
        assert name == isas.choose().NAME
    for name in ("mmx", *(set(isas.modules()) - set(kit.ISAS))):
        with pytest.raises(KernelError, match=rf"'{name}' does not run .* expected one of .*porta"):
            isas.choose(name)


def test_features_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with fewer features gets an instruction set that needs no more."""
    for isa in isas.modules().values():
        if isas.machine() in isa.CPU:
            monkeypatch.setattr(isas, "host_features", lambda needs=isa.NEEDS: needs)
            assert isas.choose().NAME == isa.NAME


def runnable() -> list[str]:
    """AVX-VNNI's instruction exists on AVX-512 machines too, in another encoding."""
    vnni = {"avx512vl", "avx512vnni"} <= isas.host_features()
    return kit.EMITTED + [n for n in ("avxvnni",) if vnni and n not in kit.ISAS]


def word(isa: str, emit: Callable[..., None], arguments: str) -> Callable[..., None]:
    cpu = "host" if isa == "avxvnni" and isa not in kit.ISAS else None
    return kit.native(emit, arguments, isa, cpu=cpu)


def each_vector(e: Emit, count: Value, body: Callable[[Value], None]) -> None:
    def step(i: Value, _: list[Value]) -> list[Value]:
        body(i)
        return []

    e.loop(count, [], step)


# -- dot -------------------------------------------------------------------------------------------
def dot_cases(signed: bool, top: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Codes and activations int8[n][64]: random ones, and the extremes in all pairs."""
    w = rng.integers(-128 if signed else 0, top + 1, (100, 64))
    x = rng.integers(-127, 128, (100, 64))
    ends = [-128, -127, -1, 0, 127] if signed else [0, 1, top - 1, top]
    pairs = [(a, b) for a in ends for b in (-127, -1, 0, 127)]
    w = np.concatenate([w, np.repeat([[a] for a, _ in pairs], 64, axis=1)])
    x = np.concatenate([x, np.repeat([[b] for _, b in pairs], 64, axis=1)])
    return w.astype(np.uint8).view(np.int8), x.astype(np.int8)


def kinds_of_codes() -> list[tuple[str, bool]]:
    """(instruction set, signed); one that shifts signed codes up never sees any."""
    shifts = {isa: isas.modules()[isa].OFFSET > 0 for isa in runnable()}
    return [(isa, signed) for isa in shifts for signed in (False, True)[: 2 - shifts[isa]]]


@pytest.mark.parametrize("lanes", [8, 16, 32, 64])
@pytest.mark.parametrize(("isa", "signed"), kinds_of_codes())
def test_dot(isa: str, signed: bool, lanes: int, rng: np.random.Generator) -> None:
    offset = isas.modules()[isa].OFFSET
    w, x = dot_cases(signed, 127 if signed or not offset else 255, rng)
    start = rng.integers(-(2**20), 2**20, (len(w), 16)).astype(np.int32)
    out = np.zeros_like(start)

    def emit(e: Emit, w: Value, x: Value, acc: Value, out: Value, count: Value) -> None:
        def body(i: Value) -> None:
            pointers = [e.at(e.pointer(p), e.b.mul(i, e.i64(64))) for p in (w, x, acc, out)]
            for k in range(0, 64, lanes):
                wv, xv = (e.load(vector(I8, lanes), p, k) for p in pointers[:2])
                before = e.load(vector(I32, lanes // 4), pointers[2], k)
                e.store(e.isa.dot(e, before, wv, xv, signed), pointers[3], k)

        each_vector(e, count, body)

    word(isa, emit, "iiiii")(w, x, start, out, len(w))
    codes = w.astype(np.int64) if signed else w.view(np.uint8).astype(np.int64)
    expected = start + (codes * x).reshape(len(w), 16, 4).sum(-1)
    np.testing.assert_array_equal(out, expected)


# -- sums ------------------------------------------------------------------------------------------
ACROSS = [isa for isa in kit.EMITTED if isas.modules()[isa].ACROSS]


def summed(isa: str, peak: int, w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """i32[rows, groups] of codes int8[rows, groups, 16 or 32] below `peak`."""
    rows, groups, group = w.shape
    out = np.zeros((rows, groups), np.int32)

    def emit(e: Emit, w: Value, x: Value, out: Value, count: Value) -> None:
        def body(i: Value) -> None:
            at = e.b.mul(i, e.i64(groups * group))
            pairs = [
                [e.load(vector(I8, 16), e.at(e.pointer(p), at), k) for p in (w, x)]
                for k in range(0, groups * group, 16)
            ]
            per = group // 16
            total = e.isa.sums(e, [pairs[k : k + per] for k in range(0, len(pairs), per)], peak)
            e.store(total, e.pointer(out), e.b.mul(i, e.i64(4 * groups)))

        each_vector(e, count, body)

    word(isa, emit, "iiii")(w, x, out, rows)
    return out


@pytest.mark.parametrize("shape", [(1, 32), (4, 32), (8, 32), (4, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("peak", [1, 3, 4, 15, 31, 32, 63, 127, 128])
@pytest.mark.parametrize("isa", ACROSS)
def test_sums(isa: str, peak: int, shape: tuple[int, int], rng: np.random.Generator) -> None:
    """Random codes, and the largest of both signs in all places: nothing overflows on the way."""
    w = rng.integers(-peak, min(peak, 127) + 1, (40, *shape))
    x = rng.integers(-127, 128, (40, *shape))
    w[:8], x[:4], x[4:8] = -peak, 127, -127
    w[1::4], x[2::4] = np.sign(w[1::4] + 0.5) * min(peak, 127), np.sign(x[2::4] + 0.5) * 127
    got = summed(isa, peak, w.astype(np.int8), x.astype(np.int8))
    np.testing.assert_array_equal(got, (w * x).sum(-1))


@pytest.mark.parametrize("peak", [15, 31, 63, 127])
@pytest.mark.skipif("neon" not in kit.EMITTED, reason="an instruction set of Arm")
def test_sums_are_as_long_as_they_may_be(peak: int) -> None:
    """Twice the stated peak does not fit any more, which shows that the extremes reach the end."""
    w, x = np.full((1, 8, 32), peak, np.int8), np.full((1, 8, 32), 127, np.int8)
    assert (summed("neon", peak, w, x) == 32 * 127 * peak).all()
    assert (summed("neon", peak // 2, w, x) != 32 * 127 * peak).any()


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("isa", ACROSS)
def test_neighbours(isa: str, lanes: int, rng: np.random.Generator) -> None:
    def emit(e: Emit, v: Value, out: Value, count: Value) -> None:
        def body(i: Value) -> None:
            source = e.at(e.pointer(v), e.b.mul(i, e.i64(2 * lanes)))
            total = e.isa.neighbours(e, e.load(vector(I16, lanes), source))
            e.store(total, e.pointer(out), e.b.mul(i, e.i64(2 * lanes)))

        each_vector(e, count, body)

    v = rng.integers(-32768, 32768, (20, lanes)).astype(np.int16)
    v[:3, :2] = [[-32768, -32768], [32767, 32767], [-32768, 32767]]
    out = np.zeros((20, lanes // 2), np.int32)
    word(isa, emit, "iii")(v, out, len(v))
    np.testing.assert_array_equal(out, v.astype(np.int32).reshape(20, -1, 2).sum(-1))


# -- lookup ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("lanes", [8, 16, 32, 64])
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_lookup(isa: str, lanes: int, rng: np.random.Generator) -> None:
    table = [-128, 127, 0, -1, 5, 17, -90, 33, 64, -64, 100, -100, 2, -2, 81, -37]
    index = np.concatenate([np.tile(np.arange(16), 4), rng.integers(0, 16, 640)]).astype(np.int8)
    out = np.zeros_like(index)

    def emit(e: Emit, index: Value, out: Value, count: Value) -> None:
        def body(i: Value) -> None:
            offset = e.b.mul(i, e.i64(lanes))
            v = e.load(vector(I8, lanes), e.pointer(index), offset)
            e.store(e.isa.lookup(e, table, v), e.pointer(out), offset)

        each_vector(e, count, body)

    word(isa, emit, "iii")(index, out, len(index) // lanes)
    np.testing.assert_array_equal(out, np.array(table, np.int8)[index])


# -- flags -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("lanes", [16, 32])
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_flags(isa: str, lanes: int, rng: np.random.Generator) -> None:
    bits, out = rng.integers(0, 256, 160).astype(np.uint8), np.zeros(1280, np.uint8)

    def emit(e: Emit, source: Value, out: Value, count: Value) -> None:
        def body(i: Value) -> None:
            at = e.b.mul(i, e.i64(lanes // 8))
            flags = e.isa.flags(e, e.load(ir.IntType(lanes), e.pointer(source), at))
            e.store(flags, e.pointer(out), e.b.mul(i, e.i64(lanes)))

        each_vector(e, count, body)

    word(isa, emit, "iii")(bits, out, 8 * len(bits) // lanes)
    np.testing.assert_array_equal(out, np.unpackbits(bits, bitorder="little"))


# -- bits ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("lanes", [16, 32, 64])
@pytest.mark.parametrize("shifts", [(3,), (0, 4), (0, 0, 4, 4), (6, 1, 0, 2)], ids=str)
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_bits_of_words(
    isa: str, shifts: tuple[int, ...], lanes: int, rng: np.random.Generator
) -> None:
    """Every byte gives its own bits, at the bottom or moved up."""
    source, out = rng.integers(0, 256, 640).astype(np.uint8), np.zeros((2, 640), np.uint8)
    bits = 8 - max(shifts)
    mask, lows = (1 << bits) - 1, (0, 8 - bits)

    def emit(e: Emit, source: Value, out: Value, count: Value) -> None:
        def body(i: Value) -> None:
            offset = e.b.mul(i, e.i64(lanes))
            v = e.load(vector(I8, lanes), e.pointer(source), offset)
            each = list(shifts) * (lanes // 4 // len(shifts))
            for k, low in enumerate(lows):
                e.store(e.bits_of_words(v, each, mask, low), e.at(e.pointer(out), 640 * k), offset)

        each_vector(e, count, body)

    kit.native(emit, "iii", isa)(source, out, len(source) // lanes)
    found = source >> np.resize(np.repeat(shifts, 4), len(source)) & mask
    np.testing.assert_array_equal(out, [found << low for low in lows])


@pytest.mark.skipif("avx512vnni" not in kit.EMITTED, reason="an instruction set of x86")
def test_bits_of_words_without_gfni(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """AVX-512 VNNI before Ice Lake turns words instead."""
    there = isas.host_features() - {"gfni"}
    monkeypatch.setattr(isas, "host_features", lambda: there)
    for shifts in ((0, 4), (0, 0, 4, 4), (6, 1, 0, 2)):
        test_bits_of_words("avx512vnni", shifts, 64, rng)


# -- halves ----------------------------------------------------------------------------------------
def convert(isa: str, lanes: int, values: np.ndarray) -> np.ndarray:
    """f16 to f32 or back through the instruction set's word."""
    widen = values.dtype == np.float16
    out = np.zeros(len(values), np.float32 if widen else np.float16)
    size = (2, 4) if widen else (4, 2)

    def emit(e: Emit, source: Value, target: Value, count: Value) -> None:
        def body(i: Value) -> None:
            kind = vector(F16 if widen else F32, lanes)
            v = e.load(kind, e.pointer(source), e.b.mul(i, e.i64(size[0] * lanes)))
            v = e.isa.from_f16(e, v) if widen else e.isa.to_f16(e, v)
            e.store(v, e.pointer(target), e.b.mul(i, e.i64(size[1] * lanes)))

        each_vector(e, count, body)

    word(isa, emit, "iii")(values, out, len(values) // lanes)
    return out


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, except that a NaN may be any NaN."""
    nan = np.isnan(expected)
    assert np.isnan(got[nan]).all()
    unsigned = f"u{got.itemsize}"
    np.testing.assert_array_equal(got[~nan].view(unsigned), expected[~nan].view(unsigned))


@pytest.mark.parametrize("lanes", [1, 2, 8, 16])
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_every_half_becomes_its_f32(isa: str, lanes: int) -> None:
    halves = HALVES.view(np.float16)
    with np.errstate(invalid="ignore"):  # Arm's conversion reports signalling NaNs
        expected = halves.astype(np.float32)
    assert_same_bits(convert(isa, lanes, halves), expected)


def awkward_floats(rng: np.random.Generator) -> np.ndarray:
    """Every half, every midpoint of neighbours, f32 just beside them, and any bits at all."""
    with np.errstate(invalid="ignore"):  # some CPUs raise it for a NaN that signals
        exact = HALVES.view(np.float16).astype(np.float32)
    finite = np.sort(exact[np.isfinite(exact)])
    middle = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    ends = np.array([65519.996, 65520, 65520.004, 1e30, 3.4e38, np.inf, 5.9e-8, 1e-40], np.float32)
    beside = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    bits = rng.integers(0, 2**32, 65536, dtype=np.uint32).view(np.float32)
    values = np.concatenate([exact, middle, *beside, ends, -ends, bits])
    return np.resize(values, -(-len(values) // 16) * 16)


@pytest.mark.parametrize("lanes", [1, 8, 16])
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_f32_rounds_to_the_nearest_half(isa: str, lanes: int, rng: np.random.Generator) -> None:
    values = awkward_floats(rng)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    assert_same_bits(convert(isa, lanes, values), expected)
