"""What a file's mixture of formats is expected to lose, from what recipes cost the example model
(docs/quantization.md).
"""

import math
from collections.abc import Mapping
from functools import cache

from edgeq import blocks
from edgeq.recipe import Model, Recipe, assign, recipes

__all__ = ["expected", "of_type"]

WHOLE = 256  # weights: rows that are a multiple of so many can have every format


def expected(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, ...]],
    formats: Mapping[str, str],
    model: Model,
) -> float | None:
    """KL divergence in nats per token that a file costs. Tensors in the formats that the recipe
    means for long rows lose what makes up its own figure; others, what their format does alone, and
    so do all where the recipe has no figure. None, where nothing is known of a format.

    shapes, formats: by tensor name.

    >>> recipe, shapes = Recipe.load("Q4_K_M"), {"blk.0.attn_q.weight": (64, 256)}
    >>> expected(recipe, shapes, {"blk.0.attn_q.weight": "Q4_K"}, Model(1, 1, 1))
    0.00368
    >>> expected(recipe, shapes, {"blk.0.attn_q.weight": "Q5_0"}, Model(1, 1, 1))
    0.00203
    """
    alone = _alone()
    if not alone.keys() >= set(formats.values()):
        return None
    long = {name: (*shape[:-1], -(-shape[-1] // WHOLE) * WHOLE) for name, shape in shapes.items()}
    meant = assign(recipe, long.items(), model)
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(weights.values())
    mean = sum(n * alone[meant[name]] for name, n in weights.items()) / total
    own = recipe.divergence / mean if recipe.divergence and mean else 1.0
    found = (
        n * alone[formats[name]] * (own if formats[name] == meant[name] else 1.0)
        for name, n in weights.items()
    )
    return round(sum(found) / total, 6)


def of_type(file_type: object) -> Recipe | None:
    """The recipe that a GGUF file says it was made by.

    >>> of_type(15).name
    'Q4_K_M'
    """
    return next((r for r in map(Recipe.load, recipes()) if r.file_type == file_type), None)


@cache
def _alone() -> dict[str, float]:
    """Loss by format: that of the recipe which has it almost everywhere; floats lose nothing."""
    found = {name: 0.0 for name in blocks.formats() if blocks.get(name).value == "x"}
    for recipe in map(Recipe.load, recipes()):
        if recipe.divergence is not None:
            found[recipe.base] = max(recipe.divergence, found.get(recipe.base, 0.0))
    return found
