"""Recipes choose, tensor by tensor, what llama-quantize chooses."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgeq import blocks
from edgeq.errors import FormatError, RequestError
from edgeq.recipe import Model, Recipe, assign, recipes

RECORDED = json.loads((Path(__file__).parent / "data" / "llama_quantize_types.json").read_text())
CASES = [
    (model, recipe) for model, entry in RECORDED["models"].items() for recipe in entry["types"]
]


def expand(kinds: dict[str, Any], block_count: int) -> dict[str, Any]:
    """{"blk.*.x": value} for every layer."""
    return {
        name.replace("*", str(i)): value
        for name, value in kinds.items()
        for i in range(block_count if "*" in name else 1)
    }


def decode_runs(runs: str) -> list[str]:
    """ "Q5_K*2 Q4_K*1" -> ["Q5_K", "Q5_K", "Q4_K"]"""
    pairs = [run.split("*") for run in runs.split()]
    return [name for name, count in pairs for _ in range(int(count))]


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_types_equal_recorded_ones(model: str, recipe: str) -> None:
    """Shapes where rules meet: odd row lengths, 80 layers, experts, fused qkv, grouped queries."""
    entry = RECORDED["models"][model]
    n = entry["block_count"]
    expected = dict.fromkeys(expand(entry["shapes"], n), "F32")
    for kind, runs in entry["types"][recipe].items():
        for i, name in enumerate(decode_runs(runs)):
            expected[kind.replace("*", str(i))] = name
    shapes = {name: tuple(shape) for name, shape in expand(entry["shapes"], n).items()}
    counts = (entry[key] for key in ("head_count", "head_count_kv", "expert_count"))
    assert assign(Recipe.load(recipe), shapes.items(), Model(n, *counts)) == expected


def test_types_equal_llama_quantize_on_the_reference_model(shared_data: Path) -> None:
    home = shared_data / "tiny-home"
    reader = gguf.GGUFReader(home / "files_from_llama_cpp/Q4_K_M.gguf")
    tensors = [(t.name, tuple(int(n) for n in t.shape[::-1])) for t in reader.tensors]
    expected = json.loads((home / "expected_types.json").read_text())["types"]
    assert set(expected) == set(recipes()) - {"F32"}
    for name, types in expected.items():
        assert assign(Recipe.load(name), tensors, Model(8, 8, 4)) == types, name


@pytest.mark.parametrize("name", recipes())
def test_recipe_is_complete(name: str) -> None:
    recipe = Recipe.load(name)
    kind = gguf.LlamaFileType(recipe.file_type).name
    assert kind.removeprefix("MOSTLY_").removeprefix("ALL_") == name
    assert blocks.get(recipe.base).name == recipe.base
    assert recipe.about
    assert Recipe.load(name.lower()) == recipe


def test_aliases() -> None:
    names = {alias: Recipe.load(alias).name for alias in ("Q3_K", "q4_k", "Q5_K")}
    assert names == {"Q3_K": "Q3_K_M", "q4_k": "Q4_K_M", "Q5_K": "Q5_K_M"}


def test_importance_changes_the_first_layers() -> None:
    down = {f"blk.{i}.ffn_down.weight": (256, 512) for i in range(8)}

    def first(recipe: str, importance: bool) -> str:
        chosen = assign(Recipe.load(recipe), down.items(), Model(8, 8, 8, importance=importance))
        assert len({chosen[f"blk.{i}.ffn_down.weight"] for i in range(1, 8)}) == 1
        return chosen["blk.0.ffn_down.weight"]

    assert [first("IQ4_XS", importance) for importance in (False, True)] == ["Q5_K", "IQ4_XS"]
    assert [first("Q4_0", importance) for importance in (False, True)] == ["Q4_0", "Q4_1"]
    assert [first("Q5_0", importance) for importance in (False, True)] == ["Q5_0", "Q5_1"]


@pytest.mark.parametrize(
    ("cols", "expected"), [(768, "Q4_K"), (896, "Q5_0"), (576, "Q5_0"), (100, "F16")]
)
def test_rows_that_are_no_multiple_of_the_block(cols: int, expected: str) -> None:
    shapes = {"blk.0.ffn_up.weight": (64, cols)}
    assert assign(Recipe.load("Q4_K_M"), shapes.items(), Model(1, 8, 8)) == {
        "blk.0.ffn_up.weight": expected
    }


def test_vectors_norms_and_routers_stay_f32() -> None:
    names = ("blk.0.attn_norm.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight")
    shapes = {name: (256,) if "inp" not in name else (8, 256) for name in names}
    shapes["rope_freqs.weight"] = (64,)
    assert set(assign(Recipe.load("Q8_0"), shapes.items(), Model(1, 8, 8)).values()) == {"F32"}


CUSTOM = """
name = "MINE"
file_type = 15
base = "q4_k"
about = "for a test"
rule = [
    { tensors = "blk.*.{attn_{q,k},ffn_up}.weight", format = "Q5_K" },
    { tensors = "blk.*.ffn_up.weight", layers = "first 1/2", format = "Q8_0" },
    { tensors = "blk.0.*", format = "F16" },
]
"""


def test_recipe_from_a_file_and_the_last_rule_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(CUSTOM)
    kinds = ("attn_q", "attn_k", "attn_v", "ffn_up")
    shapes = {f"blk.{i}.{kind}.weight": (256, 256) for i in range(4) for kind in kinds}
    chosen = assign(Recipe.load(path), shapes.items(), Model(4, 8, 8))
    assert [chosen[f"blk.{i}.ffn_up.weight"] for i in range(4)] == ["F16", "Q8_0", "Q5_K", "Q5_K"]
    assert [chosen[f"blk.3.{kind}.weight"] for kind in kinds] == ["Q5_K", "Q5_K", "Q4_K", "Q5_K"]


BROKEN = {
    "unknown key": ('about = "', 'abuot = "', "abuot"),
    "unknown format": ('"Q5_K"', '"Q5_X"', "Q5_X"),
    "unknown base": ('"q4_k"', '"q4"', "q4"),
    "unknown layers": ('"first 1/2"', '"last 1/2"', "layers = 'last 1/2'"),
    "division by zero": ('"first 1/2"', '"first 1/0"', "layers = 'first 1/0'"),
    "mistyped rule key": ("tensors =", "tensor =", "tensor"),
}


@pytest.mark.parametrize(("old", "new", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_recipe_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(CUSTOM.replace(old, new))
    with pytest.raises(FormatError, match=f"broken.toml.*{message}"):
        Recipe.load(path)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(RequestError, match=r"recipe 'Q4_K_X' is unknown: .*Q4_K_M.*\.toml"):
        Recipe.load("Q4_K_X")
