"""What an importance matrix says about each tensor and each layer, in llama-imatrix's terms.

Sum, mean, deviation, least and greatest of E[x²] per channel; entropy of its distribution over the
channels, in bits and as a share of the most there can be (low: a few channels matter); ZD, the
share of channels more than one deviation from the mean; the cosine between a tensor's channels and
those of the same tensor one layer before (llama.cpp, tools/imatrix, --show-statistics). Layers are
described by sums and means over their tensors.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.gguf.names import split
from edgeq.imatrix import Imatrix

__all__ = ["Layer", "Tensor", "layers", "tensors"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tensor:
    """E[x²] of one tensor's input channels; experts without tokens are left out."""

    name: str
    layer: int | None  # None outside the blocks
    sum: float
    min: float
    max: float
    mean: float
    deviation: float
    channels: int
    entropy: float  # bits
    evenness: float  # entropy relative to log2(channels), 0..1
    zd: float  # 0..1
    cosine: float | None  # None where no such tensor is in the layer before


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensors of one layer together."""

    layer: int
    sum: float
    zd: float
    cosine: float | None


def tensors(imatrix: Imatrix) -> list[Tensor]:
    """Statistics of every tensor, by kind of tensor and layer.

    >>> sums = {f"blk.{i}.ffn_up.weight": np.array([[1, 1, 2]], np.float32) for i in range(2)}
    >>> counts = {name: np.ones(1, np.float32) for name in sums}
    >>> last = tensors(Imatrix(sums, counts))[-1]
    >>> last.sum, last.entropy, round(last.zd, 2), round(last.cosine, 6)
    (4.0, 1.5, 0.33, 1.0)
    """
    means = _means(imatrix)
    found = (_tensor(name, means) for name, values in means.items() if values.any(axis=1).any())
    return sorted(found, key=lambda t: (split(t.name)[1], -1 if t.layer is None else t.layer))


def layers(imatrix: Imatrix) -> list[Layer]:
    """Statistics of every layer."""
    means, by_layer = _means(imatrix), dict[int, list[Tensor]]()
    for tensor in tensors(imatrix):
        if tensor.layer is not None:
            by_layer.setdefault(tensor.layer, []).append(tensor)
    return [_layer(number, by_layer[number], means) for number in sorted(by_layer)]


def _means(imatrix: Imatrix) -> dict[str, Array]:
    """E[x²] as float64 [n_mat, n_in]; zero where no token was seen."""
    counts = {name: np.asarray(c, np.float64)[:, None] for name, c in imatrix.counts.items()}
    return {
        name: np.divide(sums, counts[name], out=np.zeros(sums.shape), where=counts[name] > 0)
        for name, sums in imatrix.sums.items()
    }


def _tensor(name: str, means: Mapping[str, Array]) -> Tensor:
    rows = means[name]
    values = rows[rows.any(axis=1)].reshape(-1)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    p = values[values > 0] / values.sum()
    entropy = max(float(-(p * np.log2(p)).sum()), 0.0)
    far = np.abs(values - values.mean()) > deviation if deviation else np.zeros(1)
    return Tensor(
        name=name,
        layer=split(name)[0],
        sum=float(values.sum()),
        min=float(values.min()),
        max=float(values.max()),
        mean=float(values.mean()),
        deviation=deviation,
        channels=len(values),
        entropy=entropy,
        evenness=entropy / math.log2(len(values)) if len(values) > 1 else 0.0,
        zd=float(far.mean()),
        cosine=_cosine([name], means),
    )


def _layer(number: int, of: Sequence[Tensor], means: Mapping[str, Array]) -> Layer:
    channels = sum(tensor.channels for tensor in of)
    zd = sum(tensor.zd * tensor.channels for tensor in of) / channels
    cosine = _cosine([tensor.name for tensor in of], means)
    return Layer(number, sum(tensor.sum for tensor in of), zd, cosine)


def _cosine(names: Iterable[str], means: Mapping[str, Array]) -> float | None:
    """Cosine between these tensors' channels, end to end, and those of the layer before."""
    pairs = [(means[name], means.get(_before(name))) for name in names]
    both = [(a.reshape(-1), b.reshape(-1)) for a, b in pairs if b is not None and a.size == b.size]
    if not both:
        return None
    a, b = (np.concatenate(side) for side in zip(*both, strict=True))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _before(name: str) -> str:
    layer, kind = split(name)
    return f"blk.{layer - 1}.{kind}" if layer else ""
