"""The recipe that keeps what a source already is: integers on a grid of few bits."""

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.grid import Grid, Ready
from edgeq.sources import Source

__all__ = ["native_recipe", "ready"]

_RECIPES = ("Q4_0", "Q4_1", "Q8_0")  # the smallest that has the integers
_ROWS = 64


def native_recipe(source: Source) -> str | None:
    """Recipe whose format has the integers of the first matrix exactly; None where none has.

    Raises ModelError, ResourceError.
    """
    names = [name for name in source.shapes if name in source.quantized]
    names += [name for name, shape in source.shapes.items() if "attn_" in name and len(shape) == 2]
    if not names:
        return None
    rows, cols = source.shapes[names[0]][-2:]
    some = min(-(-_ROWS // source.row_step) * source.row_step, rows)
    grid = source.grid(names[0], 0, some)
    w = source.read(names[0], 0, some) if grid is None else grid.values()
    for recipe in _RECIPES:
        found = ready(blocks.get(recipe), w, grid)
        zeros = ~w.reshape(some, -1, 32).any(axis=2) if cols % 32 == 0 else np.False_
        if found is not None and bool((found.exact | zeros).all()):
            return recipe
    return None


def ready(fmt: BlockFormat, w: NDArray[np.float32], grid: Grid | None) -> Ready | None:
    """Blocks of rows w [n, cols] that need no quantizer, since they are integers that `fmt` has.

    grid: the integers, when the source says them.
    """
    if grid is not None:
        return grid.fields(fmt)
    if fmt.value == "x":
        return None
    from edgeq.quantizers.search.lattice import find_grid

    return find_grid(w, fmt)
