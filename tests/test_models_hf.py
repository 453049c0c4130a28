"""Architectures at the border: config.json to GGUF keys, and GGUF keys to validated properties."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import CONFIG

from edgeq import blocks, models
from edgeq.errors import EdgeqError, FormatError, ModelError
from edgeq.gguf import Gguf, GgufWriter, TensorSpec, open_gguf
from edgeq.models import llama, qwen2, qwen3
from edgeq.models.arch import Arch, Rope
from edgeq.models.from_hf import rope_parameters

NEW_STYLE = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}


def with_rope(**rope: Any) -> dict[str, Any]:
    return {**CONFIG, "rope_scaling": rope}


# ---- config.json -> GGUF keys


def test_keys_and_values_are_those_of_the_converter() -> None:
    assert llama.metadata({**CONFIG, "head_dim": 16}) == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.vocab_size": 32,
        "llama.rope.dimension_count": 16,
    }
    assert qwen2.metadata(CONFIG) == {
        "general.architecture": "qwen2",
        "qwen2.block_count": 2,
        "qwen2.context_length": 128,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 10000.0,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-5,
    }


def test_written_keys_equal_a_file_of_the_converter(shared_data: Path) -> None:
    home = shared_data / "tiny-home"
    ours = llama.metadata(json.loads((home / "checkpoint/config.json").read_text()))
    with open_gguf(home / "files_from_llama_cpp/Q4_K_M.gguf") as gguf:
        theirs = {key: value for key, value in gguf.metadata.items() if key.startswith("llama.")}
    assert {key: np.float32(v) if type(v) is float else v for key, v in ours.items()} == {
        "general.architecture": "llama",
        **theirs,
    }


def test_integers_in_json_become_floats_where_gguf_has_floats() -> None:
    keys = llama.metadata({**CONFIG, "rope_theta": 10000})
    assert type(keys["llama.rope.freq_base"]) is float


@pytest.mark.parametrize("module", [llama, qwen2, qwen3])
def test_head_dim_is_explicit_only_where_it_is_stated(module: Any) -> None:
    keys = {key.partition(".")[2]: value for key, value in module.metadata(CONFIG).items()}
    stated = module is qwen3  # its class has a default of its own
    assert keys.get("attention.key_length") == (128 if stated else None)
    keys = {
        key.partition(".")[2]: v for key, v in module.metadata({**CONFIG, "head_dim": 48}).items()
    }
    assert keys["attention.key_length"] == keys["attention.value_length"] == 48


def test_missing_kv_heads_mean_as_many_as_query_heads() -> None:
    keys = llama.metadata({**CONFIG, "num_key_value_heads": None})
    assert keys["llama.attention.head_count_kv"] == 4


def test_both_generations_of_rope_configuration() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}
    per_kind = {"rope_parameters": {"full_attention": new["rope_parameters"]}}
    expected = llama.metadata({**CONFIG, **old})
    assert expected["llama.rope.scaling.type"] == "linear"
    assert expected["llama.rope.scaling.factor"] == 4.0
    assert expected["llama.rope.freq_base"] == 5e5
    for config in (new, per_kind):
        assert llama.metadata({**CONFIG, "rope_theta": None, **config}) == expected
    assert llama.metadata({**CONFIG, **NEW_STYLE})["llama.rope.freq_base"] == 5e5
    assert rope_parameters({})["rope_theta"] == 10000.0


def test_yarn_keys() -> None:
    keys = llama.metadata(with_rope(rope_type="yarn", factor=4.0, beta_fast=16))
    scaling = {k.removeprefix("llama.rope.scaling."): v for k, v in keys.items() if "scaling" in k}
    assert scaling == {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 128,
        "yarn_beta_fast": 16.0,
    }


def test_yarn_attention_factor_is_stored_relative_to_yarns_own() -> None:
    own = 0.1 * math.log(4.0) + 1
    same = llama.metadata(with_rope(rope_type="yarn", factor=4.0, attention_factor=own))
    assert not any("attn_factor" in key for key in same)
    twice = llama.metadata(with_rope(rope_type="yarn", factor=4.0, attention_factor=2 * own))
    assert twice["llama.rope.scaling.attn_factor"] == pytest.approx(2.0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sliding window": ({"sliding_window": 24}, "sliding_window = 24"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "missing": ({"num_hidden_layers": None}, "num_hidden_layers = None"),
    "float": ({"hidden_size": 64.0}, "hidden_size = 64.0"),
    "text": ({"hidden_size": "64"}, "hidden_size = '64'"),
    "truth value": ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    "zero": ({"intermediate_size": 0}, "intermediate_size = 0"),
    "negative": ({"vocab_size": -1}, "vocab_size = -1"),
    "huge": ({"num_hidden_layers": 2**40}, "num_hidden_layers = 1099511627776"),
    "NaN": ({"rms_norm_eps": math.nan}, "rms_norm_eps = nan"),
    "infinity": ({"rope_theta": math.inf}, "rope_theta = inf"),
    "more kv heads": ({"num_key_value_heads": 8}, "num_key_value_heads = 8"),
    "heads do not divide": ({"num_attention_heads": 7}, "hidden_size = 64"),
    "rope table": ({"rope_scaling": [1]}, "rope parameters"),
    "rope type": ({"rope_scaling": {"type": "longrope"}}, "rope_type = 'longrope'"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "factor = None"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: .*{message}"):
        llama.metadata({**CONFIG, **change})


@pytest.mark.parametrize(
    "window", [{"sliding_window": 24, "use_sliding_window": False}, {"sliding_window": 128}]
)
def test_windows_that_hide_nothing_are_accepted(window: dict[str, Any]) -> None:
    assert llama.metadata({**CONFIG, **window}) == llama.metadata(CONFIG)


def test_llama3_scaling_becomes_a_tensor_for_one_architecture_only() -> None:
    config = with_rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    config |= {"rope_theta": 500000.0, "head_dim": 128}
    assert not any("scaling" in key for key in llama.metadata(config))
    [(name, divisors)] = llama.extra_tensors(config).items()
    assert (name, divisors.dtype, divisors.shape) == ("rope_freqs.weight", np.float32, (64,))
    np.testing.assert_allclose(divisors, llama3_divisors(128, 500000.0, 8.0), rtol=1e-6)
    # Llama 3.1 8B: 29 pairs as they are, 29 divided by the whole factor, 6 blended.
    assert (divisors == 1).sum() == 29
    assert (divisors == 8).sum() == 29
    with pytest.raises(ModelError, match="rope_type = 'llama3'"):
        qwen2.metadata(config)


def llama3_divisors(dim: int, base: float, factor: float) -> list[float]:
    """The published rule, one frequency at a time, for the release's 8192, 1 and 4."""
    result = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        if wavelength < 8192 / 4:
            result.append(1.0)
        elif wavelength > 8192:
            result.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return result


