"""Small checkpoints for tests: a safetensors writer, and a complete folder of random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Raw = tuple[str, tuple[int, ...], bytes]  # type, shape, little-endian data

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}


def f32(array: Any) -> Raw:
    """Entry of a float32 tensor."""
    values = np.asarray(array, np.float32)
    return "F32", values.shape, values.tobytes()


def bf16(array: Any) -> Raw:
    """Entry of a bfloat16 tensor; the array's lower 16 bits are cut off."""
    values = np.asarray(array, np.float32)
    return "BF16", values.shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def header_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(path: Path, tensors: Mapping[str, Raw]) -> None:
    """A correct file, tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(header_bytes(header, data))


def random_weights(config: Mapping[str, Any], seed: int = 7) -> dict[str, NDArray[np.float32]]:
    """Weights by HF name for a Llama-like `config`, exact in bfloat16."""
    rng = np.random.default_rng(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: _cut(w) for name, w in weights.items()}


def _cut(w: NDArray[np.float32]) -> NDArray[np.float32]:
    return (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] = CONFIG,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """A checkpoint folder in bfloat16, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    found = random_weights(config) if weights is None else weights
    write_safetensors(folder / "model.safetensors", {name: bf16(w) for name, w in found.items()})
    return folder
