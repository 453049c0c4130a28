"""Quantized checkpoints for tests, packed bit by bit the slow way; nothing is shared with edgeq.

Each packer gives the tensors of one matrix, by the ends of their names, and its weights in float64.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_checkpoint import Raw, bf16, f32, random_weights, write_safetensors

Packed = tuple[dict[str, Raw], NDArray[np.float64]]


def f16(array: Any) -> Raw:
    values = np.asarray(array, np.float16)
    return "F16", values.shape, values.tobytes()


def integers(kind: str, array: Any) -> Raw:
    """Entry of a tensor of integers, kind such as "I32"."""
    size = int(kind[1:]) // 8
    values = np.asarray(array, np.int64)
    raw = b"".join((int(v) % 256**size).to_bytes(size, "little") for v in values.reshape(-1))
    return kind, values.shape, raw


def words(codes: list[int], bits: int) -> list[int]:
    """Codes of `bits` bits in 32-bit words, lowest bits first, across the ends of words."""
    chain = 0
    for i, code in enumerate(codes):
        assert 0 <= code < 1 << bits
        chain |= code << (i * bits)
    return [chain >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


def pack_rows(codes: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Each row of [n, m] in words: [n, m * bits / 32]."""
    return np.array([words([int(c) for c in row], bits) for row in codes], np.int64)


