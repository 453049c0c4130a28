"""What a model would need and do on a machine: memory, tokens per second, what limits them.

A token reads every weight once and multiplies with each: of the two the slower counts. Where both
are about as fast they are in each other's way, as a power mean of their times says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from edgeq import cache
from edgeq.blueprint import Blueprint, File
from edgeq.errors import RequestError
from edgeq.models.arch import Arch
from edgeq.rates import Rates, fastest, seconds, slower

__all__ = ["CONTEXT", "Efficiency", "Row", "Speed", "closest", "predict", "recommended", "rows"]

CONTEXT = 4096  # positions, where the model was trained on so many and none are asked for
PROMPT = 512  # tokens
# The rest of a layer, in terms of what kernels of floats do: multiply-adds of attention cost what
# those of an F16 matrix do, times this; each value that is normed, gated or quantized so many.
ATTENTION_ROW, ATTENTION_TILE, VALUE = 1.4, 1.3, 40.0
OP = 1.5e-6  # seconds to start an operation of a layer and meet the other threads
OPS = 10  # operations of a layer
GOOD = 0.004  # divergence of the example model up to which a loss is hard to notice


# Of an engine that is not this one: its share of the bandwidth when it generates, and of the
# machine's 8-bit dot products with prompts, None where that is not known.
Efficiency = tuple[float, float | None]


@dataclass(frozen=True)
class Speed:
    """Tokens per second, and what holds them up."""

    tokens: float
    limit: Literal["memory", "compute", "attention"]


@dataclass(frozen=True)
class Row:
    """A file on a machine; None: not known."""

    file: File
    context: int | None  # positions that `ram` is for
    ram: int | None  # bytes
    fits: bool
    largest: int | None  # positions that fit
    prefill: Speed | None
    decode: Speed | None
    threads: int | None = None  # of generation


def rows(
    blueprint: Blueprint,
    rates: Rates | None,
    isa: ModuleType,
    ram: int,
    *,
    ctx: int | None = None,
    kv: tuple[str, str] = ("f16", "f16"),
    depth: int = 0,
    efficiency: Efficiency | None = None,
) -> list[Row]:
    """A row per file of a model. ram: bytes that it may take. depth: tokens in the cache when
    speed is predicted. efficiency: see `predict`.

    Raises RequestError for a context that the model was not trained on, and a depth beyond it.
    """
    arch = blueprint.arch
    if arch is None:
        return [Row(f, None, None, f.nbytes < ram, None, None, None) for f in blueprint.files]
    if ctx is not None and ctx > arch.context_length:
        raise RequestError(
            f"context {ctx}: {blueprint.name} was trained on {arch.context_length} positions: "
            f"use -c {arch.context_length} or less"
        )
    context = ctx or min(CONTEXT, arch.context_length)
    if depth >= context:
        raise RequestError(
            f"depth {depth}: {blueprint.name} would have a context of {context} positions: "
            f"use -d {context - 1} or less, or a larger -c"
        )
    found = []
    for file in blueprint.files:
        # Of another engine only the share of what memory gives at most is known.
        own = fastest(file.matrices, rates) if rates and not efficiency else rates
        threads = own.threads if own else (1, 1)
        need = file.ram(context, kv, threads, isa)
        largest = file.largest_context(ram, kv, threads, isa)
        prefill, decode = predict(file, own, kv, depth, efficiency) if own else (None, None)
        few = own.threads[0] if own else None
        found.append(Row(file, context, need, need <= ram, largest, prefill, decode, few))
    return found


def predict(
    file: File,
    rates: Rates,
    kv: tuple[str, str] = ("f16", "f16"),
    depth: int = 0,
    efficiency: Efficiency | None = None,
) -> tuple[Speed | None, Speed]:
    """Speed of a prompt of PROMPT tokens and of generation, after `depth` tokens.

    With an efficiency nothing else is counted. Raises RequestError for one after a depth, which it
    says nothing of.
    """
    if file.arch is None:
        raise RequestError(f"{file.recipe}: its architecture is not supported: no prediction")
    if efficiency is not None:
        if depth:
            raise RequestError(f"depth {depth}: shares of an engine say nothing of it: use -d 0")
        return _told(file, rates, efficiency)
    return _prefill(file, file.arch, rates, depth), _decode(file, file.arch, rates, kv, depth)


def _told(file: File, rates: Rates, efficiency: Efficiency) -> tuple[Speed | None, Speed]:
    read = sum(m.rows * m.row_bytes for m in file.matrices) / 1e9
    macs = sum(m.rows * m.cols for m in file.matrices[:-1]) / 1e9
    decode, prefill = efficiency
    prompt = Speed(prefill * rates.dot / macs, "compute") if prefill and rates.dot else None
    return prompt, Speed(decode * rates.read / read, "memory")


def _tile_seconds(file: File, rates: Rates) -> float | None:
    """Seconds per token of a prompt in panel kernels; the head is not needed."""
    body = file.matrices[:-1]
    if any(m.format.name not in rates.tile for m in body):
        return None
    return sum(m.rows * m.cols / rates.tile[m.format.name] for m in body) / 1e9


def _prefill(file: File, arch: Arch, rates: Rates, depth: int) -> Speed | None:
    tiles = _tile_seconds(file, rates)
    if tiles is None:
        return None
    floats = rates.tile.get("F16", 0.0) * 1e9
    seen = depth + PROMPT / 2
    attention = ATTENTION_TILE * _attended(arch) * seen / floats if floats else 0.0
    rest = VALUE * _values(arch) / floats if floats else 0.0
    read = sum(m.rows * m.row_bytes for m in file.matrices[:-1]) / rates.read / 1e9 / PROMPT
    tokens = 1 / (read + tiles + rest + attention)
    if attention > tiles + rest:
        return Speed(tokens, "attention")
    return Speed(tokens, "memory" if read > tiles + rest else "compute")


def _decode(file: File, arch: Arch, rates: Rates, kv: tuple[str, str], depth: int) -> Speed:
    reading, computing, both = seconds(file.matrices, rates)
    floats = rates.row.get("F16", 0.0) * 1e9
    kept = cache.bytes_per_position(arch, kv) * depth / rates.read / 1e9
    attention = ATTENTION_ROW * _attended(arch) * depth / floats if floats else 0.0
    rest = OP * OPS * arch.block_count
    rest += VALUE * _values(arch) / floats if floats else 0.0
    total = both + slower(kept, attention) + rest
    if attention > both:
        return Speed(1 / total, "attention")
    return Speed(1 / total, "memory" if reading > computing else "compute")


def _attended(arch: Arch) -> int:
    """Multiply-adds of a token with one position, keys and values, all layers."""
    return 2 * arch.block_count * arch.head_count * arch.head_dim


def _values(arch: Arch) -> int:
    """Values of a token that are no part of a product: normed, rotated, gated, quantized."""
    heads = (arch.head_count + arch.head_count_kv) * arch.head_dim
    return arch.block_count * (2 * arch.embedding_length + 2 * arch.feed_forward_length + heads)


def recommended(found: Sequence[Row]) -> tuple[Row, str] | None:
    """The row to take, and why; None when nothing fits, or the engine cannot run the model.

    Of those that fit: the smallest of which a loss is hard to notice; where none is that good, the
    one that loses least.
    """
    fitting = [row for row in found if row.fits and row.file.arch]
    known = [row for row in fitting if row.file.divergence is not None]
    good = [row for row in known if (row.file.divergence or 0.0) <= GOOD]
    if good:
        return min(good, key=_size), "the smallest that fits of which a loss is hard to notice"
    if known:
        return min(known, key=lambda row: row.file.divergence or 0.0), (
            "of those that fit the one that loses least"
        )
    return (min(fitting, key=_size), "it fits") if fitting else None


def closest(found: Sequence[Row]) -> Row | None:
    """Where nothing fits with the context asked for, the row that fits with the largest; None when
    nothing fits with any.
    """
    row = max(found, key=lambda row: row.largest or 0, default=None)
    return row if row and row.largest else None


def _size(row: Row) -> int:
    return row.file.nbytes
