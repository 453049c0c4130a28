"""The bytes of blocks from their fields, as `edgeq.blocks.pack` writes them, but compiled."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import BlockFormat, Field
from edgeq.quantizers.search.jit import helper, kernel

NARROW = 8  # lanes below which vectors do not pay


@helper
def wide(codes, out, shift, bits, slots, lanes):
    """Slot by slot, over many neighbouring bytes: compiles to vector instructions."""
    for part in range(len(codes) // lanes):
        source = codes[part * lanes : (part + 1) * lanes]
        start = part // slots * lanes
        target = out[start : start + lanes]
        up = shift + bits * (part % slots)
        for i in range(lanes):
            target[i] |= np.uint8(source[i] << up)


@helper
def narrow(codes, out, shift, bits, slots, lanes):
    """Byte by byte."""
    for i in range(len(out)):
        first = i // lanes * lanes * slots + i % lanes
        byte = np.uint8(0)
        for slot in range(slots):
            byte |= np.uint8(codes[first + slot * lanes] << (shift + bits * slot))
        out[i] |= byte


@kernel
def write_run(values, bias, below, at, bits, shift, passes, slots, lanes, out):
    """Sets bits `below`.. of values - bias, int8 [blocks, count], in out uint8 [blocks, bytes].

    The order of elements is that of `edgeq.blocks.Run`: passes, then slots of a byte, then lanes.
    """
    codes = np.empty(values.shape[1], np.uint8)
    mask = (1 << bits) - 1
    for b in range(len(out)):
        for e in range(len(codes)):
            codes[e] = np.uint8((values[b, e] - bias) >> below & mask)
        target = out[b, at : at + passes * lanes]
        if lanes < NARROW:
            narrow(codes, target, shift, bits, slots, lanes)
        else:
            wide(codes, target, shift, bits, slots, lanes)


@kernel
def write_k4(values, part, at, out):
    """Sets one part of the 12 bytes at `at`: 8 values of 6 bits, int8 [blocks, 8]."""
    own = at + 4 * part
    for b in range(len(out)):
        for i in range(4):
            high = np.uint8(values[b, i + 4])
            out[b, own + i] |= np.uint8(values[b, i]) | (high >> 4) << 6
            out[b, at + 8 + i] |= (high & 15) << (4 * part)


def pack(fields: Mapping[str, NDArray[Any]], fmt: BlockFormat) -> NDArray[np.uint8]:
    """uint8 [..., n * bytes] of fields as `unpack` shapes them, integers as int8; not checked."""
    lead = fields["d"].shape
    out = np.zeros((fields["d"].size, fmt.bytes), np.uint8)
    for name, entry in fmt.fields.items():
        _write(out, entry, fields[name].reshape(len(out), -1))
    return out.reshape(*lead[:-1], lead[-1] * fmt.bytes)


def _write(out: NDArray[np.uint8], entry: Field, values: NDArray[Any]) -> None:
    if entry.pack:
        write_k4(values, entry.part, entry.at, out)
    elif entry.runs:
        _write_runs(out, entry, values)
    else:
        stored = values.astype("<f2" if entry.type == "f16" else np.int8)
        size = stored.shape[1] * stored.itemsize
        out[:, entry.at : entry.at + size] = stored.view(np.uint8)


def _write_runs(out: NDArray[np.uint8], entry: Field, values: NDArray[Any]) -> None:
    below = 0
    for run in entry.runs:
        grid = run.grid(values.shape[1])
        write_run(values, entry.bias, below, run.at, run.bits, run.shift, *grid, out)
        below += run.bits
