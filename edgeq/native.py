"""The recipe that keeps what a source already is: blocks, or integers on a grid of few bits."""

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.grid import Grid, Ready
from edgeq.recipe import recipes
from edgeq.sources import Source

__all__ = ["native_recipe", "ready"]

_RECIPES = ("Q4_0", "Q4_1", "Q8_0")  # the smallest that has the integers
_ROWS = 64


def native_recipe(source: Source) -> str | None:
    """Recipe of the format that most matrices of the layers have, or of the integers that the first
    one holds; None where none keeps them.

    Raises ModelError, ResourceError.
    """
    layers = [n for n, shape in source.shapes.items() if n.startswith("blk.") and len(shape) == 2]
    quantized = [name for name in layers if name in source.quantized]
    weights = Counter[str]()
    for name in quantized:
        fmt = source.quantized[name]
        if fmt is not None:
            weights[fmt.name] += math.prod(source.shapes[name])
    if weights:
        commonest = max(weights, key=weights.__getitem__)
        return commonest if commonest in recipes() else None
    tried = quantized or [name for name in layers if "attn_" in name]
    return _of_integers(source, tried[0]) if tried else None


def _of_integers(source: Source, name: str) -> str | None:
    """Recipe whose format has the integers of a matrix exactly, judged by its first rows."""
    rows, cols = source.shapes[name]
    some = min(-(-_ROWS // source.row_step) * source.row_step, rows)
    grid = source.grid(name, 0, some)
    w = source.read(name, 0, some) if grid is None else grid.values()
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
