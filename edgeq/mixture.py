"""Mixed precision by search: the recipe with the least expected loss that fits a size.

For every matrix and every format a sample of rows is quantized, and the error of its output turned
into an expected share of the model's KL divergence. A Lagrange multiplier then trades loss for
bytes (as in llama.cpp's pull request 15550): at the right price per byte, each matrix on its own
picks the format that costs least.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.errors import RequestError
from edgeq.gguf.layout import DEFAULT_ALIGNMENT, aligned
from edgeq.gguf.names import split
from edgeq.models.flow import HEADS, RESIDUAL, TABLES, kind_of, sharing
from edgeq.quantizers import quantize
from edgeq.recipe import Recipe, Rule, recipes
from edgeq.sources import Source
from edgeq.statistics import Statistics

__all__ = ["Choice", "aligned_bytes", "measure", "promote", "solve", "to_recipe"]

Array = NDArray[np.float32]
Progress = Callable[[int, int, str], None]

SAMPLE = 1 << 16  # weights per matrix that are tried in every format
PLACES = 8  # from which they come, at least
OUTLIER_SHARE = 0.03  # how many bytes more `promote` may spend
OUTLIER_FORMATS = ("Q8_0", "F16")

# What a relative error of 1 would add to the KL divergence, as fitted on the example model and the
# text that it is calibrated with: in the output matrix, whose logits it moves; in the residual
# stream; and in all others together. Only their proportions matter.
OUTPUT, STREAM, OTHERS = 3.0, 1.0, 0.45


@dataclass(frozen=True, slots=True)
class Choice:
    """A format for a matrix."""

    format: BlockFormat
    nbytes: int
    loss: float  # expected, in nats


@dataclass(frozen=True, slots=True)
class _Error:
    """Squared error of a matrix's output, and its mean square, per token."""

    error: float
    power: float


def aligned_bytes(
    shape: tuple[int, ...], fmt: BlockFormat, alignment: int = DEFAULT_ALIGNMENT
) -> int:
    """What a tensor takes in a file whose tensors start at multiples of `alignment` bytes.

    >>> aligned_bytes((1, 32), blocks.get("Q4_0"))
    32
    """
    return aligned(math.prod(shape[:-1]) * blocks.row_bytes(fmt, shape[-1]), alignment)


def measure(
    source: Source,
    statistics: Statistics,
    candidates: Mapping[str, Sequence[BlockFormat]],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Choice]]:
    """Choices for every matrix, smallest first, from rows spread over it.

    candidates: formats to try, by tensor name. alignment: of the file, bytes. Raises ModelError for
    weights that a format cannot hold.
    """
    errors: dict[str, list[_Error]] = {}
    for done, (name, formats) in enumerate(candidates.items()):
        errors[name] = _errors(source, name, formats, statistics, threads)
        if progress is not None:
            progress(done + 1, len(candidates), f"trying {name}")
    losses = _losses(source, errors)
    result = {}
    for name, formats in candidates.items():
        sizes = [aligned_bytes(source.shapes[name], fmt, alignment) for fmt in formats]
        result[name] = sorted(map(Choice, formats, sizes, losses[name]), key=lambda c: c.nbytes)
    return result


def _errors(
    source: Source,
    name: str,
    formats: Sequence[BlockFormat],
    statistics: Statistics,
    threads: int | None,
) -> list[_Error]:
    w, share = _sample(source, name)
    importance, moments = statistics.importance(name), statistics.moments(name)
    power, found = _power(w, importance, moments) / share, []
    for fmt in formats:
        miss = blocks.decode(quantize(w, fmt, importance, "search", threads), fmt) - w
        found.append(_Error(_power(miss, importance, moments) / share, power))
    return found