def test_extra_tensors_are_rare() -> None:
    assert llama.extra_tensors(CONFIG) == qwen2.extra_tensors(CONFIG) == {}


@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "blk.1.attn_k.bias"])
def test_permutation_pairs_what_hf_pairs(name: str) -> None:
    """HF rotates (i, i + half) of a head; GGUF's row 2i must be HF's i, row 2i + 1 its i + half."""
    head, half = 16, 8
    shape = (3 * head, 5) if name.endswith("weight") else (3 * head,)
    w = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    moved = llama.transform(name, w, CONFIG)
    assert moved.flags.c_contiguous
    for h in range(3):
        for i in range(half):
            np.testing.assert_array_equal(moved[h * head + 2 * i], w[h * head + i])
            np.testing.assert_array_equal(moved[h * head + 2 * i + 1], w[h * head + half + i])


@pytest.mark.parametrize("name", ["blk.0.attn_v.weight", "token_embd.weight", "output_norm.weight"])
def test_other_tensors_stay(name: str) -> None:
    w = np.arange(32, dtype=np.float32)
    assert llama.transform(name, w, CONFIG) is w
    assert qwen2.transform("blk.0.attn_q.weight", w, CONFIG) is w


def test_architectures_are_found_by_file_and_by_class() -> None:
    assert models.find("qwen3") is qwen3
    assert models.by_hf(["MistralForCausalLM"]) is llama
    for name in ("arch", "hparams", "../llama", "llama\0", "Llama", ""):
        with pytest.raises(ModelError, match="expected one of llama, "):
            models.find(name)
    with pytest.raises(ModelError, match=r"expected one of .*Qwen3ForCausalLM"):
        models.by_hf(["BertModel"])


