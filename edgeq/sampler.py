"""Choosing the next token: penalties, top-k, top-p, min-p, temperature, in llama.cpp's order.

Every step is a pure function from `Candidates` to `Candidates` (or logits to logits), so that a
step can be tested, dropped or reordered by itself. A vocabulary of 150,000 costs a few passes over
float32; only the few survivors are sorted or turned into float64 probabilities.

>>> import numpy as np
>>> logits = np.array([1.0, 3.0, 2.0, -4.0], np.float32)
>>> top_k(everything(logits), 2).ids.tolist()
[1, 2]
>>> Sampler(temperature=0.0).start().sample(logits, history=[])
1
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import FormatError, ModelError, RequestError

__all__ = [
    "Candidates",
    "Sampler",
    "SamplerState",
    "draw",
    "everything",
    "greedy",
    "min_p",
    "penalize",
    "temperature",
    "top_k",
    "top_p",
]

Logits = NDArray[np.floating[Any]]
Ids = NDArray[np.int64]

# Logits per block maximum in `_largest`.
_BLOCK = 64


class Candidates(NamedTuple):
    """Tokens still in play: ids int64 [n] and their logits [n], same order; n >= 1."""

    ids: Ids
    logits: Logits


def everything(logits: Logits) -> Candidates:
    """The whole vocabulary as candidates. logits: [vocab]."""
    return Candidates(np.arange(logits.size), logits)


def check(logits: Logits) -> None:
    """Refuse logits [vocab] from which no token can be chosen.

    Raises: ModelError when they are empty, hold a NaN or +inf, or are all -inf.
    """
    if logits.ndim != 1 or logits.size == 0:
        raise ModelError(f"logits: shape {logits.shape}: expected one non-empty row [vocab]")
    peak = float(logits.max())  # NaN wins over every number
    if not math.isfinite(peak):
        found = "only -inf" if peak == -math.inf else "NaN" if math.isnan(peak) else "+inf"
        raise ModelError(
            f"logits: found {found}: the model computes no usable number; "
            "check the file with `edgeq inspect --verify`"
        )


def penalize(
    logits: Logits,
    history: Sequence[int],
    *,
    repeat: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> Logits:
    """Lower the logits [vocab] of tokens in `history`; returns a copy if anything changes.

    repeat divides a positive logit and multiplies a negative one (Keskar et al. 2019,
    arXiv:1909.05858); presence is subtracted once, frequency once per occurrence.

    >>> logits = np.array([2.0, -2.0, 1.0])
    >>> penalize(logits, [0, 0, 1], repeat=2.0, presence=0.5, frequency=1.0).tolist()
    [-1.5, -5.5, 1.0]
    """
    if not len(history) or (repeat == 1.0 and presence == 0.0 and frequency == 0.0):
        return logits
    ids, counts = np.unique(np.asarray(history, np.int64), return_counts=True)
    seen = logits[ids]
    out = logits.copy()
    out[ids] = np.where(seen <= 0, seen * repeat, seen / repeat) - (counts * frequency + presence)
    return out


def top_k(c: Candidates, k: int) -> Candidates:
    """Keep the k largest, sorted descending, among equals the first. k = 0 keeps all."""
    if k <= 0:
        return c
    best = _largest(c.logits, min(k, c.logits.size))
    return Candidates(c.ids[best], c.logits[best])


def top_p(c: Candidates, p: float) -> Candidates:
    """Keep the most likely tokens up to a total probability of p, at least one, sorted descending.

    Holtzman et al. 2020, arXiv:1904.09751. p = 1 keeps all, in the order given.
    """
    if p >= 1.0:
        return c
    weight = np.exp(c.logits - c.logits.max())
    total = float(weight.sum(dtype=np.float64))
    # All tokens below this weight together hold less than 1 - p: the border lies above, so only
    # the rest, a small part of a real vocabulary, is sorted.
    head = np.flatnonzero(weight >= (1.0 - p) * total / weight.size)
    order = head[np.argsort(-c.logits[head], kind="stable")]
    mass = np.cumsum(weight[order], dtype=np.float64)
    count = min(int(np.searchsorted(mass, p * total)) + 1, order.size)
    return Candidates(c.ids[order[:count]], c.logits[order[:count]])


def min_p(c: Candidates, p: float) -> Candidates:
    """Keep tokens at least p times as likely as the best (arXiv:2407.01082). p = 0 keeps all."""
    if p <= 0.0:
        return c
    keep = np.flatnonzero(c.logits >= c.logits.max() + math.log(p))
    return Candidates(c.ids[keep], c.logits[keep])


def temperature(c: Candidates, t: float) -> Candidates:
    """Divide the logits by t > 0: above 1 flattens the distribution, below 1 sharpens it."""
    # The peak is taken off first: a tiny t then gives -inf for the losers, never +inf to the best.
    with np.errstate(over="ignore"):
        return Candidates(c.ids, (c.logits - c.logits.max()).astype(np.float64) / t)


def greedy(logits: Logits) -> int:
    """Id of the largest logit; the lowest id among equals."""
    return int(np.argmax(logits))


def draw(c: Candidates, u: float) -> int:
    """The candidate at position u in [0, 1) of the cumulative softmax of c.logits.

    >>> coin = Candidates(np.array([7, 9]), np.array([0.0, 0.0]))
    >>> [draw(coin, u) for u in (0.0, 0.49, 0.51, 0.999)]
    [7, 7, 9, 9]
    """
    total = np.cumsum(np.exp(c.logits.astype(np.float64) - c.logits.max()))
    at = int(np.searchsorted(total, u * total[-1], side="right"))
    return int(c.ids[min(at, c.ids.size - 1)])


def _largest(values: Logits, k: int) -> Ids:
    """Positions of the k largest values, descending; equal values in ascending position."""
    blocks = values.size // _BLOCK
    pool = values
    if k <= blocks:
        # The k-th largest of the block maxima is a lower bound of the k-th largest value: what is
        # below it is out without being partitioned or sorted.
        pool = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    bound = np.partition(pool, pool.size - k)[pool.size - k]
    left = np.flatnonzero(values >= bound)
    order: Ids = left[np.argsort(-values[left], kind="stable")[:k]]
    return order


_MAX_COUNT = 2**31 - 1
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, _MAX_COUNT),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),
    "repeat_last_n": (-1, _MAX_COUNT),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "seed": (0, 2**64 - 1),
}
_INTEGERS = {"top_k", "repeat_last_n", "seed"}

# Names under which llama.cpp's converter stores a model's own defaults.
_METADATA = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
    "repeat_last_n": "general.sampling.penalty_last_n",
}


@dataclass(frozen=True, slots=True)
class Sampler:
    """Settings; the defaults are llama.cpp's.

    >>> Sampler(top_p=3.0).validate()
    Traceback (most recent call last):
        ...
    edgeq.errors.RequestError: top_p 3.0: expected a number from 0 to 1
    """

    temperature: float = 0.8  # 0 = greedy
    top_k: int = 40  # 0 = off
    top_p: float = 0.95  # 1 = off
    min_p: float = 0.05  # 0 = off
    repeat_penalty: float = 1.0  # 1 = off
    repeat_last_n: int = 64  # tokens the three penalties look back; 0 = off, -1 = all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None = different every time

    def validate(self) -> None:
        """Raises: RequestError naming the first setting that is not a number in its range."""
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not _within(value, name in _INTEGERS, low, high):
                kind = "an integer" if name in _INTEGERS else "a number"
                raise RequestError(f"{name} {value!r}: expected {kind} from {_range(name)}")

    def start(self) -> "SamplerState":
        """A new sequence of random draws under these settings. Raises: RequestError."""
        self.validate()
        return SamplerState(self)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], **given: Any) -> Self:
        """Settings for a model: a `given` value (not None), else the file's, else the default.

        metadata: GGUF key -> value, of which `general.sampling.*` is read.
        Raises: FormatError for an unusable value in the file, RequestError for one that was given.

        >>> stored = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
        >>> s = Sampler.from_metadata(stored, top_k=5)
        >>> s.temperature, s.top_k, s.top_p
        (0.5, 5, 0.95)
        """
        given = {name: value for name, value in given.items() if value is not None}
        unknown = given.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise RequestError(f"sampling: unknown setting {sorted(unknown)[0]!r}")
        stored = {
            name: _stored(metadata, name, key)
            for name, key in _METADATA.items()
            if key in metadata and name not in given
        }
        sampler = cls(**stored, **given)
        sampler.validate()
        return sampler


@dataclass(slots=True)
class SamplerState:
    """Settings and the random generator of one answer: the same seed gives the same draws."""

    sampler: Sampler
    rng: np.random.Generator

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.rng = np.random.default_rng(sampler.seed)

    def sample(self, logits: Logits, history: Sequence[int]) -> int:
        """The next token id. logits: float32 [vocab], kept; history: ids so far, with the prompt.

        Raises: ModelError for logits that are empty, all -inf, or hold a NaN or +inf.
        """
        s = self.sampler
        with np.errstate(over="ignore"):
            logits = penalize(
                logits,
                _recent(history, s.repeat_last_n),
                repeat=s.repeat_penalty,
                presence=s.presence_penalty,
                frequency=s.frequency_penalty,
            )
            check(logits)
            if s.temperature == 0.0:
                return greedy(logits)
            left = min_p(top_p(top_k(everything(logits), s.top_k), s.top_p), s.min_p)
            return draw(temperature(left, s.temperature), self.rng.random())


def _recent(history: Sequence[int], n: int) -> Sequence[int]:
    return history if n < 0 else history[max(0, len(history) - n) :]


def _within(value: Any, integer: bool, low: float, high: float) -> bool:
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    # NaN fails both comparisons, and bool is an int to Python but not to a user.
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(low <= value <= high)


def _range(name: str) -> str:
    """The range of a setting in words; large integers in full.

    >>> _range("seed"), _range("top_p")
    ('0 to 18446744073709551615', '0 to 1')
    """
    return " to ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in _RANGES[name])


def _stored(metadata: Mapping[str, Any], name: str, key: str) -> Any:
    value = metadata[key]
    low, high = _RANGES[name]
    if name == "top_k" and _within(value, True, -1, -1):
        return 0  # "all" as other tools write it
    if not _within(value, name in _INTEGERS, low, high):
        raise FormatError(
            f"{key} {value!r}: expected a number from {_range(name)}; set {name} yourself"
        )
    return value
