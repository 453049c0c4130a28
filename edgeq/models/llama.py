"""Llama (Touvron et al. 2023, arXiv:2302.13971), and Mistral without its sliding window.

Optional biases and a tied output need no word here: the tensors say so. GGUF rotates neighbouring
pairs of a head while HF rotates its halves, so the rows of Q and K change places on the way.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.models.arch import Arch
from edgeq.models.from_hf import (
    decoder_metadata,
    head_dim,
    integer,
    real,
    rope_parameters,
)
from edgeq.models.hparams import decoder_arch

if TYPE_CHECKING:
    from edgeq.gguf import Gguf

__all__ = ["HF_ARCHITECTURES", "arch", "extra_tensors", "metadata", "transform"]

HF_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")


def arch(gguf: "Gguf") -> Arch:
    """Properties of a GGUF file's model. Raises FormatError, ModelError."""
    return decoder_arch(gguf, "norm")


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """GGUF keys for config.json. Raises ModelError."""
    keys = {
        "llama.vocab_size": integer(config, "vocab_size"),
        "llama.rope.dimension_count": head_dim(config),
    }
    return decoder_metadata("llama", config, ("llama3",)) | keys


def transform(name: str, w: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """Q and K rows (and biases), head by head: halves become pairs; other tensors unchanged.

    w: [n, cols] or [n], n a multiple of the head dimension.

    >>> rows = np.arange(8, dtype=np.float32)
    >>> transform("blk.0.attn_q.bias", rows, {"hidden_size": 8, "num_attention_heads": 1}).tolist()
    [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
    """
    if not name.startswith("blk.") or name.split(".")[2] not in ("attn_q", "attn_k"):
        return w
    half = head_dim(config) // 2
    heads = w.reshape(-1, 2, half, *w.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(w.shape)


def extra_tensors(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """rope_freqs.weight [head_dim / 2] for Llama 3.1's context extension, else nothing.

    Divisors of the rotary frequencies: 1 for wavelengths well inside the original context, `factor`
    for those beyond it, and a smooth blend between (Llama 3.1 release, `apply_scaling` in its
    reference code). Raises ModelError.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return {}
    factor, low, high = (real(rope, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ModelError(f"config.json: high_freq_factor = {high}: expected more than {low}")
    context = integer(rope, "original_max_position_embeddings")
    dim = head_dim(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    divisors = 1.0 / ((1.0 - blend) / factor + blend)
    return {"rope_freqs.weight": divisors.astype(np.float32)}