def test_reference_configurations_are_understood(shared_data: Path) -> None:
    for name in ("llama", "llama3_rope", "llama_headdim", "llama_yarn", "qwen2", "qwen3"):
        config = json.loads((shared_data / "arch" / name / "config.json").read_text())
        keys = models.by_hf(config["architectures"]).metadata(config)
        prefix = keys["general.architecture"]
        assert keys[f"{prefix}.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
        assert keys[f"{prefix}.block_count"] == 2


# ---- GGUF keys -> Arch

KEYS: dict[str, Any] = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
OpenWith = Callable[..., Gguf]


@pytest.fixture
def open_with(tmp_path: Path) -> OpenWith:
    """Opens a GGUF file with KEYS changed: (architecture, changes); None removes a key."""

    def make(
        changes: dict[str, Any], architecture: str = "llama", tokens: int = 32, width: int = 64
    ) -> Gguf:
        path = tmp_path / "tiny.gguf"
        keys = {f"{architecture}.{k}": v for k, v in {**KEYS, **changes}.items() if v is not None}
        metadata = {
            "general.architecture": architecture,
            **keys,
            "tokenizer.ggml.tokens": [f"t{i}" for i in range(tokens)],
        }
        specs = [TensorSpec("token_embd.weight", (32, width), blocks.get("F32"))]
        with GgufWriter(path, metadata, specs, force=True) as writer:
            writer.write("token_embd.weight", np.zeros((32, width), np.float32))
        return open_gguf(path)

    return make


def test_properties_of_a_file(open_with: OpenWith) -> None:
    expected = Arch(
        name="llama",
        block_count=2,
        embedding_length=64,
        feed_forward_length=96,
        head_count=4,
        head_count_kv=2,
        head_dim=16,
        vocab_size=32,
        context_length=128,
        rms_epsilon=float(np.float32(1e-5)),
        rope=Rope(dim=16, base=10000.0, style="norm"),
    )
    assert llama.arch(open_with({})) == expected


@pytest.mark.parametrize(("module", "style"), [(llama, "norm"), (qwen2, "neox"), (qwen3, "neox")])
def test_only_differences_differ(open_with: OpenWith, module: Any, style: str) -> None:
    arch = module.arch(open_with({"attention.key_length": 32, "rope.dimension_count": 24}))
    assert (arch.head_dim, arch.rope.dim, arch.rope.style) == (32, 24, style)
    assert arch.qk_norm == (module is qwen3)


def test_scaling_of_a_file(open_with: OpenWith) -> None:
    def rope(**scaling: Any) -> Rope:
        keys = {f"rope.scaling.{key}": value for key, value in scaling.items()}
        return llama.arch(open_with({"rope.freq_base": 5e5, **keys})).rope

    assert rope(type="none") == Rope(16, 5e5, "norm")
    assert rope(type="linear", factor=2.0) == Rope(16, 5e5, "norm", "linear", 2.0)
    assert rope(factor=2.0) == Rope(16, 5e5, "norm", "linear", 2.0)
    yarn = rope(type="yarn", factor=4.0, original_context_length=32, attn_factor=1.5)
    assert yarn == Rope(16, 5e5, "norm", "yarn", 4.0, 32, 1.5, 32.0, 1.0)


def test_configuration_survives_the_way_through_a_file(open_with: OpenWith) -> None:
    config = with_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    keys = {k.removeprefix("llama."): v for k, v in llama.metadata(config).items()}
    keys.pop("general.architecture")
    rope = llama.arch(open_with(keys)).rope
    assert rope == Rope(16, 10000.0, "norm", "yarn", 4.0, original_context=32)


BAD: dict[str, tuple[dict[str, Any], type[EdgeqError]]] = {
    "no layers": ({"block_count": 0}, ModelError),
    "too many layers": ({"block_count": 1025}, ModelError),
    "layers 2**32 - 1": ({"block_count": 2**32 - 1}, ModelError),
    "layers missing": ({"block_count": None}, FormatError),
    "layers as float": ({"block_count": 2.0}, FormatError),
    "layers as text": ({"block_count": "2"}, FormatError),
    "layers as truth": ({"block_count": True}, FormatError),
    "no heads": ({"attention.head_count": 0}, ModelError),
    "more heads than width": ({"attention.head_count": 65}, ModelError),
    "heads do not divide": ({"attention.head_count": 5}, ModelError),
    "heads per layer": ({"attention.head_count": np.array([4, 4], np.int32)}, FormatError),
    "no kv heads": ({"attention.head_count_kv": 0}, ModelError),
    "more kv heads": ({"attention.head_count_kv": 8}, ModelError),
    "kv heads do not divide": ({"attention.head_count_kv": 3}, ModelError),
    "no width": ({"embedding_length": 0}, ModelError),
    "width 2**31": ({"embedding_length": 2**31}, ModelError),
    "width unlike the table": ({"embedding_length": 128}, ModelError),
    "odd heads": ({"attention.key_length": 15}, ModelError),
    "heads of nothing": ({"attention.key_length": 0}, ModelError),
    "heads of 2**20": ({"attention.key_length": 2**20}, ModelError),
    "values unlike keys": ({"attention.value_length": 32}, ModelError),
    "odd rotation": ({"rope.dimension_count": 15}, ModelError),
    "rotation too wide": ({"rope.dimension_count": 18}, ModelError),
    "no rotation": ({"rope.dimension_count": 0}, ModelError),
    "base 0": ({"rope.freq_base": 0.0}, ModelError),
    "base negative": ({"rope.freq_base": -1.0}, ModelError),
    "base NaN": ({"rope.freq_base": math.nan}, ModelError),
    "base 1e38": ({"rope.freq_base": 1e38}, ModelError),
    "base as integer": ({"rope.freq_base": 10000}, FormatError),
    "factor 0": ({"rope.scaling.factor": 0.0}, ModelError),
    "factor NaN": ({"rope.scaling.factor": math.nan}, ModelError),
    "factor missing": ({"rope.scaling.type": "linear"}, FormatError),
    "unknown scaling": ({"rope.scaling.type": "su", "rope.scaling.factor": 2.0}, ModelError),
    "scaling as number": ({"rope.scaling.type": 1}, FormatError),
    "yarn without context": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
        FormatError,
    ),
    "epsilon 0": ({"attention.layer_norm_rms_epsilon": 0.0}, ModelError),
    "epsilon negative": ({"attention.layer_norm_rms_epsilon": -1e-5}, ModelError),
    "epsilon NaN": ({"attention.layer_norm_rms_epsilon": math.nan}, ModelError),
    "epsilon 1": ({"attention.layer_norm_rms_epsilon": 1.0}, ModelError),
    "epsilon missing": ({"attention.layer_norm_rms_epsilon": None}, FormatError),
    "no context": ({"context_length": 0}, ModelError),
    "context 2**32 - 1": ({"context_length": 2**32 - 1}, ModelError),
    "no feed-forward": ({"feed_forward_length": 0}, ModelError),
    "experts": ({"expert_count": 8}, ModelError),
    "experts 2**31": ({"expert_count": 2**31}, ModelError),
}


