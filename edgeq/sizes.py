"""Models of the usual sizes, for questions that name none."""

from edgeq.blueprint import Blueprint, of_arch
from edgeq.models.arch import Arch, Rope

__all__ = ["MIXTURES", "SIZES", "blueprints"]

MIXTURES = ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")

# layers, width, feed-forward, heads, of keys, head, vocabulary, tied; positions of training
SIZES = {
    "135M": (30, 576, 1536, 9, 3, 64, 49_152, True, 8192),
    "360M": (32, 960, 2560, 15, 5, 64, 49_152, True, 8192),
    "0.5B": (24, 896, 4864, 14, 2, 64, 151_936, True, 32_768),
    "1B": (16, 2048, 8192, 32, 8, 64, 128_256, True, 131_072),
    "1.5B": (28, 1536, 8960, 12, 2, 128, 151_936, True, 32_768),
    "3B": (28, 3072, 8192, 24, 8, 128, 128_256, True, 131_072),
    "4B": (36, 2560, 9728, 32, 8, 128, 151_936, True, 40_960),
    "8B": (32, 4096, 14_336, 32, 8, 128, 128_256, False, 131_072),
    "14B": (48, 5120, 13_824, 40, 8, 128, 152_064, False, 32_768),
}


def blueprints() -> list[Blueprint]:
    """One of each size, in MIXTURES.

    >>> [plan.name for plan in blueprints()][:3]
    ['135M', '360M', '0.5B']
    """
    return [
        of_arch(name, _arch(name, *numbers), tied=numbers[7], mixtures=MIXTURES)
        for name, numbers in SIZES.items()
    ]


def _arch(
    name: str,
    layers: int,
    width: int,
    ff: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    tied: bool,
    context: int,
) -> Arch:
    rope = Rope(head_dim, 1e6, "neox")
    return Arch(name, layers, width, ff, heads, kv_heads, head_dim, vocab, context, 1e-6, rope)
