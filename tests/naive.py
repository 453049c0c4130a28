"""Slow twins: the definition of each fast thing in plain loops, for comparison."""

import math
from collections.abc import Sequence

import numpy as np

Pairs = list[tuple[int, float]]  # (token id, logit)


def softmax(logits: Sequence[float]) -> list[float]:
    peak = max(logits)
    weights = [math.exp(x - peak) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def descending(pairs: Pairs) -> Pairs:
    return sorted(pairs, key=lambda pair: -pair[1])  # stable: among equals the first stays first


def penalize(
    logits: Sequence[float],
    history: Sequence[int],
    repeat: float,
    presence: float,
    frequency: float,
) -> list[float]:
    out = list(logits)
    for token in set(history):
        count = sum(1 for seen in history if seen == token)
        out[token] = out[token] * repeat if out[token] <= 0 else out[token] / repeat
        out[token] -= count * frequency + presence
    return out


def top_k(pairs: Pairs, k: int) -> Pairs:
    return descending(pairs)[:k] if k > 0 else pairs


def top_p(pairs: Pairs, p: float) -> Pairs:
    if p >= 1:
        return pairs
    kept: Pairs = []
    mass = 0.0
    ordered = descending(pairs)
    for pair, probability in zip(ordered, softmax([logit for _, logit in ordered]), strict=True):
        kept.append(pair)
        mass += probability
        if mass >= p:
            break
    return kept


def min_p(pairs: Pairs, p: float) -> Pairs:
    probabilities = softmax([logit for _, logit in pairs])
    best = max(probabilities)
    return [pair for pair, q in zip(pairs, probabilities, strict=True) if q >= p * best]


def temperature(pairs: Pairs, t: float) -> Pairs:
    return [(token, logit / t) for token, logit in pairs]


def draw(pairs: Pairs, u: float) -> int:
    mass = 0.0
    for (token, _), probability in zip(pairs, softmax([x for _, x in pairs]), strict=True):
        mass += probability
        if u < mass:
            return token
    return pairs[-1][0]


# -- kernels: tokens, heads and positions in plain loops, float64 --------------------------------


def quantize32(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """(int8 codes, scale) of 32 f32 values: largest magnitude / 127, round half to even."""
    peak = np.max(np.abs(x))
    inverse = np.float32(127) / peak if peak > np.float32(1e-30) else np.float32(0)
    codes = [int(np.rint(np.float32(value * inverse))) for value in x]
    return np.array(codes, np.int8), np.float32(peak * np.float32(1 / 127))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    mean = math.fsum(float(v) ** 2 for v in x) / len(x)
    return np.array([float(v) / math.sqrt(mean + eps) * float(w) for v, w in zip(x, weight)])


def silu_gate(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.array([float(g) / (1 + math.exp(-float(g))) * float(u) for g, u in zip(gate, up)])


def rotate(row: np.ndarray, angles: np.ndarray, step: int, gap: int) -> np.ndarray:
    """Pair i is (i·step, i·step + gap), turned by angles[i]; the rest stays."""
    out = np.array(row, np.float64)
    for i, angle in enumerate(angles):
        a, b = out[i * step], out[i * step + gap]
        out[i * step] = a * math.cos(angle) - b * math.sin(angle)
        out[i * step + gap] = a * math.sin(angle) + b * math.cos(angle)
    return out


def hadamard(x: np.ndarray, size: int) -> np.ndarray:
    """Blocks of `size` of the last axis times the matrix of signs (-1)^(bits that i and j share),
    divided by the root of size.
    """
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)]
    blocks = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, size)
    return (blocks @ np.array(signs) / math.sqrt(size)).reshape(x.shape)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """uint16: the upper half of f32 values, rounded to nearest even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def kv_block(kind: str, x: np.ndarray) -> tuple[np.ndarray, np.float16]:
    """(codes, scale) of 32 f32 values: q8_0 -127..127; q4_0 0..15, of which 8 are taken off again;
    the scale is rounded first, then the codes to nearest even.
    """
    with np.errstate(over="ignore"):
        if kind == "q8_0":
            scale = np.float16(np.max(np.abs(x)) * np.float32(1 / 127))
            low, high, shift = -127, 127, 0
        else:
            scale = np.float16(x[np.argmax(np.abs(x))] / np.float32(-8))
            low, high, shift = -8, 7, 8
    inverse = np.float32(1) / np.float32(scale) if scale else np.float32(0)
    codes = [min(max(int(np.rint(v * inverse)), low), high) + shift for v in x]
    return np.array(codes), scale


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int) -> np.ndarray:
    """q [tokens, heads, dim] from `position` on, over k, v [positions, kv_heads, dim]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    share = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = slice(position + t + 1)
            weights = softmax(k[seen, h // share] @ q[t, h])
            out[t, h] = np.array(weights) @ v[seen, h // share]
    return out


def feed_back(
    w: Sequence[float], hessian: np.ndarray, steps: Sequence[float], limits: tuple[int, int]
) -> list[int]:
    """Codes of one row, each rounded when its turn comes: optimal brain surgery by its definition.

    After a weight is fixed, the best change of all later ones is found by solving for them.
    """
    left, codes = np.array(w, np.float64), list[int]()
    for j, step in enumerate(steps):
        code = int(min(max(np.rint(left[j] / step), limits[0]), limits[1]))
        codes.append(code)
        later = slice(j + 1, None)
        miss = left[j] - code * step
        if j + 1 < len(left):
            left[later] += np.linalg.solve(hessian[later, later], hessian[later, j]) * miss
    return codes