@pytest.mark.parametrize(("changes", "error"), BAD.values(), ids=BAD.keys())
def test_bad_hyper_parameters_are_refused(
    open_with: OpenWith, changes: dict[str, Any], error: type[EdgeqError]
) -> None:
    with open_with(changes) as gguf, pytest.raises(error, match=r"tiny\.gguf: ") as caught:
        llama.arch(gguf)
    named = [key for key in changes if f"llama.{key}" in str(caught.value)]
    assert named or "token_embd.weight" in str(caught.value) or "rope.scaling" in str(caught.value)


def test_embedding_table_must_have_a_row_per_token(open_with: OpenWith) -> None:
    assert llama.arch(open_with({}, tokens=20)).vocab_size == 32  # padded
    with pytest.raises(ModelError, match="32 rows: expected one for each of 33 tokens"):
        llama.arch(open_with({}, tokens=33))
    with pytest.raises(ModelError, match=r"expected .*64.*, as embedding_length says"):
        llama.arch(open_with({}, width=32))


def test_files_of_other_tools(shared_data: Path) -> None:
    for path in sorted((shared_data / "tiny-home/files_from_llama_cpp").glob("*.gguf")):
        with open_gguf(path) as gguf:
            arch = models.find(gguf.get("general.architecture", str)).arch(gguf)
        assert (arch.block_count, arch.head_count, arch.head_dim) == (8, 8, 32)
        assert (arch.vocab_size, arch.context_length) == (4096, 256)
