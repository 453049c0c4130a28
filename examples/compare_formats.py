"""What each block format costs and keeps: quantize one matrix, decode it, compare.

usage: python compare_formats.py [MODEL.gguf TENSOR]    (without arguments: random numbers)
A model of floats (F16, BF16, F32) compares fairly; quantized weights favour their own format.
"""

import sys

import numpy as np

import edgeq

FORMATS = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q4_0", "Q3_K", "Q2_K"]


def main(path: str = "", tensor: str = "") -> None:
    if path:
        with edgeq.open_gguf(path) as gguf:
            weights = edgeq.dequantize(gguf.tensor(tensor), gguf.tensors[tensor].format)
    else:
        weights = np.random.default_rng(0).standard_normal((256, 2048), dtype=np.float32)
    print("format    bits/weight  relative error")
    for name in FORMATS:
        packed = edgeq.quantize(weights, name)
        error = edgeq.dequantize(packed, name) - weights
        relative = np.sqrt((error**2).mean() / (weights**2).mean())
        print(f"{name:8} {8 * packed.size / weights.size:12.2f} {relative:15.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
