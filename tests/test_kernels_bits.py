"""Words that put numbers together from bits of two places."""

from collections.abc import Callable
from functools import partial

import kernelkit as kit
import numpy as np
import pytest

from edgeq.kernels import isa as isas
from edgeq.kernels.llvm import I8, Emit, Value, vector

ACROSS = [name for name in kit.EMITTED if isas.modules()[name].ACROSS]
Place = tuple[int, int]  # shift, bits
# Of the lower number, then of the upper one
STORED = [((s, 4), (t, 2)) for s in (0, 4) for t in (0, 2, 4, 6)]
STORED += [((s, 4), (t, 1)) for s in (0, 4) for t in range(8)]
STORED += [((s, 2), (t, 1)) for s in (0, 2, 4, 6) for t in (0, 3, 7)]


def applied(
    isa: str, lanes: int, low: np.ndarray, high: np.ndarray, put: Callable[..., Value]
) -> np.ndarray:
    """put(e, low, high) of u8[16], by `lanes` at once."""
    out = np.zeros_like(low)

    def emit(e: Emit, a: Value, b: Value, out: Value) -> None:
        for at in range(0, len(low), lanes):
            parts = [e.load(vector(I8, lanes), e.pointer(p), at) for p in (a, b)]
            e.store(put(e, *parts), e.pointer(out), at)

    kit.native(emit, "iii", isa)(low, high, out)
    return out


def field(v: np.ndarray, place: Place) -> np.ndarray:
    shift, bits = place
    return v >> shift & (1 << bits) - 1


def _stacked(a: Place, b: Place, e: Emit, v: Value, w: Value) -> Value:
    return e.isa.stacked(e, [(v, a[0]), (w, b[0])], [a[1], b[1]])


def _signed(a: Place, b: Place, e: Emit, v: Value, w: Value) -> Value:
    return e.isa.signed(e, v, *a, e.isa.missing(e, w, b[0]))


@pytest.mark.parametrize("lanes", [8, 16, 32])
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_stacked(isa: str, lanes: int, rng: np.random.Generator) -> None:
    low, high = rng.integers(0, 256, (2, 32)).astype(np.uint8)
    for a, b in STORED:
        put = partial(_stacked, a, b)
        expected = field(low, a) | field(high, b) << a[1]
        np.testing.assert_array_equal(applied(isa, lanes, low, high, put), expected, str((a, b)))


@pytest.mark.parametrize("isa", ACROSS)
def test_signed(isa: str, rng: np.random.Generator) -> None:
    """The lower number, less what the missing top bit would have been worth."""
    low, high = rng.integers(0, 256, (2, 32)).astype(np.uint8)
    for a, b in STORED:
        if b[1] == 1:
            put = partial(_signed, a, b)
            expected = field(low, a).astype(int) - (1 - field(high, b).astype(int) << a[1])
            got = applied(isa, 16, low, high, put).view(np.int8)
            np.testing.assert_array_equal(got, expected, str((a, b)))
