"""AWQ and SmoothQuant: what they fold, and that the model stays the same."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_checkpoint import CONFIG, random_weights, write_checkpoint

import edgeq
from edgeq import blocks
from edgeq.errors import ModelError, RequestError
from edgeq.folding import FoldedSource, fold
from edgeq.gguf import open_gguf
from edgeq.models.flow import folds
from edgeq.pipeline import run
from edgeq.quantizers import awq, find, smoothquant
from edgeq.sources import Source, open_source
from edgeq.statistics import Statistics

Array = NDArray[np.float32]
WIDE = {**CONFIG, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 64}
QWEN = {**WIDE, "architectures": ["Qwen2ForCausalLM"]}


def checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """Random weights; with the biases that an architecture has."""
    weights = random_weights(config)
    if config is QWEN:
        for name in [name for name in weights if name.endswith(("q_proj.weight", "v_proj.weight"))]:
            bias = weights[name][:, 0] + np.float32(0.5)
            weights[name.replace("weight", "bias")] = bias
            weights[name.replace("weight", "bias").replace("q_proj", "k_proj")] = bias[:128]
    return write_checkpoint(folder, config, weights)


def importance(source: Source, rng: np.random.Generator) -> dict[str, Array]:
    """The same for matrices that read the same input, as statistics are."""
    found = {}
    for pair in folds(source.shapes, source.model):
        each = np.exp(2 * rng.standard_normal(source.shapes[pair.readers[0]][1]))
        found.update(dict.fromkeys(pair.readers, each.astype(np.float32)))
    return found


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
@pytest.mark.parametrize("config", [WIDE, QWEN], ids=["llama", "qwen2"])
def test_the_model_computes_the_same(
    config: dict[str, Any], method: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path / "model", config)
    plain = edgeq.convert(path, tmp_path / "plain.gguf", "F32")
    source = open_source(path)
    known, chosen = Statistics(importance(source, rng)), find(method)
    formats = {name: blocks.get("Q4_0") for name in source.shapes}
    architecture = source.metadata()["general.architecture"]
    folded = fold(source, known, chosen, formats, architecture)  # type: ignore[arg-type]
    changed = write(folded, tmp_path / "folded.gguf")
    source.close()
    ids = [1, 5, 9, 30, 2, 44, 17]
    with edgeq.load(plain, kv="f32") as a, edgeq.load(changed, kv="f32") as b:
        assert golden.distance(b.logits(ids), a.logits(ids)) < 1e-5
        names = [name for name in source.shapes if not np.array_equal(_raw(a, name), _raw(b, name))]
    kinds = {name.split(".")[2] for name in names}
    assert {"attn_norm", "ffn_norm", "attn_q", "ffn_gate", "ffn_down", "attn_output"} <= kinds


def test_errors_are_those_of_the_models_own_weights(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """What the file stores, scaled back by hand, against the checkpoint."""
    path = checkpoint(tmp_path / "model", WIDE)
    with contextlib.closing(open_source(path)) as source:
        given = importance(source, rng)
        report = run(path, tmp_path / "o.gguf", "Q4_0", method="smoothquant", importance=given)
        formats = {t.name: blocks.get(t.format) for t in report.tensors}
        folded = fold(source, Statistics(given), smoothquant, formats, "llama")
        with open_gguf(report.path) as gguf:
            for tensor in report.tensors:
                rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
                some = slice(None, None, max(rows // 4, 1))
                w = source.read(tensor.name, 0, rows).astype(np.float64)[some]
                scaled = folded.read(tensor.name, 0, rows)[some]
                raw = gguf.tensor(tensor.name)
                stored = blocks.decode(raw.reshape(rows, -1)[some], formats[tensor.name])
                miss = stored * (w / scaled) - w
                expected = np.sqrt(np.square(miss).sum() / np.square(w).sum())
                assert tensor.relative_rmse == pytest.approx(expected, rel=1e-3, abs=1e-6)
                assert tensor.mean_square == pytest.approx(np.square(w).mean(), rel=1e-4)


def _raw(model: Any, name: str) -> NDArray[np.uint8]:
    raw: NDArray[np.uint8] = model.gguf.tensor(name)
    return raw


def write(source: FoldedSource, path: Path) -> Path:
    from edgeq.gguf import GgufWriter, TensorSpec

    specs = [TensorSpec(name, shape, blocks.get("F32")) for name, shape in source.shapes.items()]
    with GgufWriter(path, source.metadata(), specs) as writer:
        for spec in specs:
            rows = spec.shape[0] if len(spec.shape) > 1 else 1
            writer.write(spec.name, np.ascontiguousarray(source.read(spec.name, 0, rows)))
    return path


def test_warnings_of_the_source_are_given_once(rng: np.random.Generator, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", WIDE)
    source = open_source(path)
    weights = importance(source, rng)
    source.close()
    report = run(path, tmp_path / "o.gguf", "Q4_0", method="smoothquant", importance=weights)
    assert len([warning for warning in report.warnings if "no tokenizer" in warning]) == 1


def test_statistics_follow_the_columns(rng: np.random.Generator) -> None:
    x = rng.standard_normal((50, 6)).astype(np.float32)
    known = Statistics({"a": (x**2).mean(axis=0)})
    factors = np.exp(rng.standard_normal(6)).astype(np.float32)
    known.scale("a", factors)
    known.scale("a", np.full(6, 2, np.float32))
    expected = ((x / factors / 2) ** 2).mean(axis=0)
    np.testing.assert_allclose(known.importance("a"), expected, rtol=1e-5)  # type: ignore[arg-type]


def test_awq_protects_strong_channels(rng: np.random.Generator) -> None:
    w = rng.standard_normal((64, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 32 == 3, 400, 1).astype(np.float32)
    fmt = blocks.get("Q2_K")
    factors = awq.scales([w], importance, [fmt])
    assert factors[3] > 1.2 * factors[0]
    errors = [awq._error(w, importance, fmt, awq._scale(importance, p / 10)) for p in range(11)]
    best = awq._error(w, importance, fmt, factors)
    assert best == min(errors) < errors[0] < errors[-1]


def test_awq_leaves_alike_channels_alone(rng: np.random.Generator) -> None:
    w = rng.standard_normal((8, 64)).astype(np.float32)
    assert np.allclose(awq.scales([w], np.full(64, 3, np.float32), [blocks.get("Q4_0")]), 1)


@pytest.mark.parametrize("method", [awq, smoothquant])
def test_channels_without_activity_are_left_alone(method: Any, rng: np.random.Generator) -> None:
    w, importance = rng.standard_normal((8, 64)).astype(np.float32), rng.random(64) + 1
    importance[:5] = 0
    w[:, 6] = 0
    for known in (importance.astype(np.float32), np.zeros(64, np.float32)):
        factors = method.scales([w], known, [blocks.get("Q4_0")])
        assert np.isfinite(factors).all()
        assert (factors > 0).all()
        assert np.allclose(factors[:5], 1)


def test_smoothquant_evens_out_inputs_and_weights(rng: np.random.Generator) -> None:
    w = rng.standard_normal((512, 64)).astype(np.float32)
    power = np.exp(rng.standard_normal(64)).astype(np.float32)
    factors = smoothquant.scales([w], power, [])
    inputs, columns = np.sqrt(power) / factors, np.abs(w).max(axis=0) * factors
    np.testing.assert_allclose(inputs / columns, (inputs / columns)[0], rtol=1e-4)


def test_heads_that_share_values_share_factors(tmp_path: Path) -> None:
    source = open_source(checkpoint(tmp_path / "model", WIDE))
    pair = next(p for p in folds(source.shapes, source.model) if "attn_output" in p.readers[0])
    assert (pair.share, pair.head) == (2, 64)
    single = dataclasses.replace(source.model, head_count_kv=4)
    shapes = {**source.shapes, "blk.0.attn_v.weight": (256, 256)}
    whole = next(p for p in folds(shapes, single) if "attn_output" in p.readers[0])
    assert (whole.share, whole.head) == (1, 1)
    source.close()


def test_nothing_is_folded_where_shapes_do_not_fit() -> None:
    from edgeq.recipe import Model

    odd = {"blk.0.attn_v.weight": (100, 64), "blk.0.attn_output.weight": (64, 64)}
    assert list(folds(odd, Model(1, 4, 2))) == []


def test_unknown_architectures_are_not_folded(tmp_path: Path) -> None:
    from edgeq.gguf import GgufWriter, TensorSpec

    path = tmp_path / "other.gguf"
    keys = {"general.architecture": "none", "none.block_count": 1, "none.attention.head_count": 2}
    specs = [TensorSpec("blk.0.ffn_up.weight", (4, 32), blocks.get("F32"))]
    with GgufWriter(path, keys, specs) as writer:
        writer.write(specs[0].name, np.ones((4, 32), np.float32))
    given = {"blk.0.ffn_up.weight": np.ones(32, np.float32)}
    with pytest.raises(ModelError, match="architecture 'none' is not supported"):
        run(path, tmp_path / "out.gguf", "Q4_0", method="awq", importance=given)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gptq", "needs Hessians"),
        ("awq", "needs an importance matrix"),
        ("smoothquant", "needs an importance matrix"),
    ],
)
def test_methods_without_their_data_are_refused(method: str, said: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", WIDE)
    with pytest.raises(RequestError, match=said):
        run(path, tmp_path / "out.gguf", "Q4_0", method=method)
