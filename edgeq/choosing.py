"""Which recipe a conversion uses: the one asked for, one made to fit a size, or a sensible one."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.errors import RequestError
from edgeq.gguf import GgufWriter, TensorSpec
from edgeq.gguf.layout import alignment_of
from edgeq.mixture import (
    OUTLIER_FORMATS,
    OUTLIER_SHARE,
    Progress,
    aligned_bytes,
    measure,
    promote,
    solve,
    to_recipe,
)
from edgeq.native import native_recipe
from edgeq.recipe import Recipe, assign, quantizable
from edgeq.sources import Source
from edgeq.statistics import Statistics
from edgeq.text import printable

__all__ = ["Target", "choose", "sensible"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a file should be like, beside or instead of a recipe.

    bpw: bits per weight of all tensors together. size: bytes of the file. Either asks for a search.
    outliers: the few matrices that gain most are kept in Q8_0 or F16.
    """

    bpw: float | None = None
    size: int | None = None
    outliers: bool = False

    def check(self, recipe: object) -> None:
        """Refuse what cannot be meant. Raises RequestError."""
        if self.bpw is None and self.size is None:
            return
        if self.bpw is not None and self.size is not None:
            raise RequestError("bpw and size are both given: expected one of them")
        if recipe is not None:
            raise RequestError(
                f"recipe {recipe} with bpw or size: expected one of them: a size makes its own "
                "recipe"
            )
        if self.bpw is not None and not 0 < self.bpw <= 32:
            raise RequestError(f"bpw = {self.bpw}: expected more than 0, at most 32")
        if self.size is not None and self.size < 1:
            raise RequestError(f"size = {self.size}: expected bytes, more than 0")


def sensible(source: Source) -> tuple[str, str]:
    """A shipped recipe of about 4 bits that needs no data, and why, in a line.

    Raises ModelError, ResourceError.
    """
    native = native_recipe(source)
    if native is not None:
        return native, f"{native}: the source holds integers that this format keeps as they are"
    cols = {shape[-1] for name, shape in source.shapes.items() if quantizable(name, shape)}
    block = blocks.get("Q4_K").block
    odd = sorted(n for n in cols if n % block)
    if odd and odd[0] == min(cols):
        return "IQ4_NL", (
            f"IQ4_NL: 4 bits; rows of {odd[0]} weights are no multiple of {block}, which Q4_K_M "
            "needs, and of the formats with small blocks it loses least without calibration"
        )
    return "Q4_K_M", (
        "Q4_K_M: 4 bits, 6 where errors cost most; it needs no calibration, and with more bits "
        "little is left to gain"
    )


def choose(
    source: Source,
    recipe: str | Path | Recipe | None,
    target: Target,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Recipe, str]:
    """The recipe, and why it was chosen if nobody asked for it.

    metadata: of the file to write; its size counts. Raises RequestError for a target that cannot be
    met.
    """
    target.check(recipe)
    if target.bpw is None and target.size is None:
        name, why = (recipe, "") if recipe is not None else sensible(source)
        mixture = Recipe.load(name)
        if not target.outliers:
            return mixture, why
        return _promoted(source, mixture, statistics, threads, progress), why
    candidates = {name: _fitting(shape[-1]) for name, shape in _matrices(source).items()}
    alignment = alignment_of(metadata)
    choices = measure(
        source, statistics, candidates, alignment=alignment, threads=threads, progress=progress
    )
    budget = _budget(source, target, metadata)
    if target.outliers:  # what they will take is left free
        budget = int(budget / (1 + OUTLIER_SHARE))
    chosen = {name: choice.format.name for name, choice in solve(choices, budget).items()}
    if target.outliers:
        chosen = {name: c.format.name for name, c in promote(choices, chosen).items()}
    name = f"{target.bpw:g}bpw" if target.bpw is not None else f"{target.size}B"
    return _recipe(source, chosen, name, f"made for {printable(source.name)} by search"), ""


def _matrices(source: Source) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in source.shapes.items() if quantizable(name, shape)}


def _fitting(cols: int) -> list[BlockFormat]:
    """Formats that rows of this length can have: all of blocks, and F16."""
    known = blocks.formats().values()
    return [
        fmt for fmt in known if cols % fmt.block == 0 and (fmt.value != "x" or fmt.name == "F16")
    ]


def _budget(source: Source, target: Target, metadata: Mapping[str, Any]) -> int:
    """Bytes for matrices."""
    f32, matrices = blocks.get("F32"), _matrices(source)
    weights = sum(math.prod(shape) for shape in source.shapes.values())
    if target.bpw is not None:
        rest = sum(math.prod(s) for name, s in source.shapes.items() if name not in matrices)
        return int(target.bpw * weights / 8) - rest * 4
    assert target.size is not None
    alignment = alignment_of(metadata)
    specs = [TensorSpec(name, shape, f32) for name, shape in source.shapes.items()]
    whole = GgufWriter("size.gguf", metadata, specs).nbytes  # nothing is written
    return (
        target.size
        - whole
        + sum(aligned_bytes(shape, f32, alignment) for shape in matrices.values())
    )


def _recipe(source: Source, chosen: Mapping[str, str], name: str, about: str) -> Recipe:
    weights = {name: math.prod(source.shapes[name]) for name in chosen}
    return to_recipe(chosen, name, about, weights)


def _promoted(
    source: Source,
    recipe: Recipe,
    statistics: Statistics,
    threads: int | None,
    progress: Progress | None,
) -> Recipe:
    """The recipe with outliers kept."""
    model = dataclasses.replace(source.model, importance=bool(statistics))
    formats = assign(recipe, source.shapes.items(), model)
    now = {name: formats[name] for name in _matrices(source)}
    candidates = {
        name: [
            fmt
            for fmt in map(blocks.get, dict.fromkeys((old, *OUTLIER_FORMATS)))
            if source.shapes[name][-1] % fmt.block == 0
        ]
        for name, old in now.items()
    }
    choices = measure(source, statistics, candidates, threads=threads, progress=progress)
    better = {name: c.format.name for name, c in promote(choices, now).items()}
    about = f"{recipe.name}, outliers kept"
    found = _recipe(source, better, f"{recipe.name}-outliers", about)
    return dataclasses.replace(found, file_type=recipe.file_type)
