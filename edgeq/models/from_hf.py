"""Hyper-parameters from config.json to GGUF keys, as llama.cpp's converter writes them.

Both generations of configuration files work: `rope_theta` with `rope_scaling`, and (transformers 5)
`rope_parameters`, which holds both.
"""

import math
from collections.abc import Mapping
from typing import Any

from edgeq.errors import ModelError

__all__ = [
    "decoder_metadata",
    "head_dim",
    "integer",
    "real",
    "rope_parameters",
]

_MAX_UINT32 = (1 << 32) - 1


def integer(
    config: Mapping[str, Any], key: str, default: int | None = None, high: int = _MAX_UINT32
) -> int:
    """Whole number in 1..high; null counts as absent, and without a default the key is required.

    Raises ModelError.

    >>> integer({"num_hidden_layers": 16}, "num_hidden_layers")
    16
    """
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= high:
        raise ModelError(f"config.json: {key} = {value!r}: expected a whole number 1 to {high}")
    return value


def real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Finite number above zero; null counts as absent, and without a default the key is required.

    Raises ModelError.

    >>> real({"rope_theta": 500000}, "rope_theta")
    500000.0
    """
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e30:
        raise ModelError(f"config.json: {key} = {value!r}: expected a finite number above 0")
    return float(value)


def head_dim(config: Mapping[str, Any]) -> int:
    """Elements per attention head: explicit, or hidden_size / num_attention_heads.

    Raises ModelError.

    >>> head_dim({"hidden_size": 2048, "num_attention_heads": 32})
    64
    """
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size = {hidden}: expected a multiple of {heads} heads"
        )
    return integer(config, "head_dim", hidden // heads)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the parameters of that type, from either kind of config.json.

    Raises ModelError.

    >>> rope_parameters({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}})
    {'type': 'linear', 'factor': 2.0, 'rope_type': 'linear', 'rope_theta': 1000000.0}
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(found, dict):
        found = found.get("full_attention", found)
    if not isinstance(found, dict):
        raise ModelError(f"config.json: rope parameters {found!r}: expected a table")
    merged = dict(found)
    merged["rope_type"] = found.get("rope_type", found.get("type", "default"))
    merged["rope_theta"] = real(
        {"rope_theta": config.get("rope_theta"), **found}, "rope_theta", 1e4
    )
    return merged


# "dynamic" changes nothing within the training context.
_ROPE_TYPES = ("default", "linear", "yarn", "dynamic")


def decoder_metadata(
    architecture: str, config: Mapping[str, Any], more_rope_types: tuple[str, ...] = ()
) -> dict[str, Any]:
    """general.architecture and the `<architecture>.*` keys that every decoder-only transformer has.

    more_rope_types: types that the caller turns into a tensor. Raises ModelError for missing or
    impossible values and unsupported rope types.
    """
    _check_plain_decoder(config)
    _check_rope_type(config, _ROPE_TYPES + more_rope_types)
    heads = integer(config, "num_attention_heads")
    keys: dict[str, Any] = {
        "block_count": integer(config, "num_hidden_layers", high=1024),
        "context_length": integer(config, "max_position_embeddings"),
        "embedding_length": integer(config, "hidden_size"),
        "feed_forward_length": integer(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": integer(config, "num_key_value_heads", heads, heads),
        **_rope_keys(config),
        "attention.layer_norm_rms_epsilon": real(config, "rms_norm_eps"),
    }
    if config.get("head_dim") is not None:
        keys["attention.key_length"] = keys["attention.value_length"] = head_dim(config)
    named = {f"{architecture}.{key}": value for key, value in keys.items()}
    return {"general.architecture": architecture, **named}


def _rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    keys: dict[str, Any] = {}
    if kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = kind
        keys["rope.scaling.factor"] = real(rope, "factor")
    if kind == "yarn":
        keys |= _yarn_keys(rope, config)
    keys["rope.freq_base"] = rope["rope_theta"]
    return keys


def _yarn_keys(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    original = integer(
        rope, "original_max_position_embeddings", integer(config, "max_position_embeddings")
    )
    keys: dict[str, Any] = {"rope.scaling.original_context_length": original}
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            keys[f"rope.scaling.yarn_{key}"] = real(rope, key)
    # HF gives the whole magnitude factor, GGUF what multiplies YaRN's own.
    own = 0.1 * math.log(max(real(rope, "factor"), 1.0)) + 1.0
    ratio = real(rope, "attention_factor", own) / own
    if not math.isclose(ratio, 1.0, rel_tol=1e-4):
        keys["rope.scaling.attn_factor"] = ratio
    return keys


def _check_rope_type(config: Mapping[str, Any], known: tuple[str, ...]) -> None:
    kind = rope_parameters(config)["rope_type"]
    if kind not in known:
        raise ModelError(f"config.json: rope_type = {kind!r}: expected one of {', '.join(known)}")


def _check_plain_decoder(config: Mapping[str, Any]) -> None:
    """Refuse options that would change the computation."""
    for key, value in {"hidden_act": "silu", "partial_rotary_factor": 1.0}.items():
        if config.get(key, value) not in (value, None):
            raise ModelError(f"config.json: {key} = {config[key]!r}: only {value} is supported")
    context = integer(config, "max_position_embeddings")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and integer(config, "sliding_window") < context:
        raise ModelError(
            f"config.json: sliding_window = {window}: sliding-window attention is not supported"
        )
