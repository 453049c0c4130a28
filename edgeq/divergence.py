"""How far a model's predictions are from a reference's: the statistics of llama-perplexity.

The same numbers as `llama-perplexity --kl-divergence` prints, without its file of 16-bit
log-probabilities, which cut the reference's off at 16 nats below the most likely token.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.estimate import Estimate, covariance, mean, percentile, share

__all__ = ["Divergence", "Scores", "likelihood", "pair"]

CELLS = 1 << 18  # logits at a time: the float64 copies of so many stay in the cache
KLD_PERCENTS = (100, 99.9, 99, 95, 90, 50, 10, 5, 1, 0.1, 0)
DP_PERCENTS = (100, 99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1, 0)

Logits = NDArray[np.float32]
Values = NDArray[np.float64]


def _normalised(logits: Logits) -> tuple[Values, Values, Values]:
    """Logits [n, vocab] below their maximum, exp of them, and ln of its sums [n]."""
    below = logits.astype(np.float64)
    below -= below.max(axis=1, keepdims=True)
    powers = np.exp(below)
    return below, powers, np.log(powers.sum(axis=1))


def _blocks(n: int, vocab: int) -> Iterator[slice]:
    rows = max(CELLS // vocab, 1)
    return (slice(i, i + rows) for i in range(0, n, rows))


def likelihood(logits: Logits, targets: Sequence[int]) -> Values:
    """ln p of each target: logits [n, vocab], targets [n] → float64 [n].

    >>> likelihood(np.zeros((1, 4), np.float32), [2]).round(4)
    array([-1.3863])
    """
    found, wanted = np.empty(len(targets)), np.asarray(targets)
    for rows in _blocks(*logits.shape):
        below, _, total = _normalised(logits[rows])
        found[rows] = np.take_along_axis(below, wanted[rows, None], 1)[:, 0] - total
    return found


@dataclass(frozen=True, slots=True)
class Scores:
    """Of n predicted tokens: -ln p under the model and under the reference, KL divergence from the
    reference in nats (float64 [n] each), and whether both find the same token most likely [n].
    """

    nll: Values
    nll_base: Values
    kld: Values
    same_top: NDArray[np.bool_]

    @staticmethod
    def join(parts: Sequence["Scores"]) -> "Scores":
        """One after the other."""
        names = ("nll", "nll_base", "kld", "same_top")
        return Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def pair(logits: Logits, base: Logits, targets: Sequence[int]) -> Scores:
    """Scores of a model's logits [n, vocab] beside a reference's, for targets [n].

    >>> pair(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), [2]).kld
    array([0.])
    """
    n, wanted = len(targets), np.asarray(targets)
    nll, nll_base, kld, same = (np.empty(n) for _ in range(4))
    for rows in _blocks(*logits.shape):
        below, _, total = _normalised(logits[rows])
        below_base, powers, total_base = _normalised(base[rows])
        at = wanted[rows, None]
        nll[rows] = total - np.take_along_axis(below, at, 1)[:, 0]
        nll_base[rows] = total_base - np.take_along_axis(below_base, at, 1)[:, 0]
        # Sum p (ln p - ln q); the sums of powers are taken out of it.
        apart = np.einsum("nv,nv->n", powers, below_base - below)
        kld[rows] = apart / np.exp(total_base) + total - total_base
        same[rows] = logits[rows].argmax(axis=1) == base[rows].argmax(axis=1)
    return Scores(nll, nll_base, kld, same > 0)


@dataclass(frozen=True, slots=True)
class Divergence:
    """What `llama-perplexity --kl-divergence` reports, in its order. Errors are standard errors;
    those of ratio and difference know that both models saw the same text.

    dp is the change of the probability of the text's own token, in percent; its percentiles and
    those of kld are lists of (percent, value), the first the maximum, the last the minimum.
    """

    ppl: Estimate
    ppl_base: Estimate
    correlation: float  # of ln PPL and ln PPL(base), in percent
    ln_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    kld: Estimate
    kld_percentiles: tuple[tuple[float, float], ...]
    dp: Estimate
    dp_percentiles: tuple[tuple[float, float], ...]
    dp_rms: Estimate
    same_top: Estimate  # percent

    @staticmethod
    def of(scores: Scores) -> "Divergence":
        """Statistics of these scores."""
        log, log_base = mean(scores.nll), mean(scores.nll_base)
        shared = covariance(scores.nll, scores.nll_base)
        spread = log.error * log_base.error
        log_ratio = mean(scores.nll - scores.nll_base)
        ppl, ppl_base = log.exp(), log_base.exp()
        variance = ppl.error**2 + ppl_base.error**2 - 2 * ppl.value * ppl_base.value * shared
        dp = 100 * (np.exp(-scores.nll) - np.exp(-scores.nll_base))
        same = share(int(scores.same_top.sum()), len(scores.nll))
        return Divergence(
            ppl=ppl,
            ppl_base=ppl_base,
            correlation=100 * shared / spread if spread else math.nan,
            ln_ratio=log_ratio,
            ratio=log_ratio.exp(),
            difference=Estimate(ppl.value - ppl_base.value, _root(variance)),
            kld=mean(scores.kld),
            kld_percentiles=_percentiles(scores.kld, KLD_PERCENTS),
            dp=mean(dp),
            dp_percentiles=_percentiles(dp, DP_PERCENTS),
            dp_rms=_rms(dp),
            same_top=Estimate(100 * same.value, 100 * same.error),
        )


def _root(variance: float) -> float:
    """Rounding may leave a zero below zero."""
    return math.sqrt(variance) if not variance < 0 else 0.0


def _percentiles(values: Values, percents: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    return tuple(zip(percents, percentile(values, *percents), strict=True))


def _rms(values: Values) -> Estimate:
    square = mean(values**2)
    root = math.sqrt(square.value)
    return Estimate(root, square.error / (2 * root) if root else 0.0)