def _sample(source: Source, name: str) -> tuple[Array, float]:
    """About SAMPLE weights in rows from some places of a matrix, and which share of it they are."""
    rows, cols = math.prod(source.shapes[name][:-1]), source.shapes[name][-1]
    wanted = min(max(SAMPLE // cols, 1), rows)
    # Heads are read whole where that decides the order of rows, but not tried whole.
    step = source.row_step if kind_of(name) in HEADS else max(wanted // PLACES, 1)
    groups = max(rows // step, 1)
    places = min(groups, max(wanted // step, min(PLACES, wanted)))
    each = max(min(wanted // places, step), 1)
    starts = [round(i * groups / places) * step for i in range(places)]
    parts = [source.read(name, at, min(at + step, rows))[:: step // each][:each] for at in starts]
    w = np.concatenate(parts)
    return w, len(w) / rows


def _power(v: Array, importance: Array | None, moments: Array | None) -> float:
    """Mean square of v x over inputs x, summed over rows."""
    if moments is not None:
        return float(np.einsum("ij,ij->", v @ moments, v, dtype=np.float64))
    squares = np.einsum("ij,ij->j", v, v, dtype=np.float64)
    return float(squares.sum() if importance is None else squares @ importance)


def _losses(source: Source, errors: Mapping[str, Sequence[_Error]]) -> dict[str, list[float]]:
    """Expected KL divergence, by name and format.

    Errors add up in the residual stream, so there they count by their size next to all that is
    added to it; shared keys and values count once for each query head. Everywhere else, and where
    the sizes of inputs are unknown, they count by their share of the matrix's own output.
    """
    inner = [name for name in errors if kind_of(name) not in TABLES]
    powers = [errors[n][0].power for n in inner if kind_of(n) in RESIDUAL]
    stream = sum(powers) or math.inf
    result = {}
    for name, each in errors.items():
        relative = [e.error / e.power if e.power else 0.0 for e in each]
        if name not in inner:
            result[name] = [OUTPUT * r for r in relative]
            continue
        weight = STREAM / stream * sharing(kind_of(name), source.model)
        rest = OTHERS / len(inner)
        result[name] = [weight * e.error + rest * r for e, r in zip(each, relative)]
    return result


def solve(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice for every matrix: the least loss within `budget` bytes.

    Raises RequestError when even the smallest formats take more.

    >>> q4, q8 = blocks.get("Q4_0"), blocks.get("Q8_0")
    >>> both = {"a": [Choice(q4, 18, 1.0), Choice(q8, 34, 0.1)],
    ...         "b": [Choice(q4, 18, 9.0), Choice(q8, 34, 0.2)]}
    >>> {name: choice.format.name for name, choice in solve(both, 60).items()}
    {'a': 'Q4_0', 'b': 'Q8_0'}
    """
    least = sum(min(c.nbytes for c in each) for each in choices.values())
    if least > budget:
        raise RequestError(
            f"{budget} bytes for matrices: the smallest formats need {least}: raise --bpw or --size"
        )
    low, high = 0.0, 1.0  # price of a byte
    while _bytes(_at_price(choices, high)) > budget:
        low, high = high, high * 4
    for _ in range(100):
        middle = (low + high) / 2
        if _bytes(_at_price(choices, middle)) > budget:
            low = middle
        else:
            high = middle
    return _fill(choices, _at_price(choices, high), budget)


def _at_price(choices: Mapping[str, Sequence[Choice]], price: float) -> dict[str, Choice]:
    return {
        name: min(each, key=lambda c: (c.loss + price * c.nbytes, c.nbytes))
        for name, each in choices.items()
    }


def _bytes(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.nbytes for choice in chosen.values())


def _fill(
    choices: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], budget: int
) -> dict[str, Choice]:
    """Spend what is left on the steps that gain most per byte."""
    left = budget - _bytes(chosen)
    while True:
        steps = [
            ((chosen[name].loss - c.loss) / (c.nbytes - chosen[name].nbytes), name, c)
            for name, each in choices.items()
            for c in each
            if 0 < c.nbytes - chosen[name].nbytes <= left and c.loss < chosen[name].loss
        ]
        if not steps:
            return chosen
        _, name, best = max(steps, key=lambda step: step[:2])
        left -= best.nbytes - chosen[name].nbytes
        chosen[name] = best


def promote(
    choices: Mapping[str, Sequence[Choice]], chosen: Mapping[str, str]
) -> dict[str, Choice]:
    """The matrices that gain most from Q8_0 or F16, within OUTLIER_SHARE more bytes.

    chosen: the format that each has now, one of its choices.
    """
    now = {
        name: next(c for c in each if c.format.name == chosen[name])
        for name, each in choices.items()
    }
    better = {
        name: [c for c in each if c is now[name] or c.format.name in OUTLIER_FORMATS]
        for name, each in choices.items()
    }
    return _fill(better, dict(now), int(_bytes(now) * (1 + OUTLIER_SHARE)))


def to_recipe(
    formats: Mapping[str, str], name: str, about: str, weights: Mapping[str, int]
) -> Recipe:
    """Recipe that gives each matrix its format.

    weights: how many each has; the format with most of them is the base, and decides
    `file_type`.
    """
    counted: Counter[str] = Counter()
    for tensor, fmt in formats.items():
        counted[fmt] += weights[tensor]
    base = counted.most_common(1)[0][0]
    rules = tuple(Rule(tensors, fmt) for tensors, fmt in _patterns(formats) if fmt != base)
    return Recipe(name=name, file_type=_file_type(base), base=base, about=about, rule=rules)


def _file_type(base: str) -> int:
    """That of the shipped recipe with this base; of several, the middle one."""
    same = [recipe for recipe in map(Recipe.load, recipes()) if recipe.base == base]
    return (same[len(same) // 2] if same else Recipe.load("F16")).file_type


def _patterns(formats: Mapping[str, str]) -> list[tuple[str, str]]:
    """(pattern, format): the layers in which one kind of matrix has one format.

    >>> _patterns({f"blk.{i}.ffn_up.weight": "Q4_K" for i in (0, 2)})
    [('blk.{0,2}.ffn_up.weight', 'Q4_K')]
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for name, fmt in formats.items():
        layer, kind = split(name)
        layers.setdefault((kind, fmt), []).append("" if layer is None else str(layer))
    found = []
    for (kind, fmt), each in layers.items():
        one = each[0] if len(each) == 1 else "{" + ",".join(each) + "}"
        found.append((f"blk.{one}.{kind}" if each[0] else kind, fmt))
    return found
