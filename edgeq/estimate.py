"""Numbers that come from a sample, with their uncertainty."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "covariance", "mean", "percentile", "plain", "share", "wilson"]

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value ± one standard error; NaN where the sample is too small for one.

    >>> print(Estimate(8.6443, 0.0512))
    8.6443 ± 0.0512
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"

    def exp(self) -> "Estimate":
        """exp of the value; the error to first order.

        >>> Estimate(0.0, 0.5).exp()
        Estimate(value=1.0, error=0.5)
        """
        value = math.exp(min(self.value, 700.0))  # beyond lies infinity
        return Estimate(value, value * self.error)


def mean(values: Values) -> Estimate:
    """Mean of values [n] and its standard error.

    >>> print(mean(np.array([1.0, 2.0, 3.0])))
    2.0000 ± 0.5774
    """
    return Estimate(float(values.mean()), math.sqrt(covariance(values, values)))


def covariance(a: Values, b: Values) -> float:
    """Covariance of the means of a [n] and b [n], which are measured at the same places.

    >>> round(covariance(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), 4)
    0.6667
    """
    if len(a) < 2:
        return math.nan
    return float(((a - a.mean()) * (b - b.mean())).mean() / (len(a) - 1))


def share(hits: int, count: int) -> Estimate:
    """The share hits / count of a yes-or-no property.

    >>> share(1, 2)
    Estimate(value=0.5, error=0.5)
    """
    part = hits / count
    return Estimate(part, math.sqrt(part * (1 - part) / (count - 1)) if count > 1 else math.nan)


def percentile(values: Values, *parts: float) -> list[float]:
    """Values below which these percentages of them lie, interpolated linearly.

    >>> percentile(np.array([0.0, 1.0, 2.0]), 50, 75, 100)
    [1.0, 1.5, 2.0]
    """
    return [float(value) for value in np.percentile(values, parts)]


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (95 %) of the probability behind hits of count; (0, 1) for none.

    E. B. Wilson, J. Am. Stat. Assoc. 22, 209 (1927). Unlike ± it stays inside 0..1.

    >>> [round(x, 4) for x in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if not count:
        return 0.0, 1.0
    part, weight = hits / count, z * z / count
    centre = (part + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * math.sqrt(part * (1 - part) / count + weight / (4 * count))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def plain(value: Any) -> Any:
    """What JSON can hold: dataclasses as tables, tuples as lists, NaN and infinity as None.

    >>> plain({"loss": Estimate(1.0, math.nan)})
    {'loss': {'value': 1.0, 'error': None}}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