def gptq(
    rng: np.random.Generator,
    shape: tuple[int, int],
    bits: int = 4,
    size: int = 32,
    symmetric: bool = True,
    version: int = 1,
    order: bool = False,
    index: bool = True,
) -> Packed:
    """order: columns in a random order of groups, as after desc_act."""
    rows, cols = shape
    groups = -(-cols // size)
    q = rng.integers(0, 1 << bits, shape)
    scale = (rng.random((rows, groups)) * 0.05 + 0.01).astype(np.float16)
    zero = np.full((rows, groups), 1 << (bits - 1))
    if not symmetric:
        zero = rng.integers(0, 1 << bits, (rows, groups))
    group = np.arange(cols) // size
    if order:
        group = rng.permutation(group)
    stored = (zero - 1) % (1 << bits) if version == 1 else zero
    tensors = {
        "qweight": integers("I32", pack_rows(q, bits).T),
        "qzeros": integers("I32", pack_rows(stored.T, bits)),
        "scales": f16(scale.T),
    }
    if index:
        tensors["g_idx"] = integers("I32", group)
    return tensors, (q - zero[:, group]) * scale.astype(np.float64)[:, group]


def awq(rng: np.random.Generator, shape: tuple[int, int], size: int = 32) -> Packed:
    rows, cols = shape
    group = np.arange(cols) // size
    q, zero = rng.integers(0, 16, shape), rng.integers(0, 16, (rows, cols // size))
    scale = (rng.random((rows, cols // size)) * 0.05 + 0.01).astype(np.float16)

    def interleaved(codes: NDArray[np.int64]) -> NDArray[np.int64]:
        packed = np.zeros((codes.shape[0], codes.shape[1] // 8), np.int64)
        for i, j in np.ndindex(packed.shape):
            for nibble, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[i, j] |= int(codes[i, 8 * j + place]) << (4 * nibble)
        return packed

    tensors = {
        "qweight": integers("I32", interleaved(q.T)),
        "qzeros": integers("I32", interleaved(zero.T)),
        "scales": f16(scale.T),
    }
    return tensors, (q - zero[:, group]) * scale.astype(np.float64)[:, group]


def four_bits(
    rng: np.random.Generator, shape: tuple[int, int], kind: str = "nf4", double: bool = False
) -> Packed:
    """bitsandbytes NF4 or FP4, blocks of 64, with double quantization blocks of 4 blocks."""
    count, block, outer = shape[0] * shape[1], 64, 4
    table = np.sort(rng.standard_normal(16)).astype(np.float32)
    codes = rng.integers(0, 16, count)
    padded = [*codes, 0] if count % 2 else list(codes)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "shape": list(shape)}
    tensors = {
        "weight": integers("U8", [[a << 4 | b] for a, b in zip(padded[::2], padded[1::2])]),
        "weight.quant_map": f32(table),
    }
    blocks = -(-count // block)
    if double:
        inner = rng.integers(0, 256, blocks)
        levels = np.sort(rng.standard_normal(256)).astype(np.float32)
        scales = rng.random(-(-blocks // outer)).astype(np.float32)
        state |= {"nested_blocksize": outer, "nested_offset": 0.25, "nested_dtype": "float32"}
        absmax = [float(levels[c]) * float(scales[i // outer]) + 0.25 for i, c in enumerate(inner)]
        tensors |= {
            "weight.absmax": integers("U8", inner),
            "weight.nested_absmax": f32(scales),
            "weight.nested_quant_map": f32(levels),
        }
    else:
        absmax = [float(np.float32(value)) for value in rng.random(blocks)]
        tensors["weight.absmax"] = f32(absmax)
    text = json.dumps(state | {"dtype": "bfloat16"}).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = integers("U8", list(text))
    w = [float(table[code]) * absmax[i // block] for i, code in enumerate(codes)]
    return tensors, np.array(w).reshape(shape)


def int8(rng: np.random.Generator, shape: tuple[int, int]) -> Packed:
    """bitsandbytes int8."""
    q, scb = rng.integers(-127, 128, shape), rng.random(shape[0]).astype(np.float32) + 1
    tensors = {
        "weight": integers("I8", q),
        "SCB": f32(scb),
        "weight_format": integers("U8", 0),
    }
    return tensors, q * scb.astype(np.float64)[:, None] / 127


def compressed(
    rng: np.random.Generator,
    shape: tuple[int, int],
    bits: int = 4,
    size: int = 32,
    symmetric: bool = True,
    order: bool = False,
) -> Packed:
    """compressed-tensors, pack-quantized."""
    rows, cols = shape
    groups, half = -(-cols // size), 1 << (bits - 1)
    q = rng.integers(-half, half, shape)
    scale = f16(rng.random((rows, groups)) * 0.05 + 0.01)
    zero = np.zeros((rows, groups), np.int64)
    group = np.arange(cols) // size
    tensors = {
        "weight_packed": integers("I32", pack_rows(q + half, bits)),
        "weight_shape": integers("I64", shape),
        "weight_scale": scale,
    }
    if not symmetric:
        zero = rng.integers(-half, half, (rows, groups))
        tensors["weight_zero_point"] = integers("I32", pack_rows(zero.T + half, bits).T)
    if order:
        group = rng.permutation(group)
        tensors["weight_g_idx"] = integers("I32", group)
    d = np.frombuffer(scale[2], np.float16).reshape(rows, groups).astype(np.float64)
    return tensors, (q - zero[:, group]) * d[:, group]


def int_quantized(rng: np.random.Generator, shape: tuple[int, int], single: bool = False) -> Packed:
    """compressed-tensors, int-quantized: a scale per row, or one."""
    q = rng.integers(-128, 128, shape)
    scale = rng.random(1 if single else (shape[0], 1)).astype(np.float32) / 64
    tensors = {"weight": integers("I8", q), "weight_scale": f32(scale)}
    return tensors, q * scale.astype(np.float64)


def write_quantized(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], pack: Any
) -> dict[str, NDArray[np.float64]]:
    """A checkpoint folder whose matrices in layers are packed by `pack(shape)`; weights by name."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {**config, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(document))
    tensors: dict[str, Raw] = {}
    weights: dict[str, NDArray[np.float64]] = {}
    for name, w in random_weights(config).items():
        if w.ndim == 1 or ".layers." not in name:
            tensors[name], weights[name] = bf16(w), w.astype(np.float64)
            continue
        parts, weights[name] = pack(w.shape)
        base = name.removesuffix("weight")
        tensors |= {base + end: raw for end, raw in parts.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return weights
