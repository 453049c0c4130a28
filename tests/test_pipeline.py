"""Conversions: what is written, what is refused, and that nothing half-done is left behind."""

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_checkpoint import CONFIG, bf16, random_weights, write_checkpoint, write_safetensors

from edgeq import blocks, hessian, imatrix, stream
from edgeq.checkpoint.names import gguf_names
from edgeq.errors import EdgeqError, ModelError, RequestError, ResourceError
from edgeq.gguf import open_gguf
from edgeq.models import llama
from edgeq.pipeline import convert, run
from edgeq.recipe import Recipe, to_toml
from edgeq.sources import CheckpointSource

WIDE = {**CONFIG, "hidden_size": 256, "intermediate_size": 512}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny-model")


def values(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of a GGUF file, decoded."""
    with open_gguf(path) as file:
        return {
            name: blocks.decode(file.tensor(name), info.format).reshape(info.shape)
            for name, info in file.tensors.items()
        }


def expected_values(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """By GGUF name, Q and K permuted."""
    weights = random_weights(config)
    names = gguf_names("llama", config["num_hidden_layers"], weights)
    return {new: llama.transform(new, weights[old], config) for old, new in names.items()}


@pytest.mark.parametrize("recipe", ["F32", "BF16"])
def test_every_weight_arrives(checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    path = convert(checkpoint, tmp_path / "out.gguf", recipe)
    found, expected = values(path), expected_values(CONFIG)
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_array_equal(found[name], w)


def test_gguf_py_reads_the_file(checkpoint: Path, tmp_path: Path) -> None:
    path = convert(checkpoint, tmp_path / "out.gguf", "F16")
    reader = gguf.GGUFReader(path)
    expected = expected_values(CONFIG)
    for tensor in reader.tensors:
        w = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(w.reshape(expected[tensor.name].shape), expected[tensor.name])
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.file_type"] == 1
    assert fields["general.quantization_version"] == 2
    assert (fields["general.type"], fields["general.name"]) == ("model", "Tiny Model")
    assert fields["llama.block_count"] == 2


def test_small_steps_give_the_same_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(checkpoint, tmp_path / "whole.gguf", "F16").read_bytes()
    monkeypatch.setattr(stream, "_CHUNK", 100)  # less than one head of 16 rows
    assert convert(checkpoint, tmp_path / "steps.gguf", "F16").read_bytes() == whole


def test_threads_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "wide", WIDE)
    monkeypatch.setattr(stream, "_CHUNK", 1 << 13)  # many steps, which end in any order
    one, *more = (run(source, tmp_path / f"{n}.gguf", "Q4_K_M", threads=n) for n in (1, 2, 5))
    for other in more:
        assert other.path.read_bytes() == one.path.read_bytes()
        assert other.tensors == one.tensors


def test_the_first_error_ends_a_conversion(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_CHUNK", 100)
    read, asked = CheckpointSource.read, []

    def damaged(self: CheckpointSource, name: str, start: int, stop: int) -> NDArray[np.float32]:
        asked.append(name)
        if len(asked) == 5:
            raise ModelError(f"{name} is damaged")
        return read(self, name, start, stop)

    monkeypatch.setattr(CheckpointSource, "read", damaged)
    with pytest.raises(ModelError, match="is damaged"):
        convert(checkpoint, tmp_path / "out.gguf", "F16", threads=2)
    assert len(asked) < 20  # of many more
    assert not list(tmp_path.glob("out*"))


def test_checkpoint_to_floats_to_target_equals_the_direct_way(
    checkpoint: Path, tmp_path: Path
) -> None:
    direct = convert(checkpoint, tmp_path / "direct.gguf", "F16")
    for between in ("F32", "BF16"):
        floats = convert(checkpoint, tmp_path / f"{between}.gguf", between)
        again = convert(floats, tmp_path / f"from-{between}.gguf", "F16")
        for name, w in values(direct).items():
            np.testing.assert_array_equal(values(again)[name], w)
        with open_gguf(direct) as one, open_gguf(again) as two:
            assert dict(one.value_types) == dict(two.value_types)
            assert one.metadata["general.file_type"] == two.metadata["general.file_type"] == 1


def test_quantizing(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "wide", WIDE)
    report = run(source, tmp_path / "out.gguf", "Q4_K_M")
    formats = {tensor.name: tensor.format for tensor in report.tensors}
    assert formats["token_embd.weight"] == "Q6_K"
    assert formats["blk.0.attn_q.weight"] == "Q4_K"
    assert formats["blk.1.ffn_norm.weight"] == "F32"
    found, expected = values(report.path), expected_values(WIDE)
    for tensor in report.tensors:
        w = expected[tensor.name]
        error = np.sqrt(np.mean((found[tensor.name] - w) ** 2) / np.mean(w**2))
        assert tensor.relative_rmse == pytest.approx(error, rel=0.2), tensor.name  # a sample
    lost = sum(np.sum((found[name] - w) ** 2) for name, w in expected.items())
    energy = sum(np.sum(w**2) for w in expected.values())
    assert report.relative_rmse == pytest.approx(np.sqrt(lost / energy), rel=0.1)
    assert 0.02 < report.relative_rmse < 0.09


def test_report(checkpoint: Path, tmp_path: Path) -> None:
    report = run(checkpoint, tmp_path / "out.gguf", "f32")
    assert report.path == tmp_path / "out.gguf"
    assert report.nbytes == report.path.stat().st_size
    assert (report.recipe, report.bits_per_weight, report.relative_rmse) == ("F32", 32.0, 0.0)
    assert report.seconds > 0
    assert [tensor.name for tensor in report.tensors] == list(values(report.path))
    assert "no tokenizer" in report.warnings[0]


def test_progress_counts_up_to_the_end(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    report = run(checkpoint, tmp_path / "o.gguf", "F16", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][1] == sum(tensor.nbytes for tensor in report.tensors)
    assert {call[2] for call in calls} == {tensor.name for tensor in report.tensors}


@pytest.mark.parametrize(
    ("source", "expected"),
    [("tiny-model", "tiny-model-F16.gguf"), ("tiny-model-BF16.gguf", "tiny-model-F16.gguf")],
)
def test_default_name_is_model_and_encoding(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if source.endswith(".gguf"):
        convert(checkpoint, source, "BF16")
    assert convert(source, recipe="F16") == Path(expected)
    (tmp_path / "models").mkdir()
    assert convert(source, "models", "F16") == Path("models") / expected


def test_existing_output_is_kept_without_force(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"precious")
    calls: list[Any] = []
    with pytest.raises(ResourceError, match="exists already"):
        run(checkpoint, path, "F16", progress=lambda *call: calls.append(call))
    assert (path.read_bytes(), calls) == (b"precious", [])
    convert(checkpoint, path, "F16", force=True)
    assert len(values(path)) == 20


def test_source_is_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    path = convert(checkpoint, tmp_path / "out.gguf", "F32")
    (tmp_path / "link.gguf").hardlink_to(path)
    (tmp_path / "soft.gguf").symlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / "link.gguf", tmp_path / "soft.gguf"):
        with pytest.raises(RequestError, match="is the source itself"):
            convert(path, out, "F16", force=True)
    with pytest.raises(RequestError, match="is the source itself"):
        convert(checkpoint, checkpoint / "model.safetensors", "F16", force=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", ["recipe", "importance", "hessians"])
def test_no_input_is_ever_overwritten(checkpoint: Path, tmp_path: Path, key: str) -> None:
    name, ones, path = "blk.0.ffn_up.weight", np.ones((1, 64), np.float32), tmp_path / "x.toml"
    if key == "recipe":
        path.write_text(to_toml(Recipe.load("F16")))
    elif key == "importance":
        imatrix.write(imatrix.Imatrix({name: ones}, {name: ones[0, :1]}), path)
    else:
        hessian.write(path, {(name,): np.diag(ones[0])}, tokens=1)
    before = path.read_bytes()
    (tmp_path / "link.gguf").symlink_to(path)
    for out in (path, tmp_path / "link.gguf"):
        with pytest.raises(RequestError, match=f"is the .*{key[1:-1]}.* itself: give another name"):
            run(checkpoint, out, **{"recipe": "F16", key: path}, force=True)
    assert path.read_bytes() == before


def test_quantizing_twice_needs_permission(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "wide", WIDE)
    once = convert(source, tmp_path / "once.gguf", "Q8_0")
    with pytest.raises(RequestError, match="Q8_0 already: quantizing twice adds errors"):
        convert(once, tmp_path / "twice.gguf", "F16")
    report = run(once, tmp_path / "twice.gguf", "F32", allow_requantize=True)
    for name, w in values(once).items():
        np.testing.assert_array_equal(values(report.path)[name], w)


def broken_checkpoint(folder: Path, change: Any) -> Path:
    weights = random_weights(CONFIG)
    change(weights)
    return write_checkpoint(folder, CONFIG, weights)


def test_failure_in_the_last_tensor_leaves_nothing(tmp_path: Path) -> None:
    def damage(weights: dict[str, NDArray[np.float32]]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][95, 63] = np.nan

    source = broken_checkpoint(tmp_path / "damaged", damage)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight\[95, 63\] = nan"):
        convert(source, folder / "out.gguf", "F16")
    assert list(folder.iterdir()) == []


def drop(name: str) -> Any:
    return lambda weights: weights.pop(name)


def swap(weights: dict[str, NDArray[np.float32]]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = np.ascontiguousarray(weights[name].T)


INCOMPLETE = {
    "weight of a layer": (drop("model.layers.1.self_attn.k_proj.weight"), r"layer 1: attn_k"),
    "embedding": (drop("model.embed_tokens.weight"), r"token_embd\.weight is missing"),
    "final norm": (drop("model.norm.weight"), r"output_norm\.weight is missing"),
    "other shape": (swap, r"layer 1: ffn_down\.weight has shape \(96, 64\)"),
}


@pytest.mark.parametrize(("change", "message"), INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_incomplete_checkpoint_is_refused_before_work(
    tmp_path: Path, change: Any, message: str
) -> None:
    source = broken_checkpoint(tmp_path / "damaged", change)
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out.gguf", "F16")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"vocab_size": 33}, r"token_embd\.weight has shape \(32, 64\): expected \(33, 64\)"),
        ({"num_attention_heads": 8}, r"attn_k\.weight has shape \(32, 64\): expected \(16, 64\)"),
        ({"head_dim": 24}, r"attn_k\.weight .*: expected \(48, 64\)"),
        ({"intermediate_size": 97}, r"ffn_down\.weight .*: expected \(64, 97\)"),
    ],
)
def test_weights_must_have_the_shapes_of_the_configuration(
    tmp_path: Path, change: dict[str, int], kind: str
) -> None:
    weights = random_weights(CONFIG)
    source = write_checkpoint(tmp_path / "other", {**CONFIG, **change}, weights)
    with pytest.raises(ModelError, match=rf"{kind}, as config\.json says"):
        convert(source, tmp_path / "out.gguf", "F16")


def test_tied_output_is_stored_once(tmp_path: Path) -> None:
    weights = random_weights({**CONFIG, "tie_word_embeddings": False})
    tied = write_checkpoint(tmp_path / "tied", CONFIG, weights)
    assert "output.weight" not in values(convert(tied, tmp_path / "tied.gguf", "F32"))
    config = {**CONFIG, "tie_word_embeddings": False}
    untied = write_checkpoint(tmp_path / "untied", config, weights)
    found = values(convert(untied, tmp_path / "untied.gguf", "F32"))
    np.testing.assert_array_equal(found["output.weight"], weights["lm_head.weight"])
    del weights["lm_head.weight"]
    missing = write_checkpoint(tmp_path / "missing", config, weights)
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        convert(missing, tmp_path / "missing.gguf", "F32")


def test_values_beyond_f16_are_named(tmp_path: Path) -> None:
    def grow(weights: dict[str, NDArray[np.float32]]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6

    source = broken_checkpoint(tmp_path / "large", grow)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight, rows from 0 on: .*too large"):
        convert(source, tmp_path / "out.gguf", "F16")


@pytest.mark.parametrize("settings", [{"method": "magic"}, {"threads": 0}])
def test_settings_are_checked_before_work(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match=r"magic|threads = 0"):
        convert(checkpoint, tmp_path / "out.gguf", "F16", **settings)
    assert not (tmp_path / "out.gguf.part").exists()


@pytest.mark.parametrize(
    ("source", "error"),
    [("nothing", ResourceError), ("model.safetensors", ModelError), ("a.bin", ModelError)],
)
def test_sources_that_are_none(tmp_path: Path, source: str, error: type[EdgeqError]) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": bf16([1.0])})
    (tmp_path / "a.bin").touch()
    with pytest.raises(error):
        convert(tmp_path / source, tmp_path / "out.gguf")


def test_memory_is_bounded_by_the_largest_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 layers: the model is 30 times its largest tensor, the peak at most a few of them."""
    config = {**WIDE, "num_hidden_layers": 16}
    source = write_checkpoint(tmp_path / "deep", config)
    convert(source, tmp_path / "first.gguf", "F16")  # imports what stays in memory
    monkeypatch.setattr(stream, "_CHUNK", 1 << 14)
    tracemalloc.start()
    try:
        report = run(source, tmp_path / "out.gguf", "F16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = max(tensor.nbytes for tensor in report.tensors)
    assert report.nbytes > 30 * largest
    assert peak < 6 * largest


def test_reference_checkpoints_convert(shared_data: Path, tmp_path: Path) -> None:
    for name in ("llama", "llama3_rope", "llama_headdim", "llama_yarn", "qwen2", "qwen3"):
        report = run(shared_data / "arch" / name, tmp_path / f"{name}.gguf", "BF16")
        assert report.relative_rmse == 0.0  # these checkpoints hold bfloat16
        names = {tensor.name for tensor in report.tensors}
        assert ("rope_freqs.weight" in names) == (name == "llama3_rope")
        assert ("blk.0.attn_q.bias" in names) == (name in ("llama_headdim", "qwen2"))
        assert ("blk.0.attn_q_norm.weight" in names) == (name == "qwen3")


def test_metadata_equals_the_converters(shared_data: Path, tmp_path: Path) -> None:
    home = shared_data / "tiny-home"
    path = convert(home / "checkpoint", tmp_path / "ours.gguf", "F16")
    with open_gguf(path) as ours, open_gguf(home / "files_from_llama_cpp/Q4_K_M.gguf") as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        different = {
            key
            for key in ours.metadata.keys() | theirs.metadata.keys()
            if not np.array_equal(ours.metadata.get(key, 0), theirs.metadata.get(key, 0))
            or ours.value_types.get(key) != theirs.value_types.get(key)
        }
    # The file type differs by intent; the reference was made before the folder had a model card.
    assert different == {
        "general.file_type",
        "general.languages",
        "general.license",
        "general.tags",
    }
