"""One run of emitted code for a format against the decoded weights; see kernelcases.py, which does
the same for whole kernels.
"""

from collections.abc import Callable
from functools import cache

import kernelkit as kit
import numpy as np
from kernelcases import floats, generator, inputs

from edgeq import blocks
from edgeq.kernels import isa as isas
from edgeq.kernels import layout
from edgeq.kernels.dot import Column, Reader, row_dots
from edgeq.kernels.llvm import Emit, Value
from edgeq.kernels.panel import lanes_of, quant_panel
from edgeq.kernels.tile import float_panel, float_tile, quant_tile


@cache
def dot_function(isa: str, name: str, columns: int = 1) -> Callable[..., None]:
    """f(w, out, cols, x, xd, xs of each column)."""

    def emit(e: Emit, w: Value, out: Value, cols: Value, *arrays: Value) -> None:
        pointers = [e.pointer(a) for a in arrays]
        several = [Column(*pointers[i : i + 3]) for i in range(0, 3 * columns, 3)]
        row = Reader(e.pointer(w), e.i64(layout.PREFETCH))
        for k, total in enumerate(row_dots(e, blocks.get(name), row, several, cols)):
            e.store(total, e.pointer(out), 4 * k)

    return kit.native(emit, "i" * (3 + 3 * columns), isa)


def products(
    isa: str,
    name: str,
    row: np.ndarray,
    columns: list[list[np.ndarray]],
    place: kit.Place = kit.anywhere,
) -> np.ndarray:
    """Products of one row with columns, each of arrays x, xd, xs."""
    cols = blocks.get(name).block * row.shape[-1] // blocks.get(name).bytes
    out = place(np.zeros(len(columns), np.float32))
    arrays = [array for column in columns for array in column]
    dot_function(isa, name, len(columns))(row, out, cols, *arrays)
    return out


def dot(isa: str, name: str, *, cols: int, place: kit.Place = kit.anywhere) -> None:
    """A row times a column."""
    fmt, rng = blocks.get(name), generator("dot", name, cols)
    row = place(kit.packed(fmt, 1, cols, rng))
    arrays, x = inputs(isa, fmt, floats(rng, 1, cols), 1, place)
    got = products(isa, name, row, [list(arrays.values())], place)[0]
    expected = float(blocks.decode(row[0], fmt).astype(np.float64) @ x[0])
    assert abs(got - expected) <= 5e-7 * float(kit.reach(row, fmt)[0] @ np.abs(x[0]))


def dots(isa: str, name: str, *, cols: int, columns: int, place: kit.Place = kit.anywhere) -> None:
    """A row times several columns at once: to the bit what each gives alone."""
    fmt, rng = blocks.get(name), generator("dots", name, cols)
    row = place(kit.packed(fmt, 1, cols, rng))
    given = [
        list(inputs(isa, fmt, floats(rng, 1, cols), 1, place)[0].values()) for _ in range(columns)
    ]
    alone = [products(isa, name, row, [column])[0] for column in given]
    np.testing.assert_array_equal(products(isa, name, row, given, place), alone)


def _panel_product(e: Emit, fmt: blocks.BlockFormat, *args: Value) -> None:
    *addresses, rows, cols, stride = args
    w, panel, a, b, buf, x, xd, xs, out = (e.pointer(p) for p in addresses)
    if fmt.value != "x":
        quant_panel(e, fmt, w, stride, rows, cols, panel, a, b, buf)
        quant_tile(e, fmt, panel, a, b, x, xd, xs, cols, out)
        return
    float_panel(e, fmt, w, stride, rows, cols, panel)
    float_tile(e, panel, x, e.b.mul(cols, e.i64(4)), cols, out)


@cache
def panel_function(isa: str, name: str) -> Callable[..., None]:
    """Unpack a panel of rows and multiply it with one tile of columns."""
    fmt = blocks.get(name)
    return kit.native(lambda e, *v: _panel_product(e, fmt, *v), "i" * 12, isa)


def panel(isa: str, name: str, *, rows: int, cols: int, place: kit.Place = kit.anywhere) -> None:
    """Up to a panel of rows times one tile of columns."""
    fmt, module = blocks.get(name), isas.modules()[isa]
    rng, lanes, columns = generator("panel", name, cols), module.WIDTH // 4, module.TILE_COLS
    w = place(kit.packed(fmt, rows, cols, rng))
    plain = fmt.value == "x"
    held = None if plain else lanes_of(fmt, module)
    arrays, x = inputs(isa, fmt, floats(rng, columns, cols), columns, place, held)
    size = layout.panel_bytes(cols, fmt.group, lanes, plain)
    codes = size if plain else 4 * lanes * (cols // 4)
    sizes = [codes, (size - codes) // 2, (size - codes) // 2, 256 * lanes]
    scratch = [place(np.full(n, 0x7F, np.uint8)) for n in sizes]
    out = place(np.zeros((columns, lanes), np.float32))
    panel_function(isa, name)(w, *scratch, *arrays.values(), out, rows, cols, w.shape[1])
    limit = 5e-7 * (np.abs(x) @ kit.reach(w, fmt).T)
    error = np.abs(out[:, :rows] - x @ blocks.decode(w, fmt).astype(np.float64).T)
    assert (error <= limit).all()
