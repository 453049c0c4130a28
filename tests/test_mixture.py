"""Recipes made to fit a size."""

import contextlib
import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from shell import edgeq
from tiny_checkpoint import CONFIG, write_checkpoint

from edgeq import blocks, hessian
from edgeq.choosing import Target, sensible
from edgeq.errors import RequestError, ResourceError
from edgeq.gguf import GgufWriter, TensorSpec
from edgeq.mixture import SAMPLE, Choice, _sample, promote, solve, to_recipe
from edgeq.pipeline import run
from edgeq.recipe import Model, Recipe, Rule, assign, recipes, save, to_toml
from edgeq.sources import open_source

WIDE = {**CONFIG, "hidden_size": 256, "intermediate_size": 512}
KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0")


def random_choices(rng: np.random.Generator, count: int) -> dict[str, list[Choice]]:
    """Larger formats lose less, each matrix at its own rate."""
    found = {}
    for i in range(count):
        size, loss, rate = int(rng.integers(1, 9)), rng.random(), rng.uniform(0.2, 0.6)
        found[f"m{i}"] = [
            Choice(
                blocks.get(kind),
                size * int(32 * blocks.get(kind).bits_per_weight),
                loss * rate**k,
            )
            for k, kind in enumerate(KINDS)
        ]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_solution_is_nearly_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = random_choices(rng, 5)
    sizes = [sum(each[k].nbytes for each in choices.values()) for k in (0, 4)]
    budget = int(rng.uniform(*sizes))
    chosen = solve(choices, budget)
    assert sum(choice.nbytes for choice in chosen.values()) <= budget
    best = min(
        sum(choice.loss for choice in each)
        for each in itertools.product(*choices.values())
        if sum(choice.nbytes for choice in each) <= budget
    )
    assert sum(choice.loss for choice in chosen.values()) <= 1.5 * best


def test_ends_of_the_range() -> None:
    choices = random_choices(np.random.default_rng(1), 4)
    least = sum(each[0].nbytes for each in choices.values())
    assert {c.format.name for c in solve(choices, least).values()} == {"Q2_K"}
    assert {c.format.name for c in solve(choices, 10**9).values()} == {"Q8_0"}
    with pytest.raises(RequestError, match=f"the smallest formats need {least}: raise --bpw"):
        solve(choices, least - 1)


def test_outliers_are_those_that_gain_most_per_byte() -> None:
    q4, q8 = blocks.get("Q4_K"), blocks.get("Q8_0")
    choices = {f"m{i}": [Choice(q4, 1000, 1.0 + i % 7), Choice(q8, 1900, 0.01)] for i in range(100)}
    found = promote(choices, dict.fromkeys(choices, "Q4_K"))
    raised = {name for name, choice in found.items() if choice.format is q8}
    assert len(raised) == 3  # 3 % of 100000 bytes
    assert all(int(name[1:]) % 7 == 6 for name in raised)


@pytest.mark.parametrize("name", recipes())
def test_recipes_survive_being_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(Recipe.load(name)))
    assert Recipe.load(path) == Recipe.load(name)


@pytest.mark.parametrize("about", ["🦙 und 漢", "a\x7fb\x01\n", '"\\', "caf\udce9"])
def test_any_text_survives_being_written(about: str, tmp_path: Path) -> None:
    recipe = Recipe("🦙", 15, "Q4_K", about, ("a\x7f", "é"), (Rule("🦙*", "Q6_K"),))
    save(recipe, tmp_path / "r.toml")
    expected = about.replace("\udce9", "\\udce9")  # TOML has no halves of pairs
    assert Recipe.load(tmp_path / "r.toml") == dataclasses.replace(recipe, about=expected)


def test_a_recipe_is_saved_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.toml"
    path.write_text("precious")
    with pytest.raises(ResourceError, match=r"r\.toml: exists already"):
        save(Recipe.load("Q4_0"), path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match=r"r\.toml: cannot be written: No space"):
        save(Recipe.load("Q4_0"), path, force=True)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]
    monkeypatch.undo()
    save(Recipe.load("Q4_0"), path, force=True)
    assert Recipe.load(path) == Recipe.load("Q4_0")


def fail(fd: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("r.txt", "r.txt: expected a name that ends with .toml"),
        ("no/r.toml", "no/r.toml: its folder does not exist"),
        ("given.toml", "given.toml: is the recipe itself"),
        ("out.toml", "out.toml: is the model itself"),
    ],
)
def test_a_recipe_that_cannot_be_saved_is_refused_before_work(
    name: str, told: str, tmp_path: Path
) -> None:
    given = tmp_path / "given.toml"
    given.write_text(to_toml(Recipe.load("Q4_0")))
    options = ("-t", given, "-o", tmp_path / "out.toml", "--save-recipe", tmp_path / name)
    result = edgeq("convert", write_checkpoint(tmp_path / "model"), *options, "--force")
    assert (result.exit_code, told in result.stderr) == (2, True), result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.toml", "model"]


def test_a_made_recipe_gives_the_formats_it_was_made_of(rng: np.random.Generator) -> None:
    kinds = ("attn_q", "ffn_down")
    formats = {f"blk.{i}.{kind}.weight": str(rng.choice(KINDS)) for i in range(9) for kind in kinds}
    formats["token_embd.weight"] = "Q6_K"
    recipe = to_recipe(formats, "mine", "", dict.fromkeys(formats, 256))
    shapes = [(name, (256, 256)) for name in formats]
    assert assign(recipe, shapes, Model(9, 4, 2)) == formats
    assert recipe.file_type == Recipe.load(recipe.base).file_type


@pytest.mark.parametrize("odd", [False, True])
def test_sizes_are_met_and_nearly_used(odd: bool, tmp_path: Path) -> None:
    config = {**WIDE, "hidden_size": 288} if odd else WIDE
    source = write_checkpoint(tmp_path / "model", config)
    sizes = [
        run(source, tmp_path / f"{i}.gguf", name, method="rtn").nbytes
        for i, name in enumerate(("Q4_0", "Q8_0"))
    ]
    wanted = sum(sizes) // 2
    report = run(source, tmp_path / "out.gguf", target=Target(size=wanted), force=True)
    assert 0.97 * wanted < report.nbytes <= wanted
    assert report.path.stat().st_size == report.nbytes
    (tmp_path / "r.toml").write_text(to_toml(report.mixture))
    again = run(source, tmp_path / "again.gguf", tmp_path / "r.toml")
    assert again.path.read_bytes() == report.path.read_bytes()
    bits = run(source, tmp_path / "bits.gguf", target=Target(bpw=6.0))
    assert 5.8 < bits.bits_per_weight <= 6.0


@pytest.mark.parametrize("alignment", [32, 1 << 14])
def test_outliers_and_padding_count(alignment: int, tmp_path: Path) -> None:
    path = _aligned(write_checkpoint(tmp_path / "model", WIDE), alignment)
    for outliers in (False, True):
        target = Target(size=1_000_000, outliers=outliers)
        report = run(path, tmp_path / f"{outliers}.gguf", target=target)
        assert 900_000 < report.nbytes <= 1_000_000


@pytest.mark.parametrize("step", [1, 64, 128])
@pytest.mark.parametrize("kind", ["attn_q", "ffn_up"])
@pytest.mark.parametrize(("rows", "cols"), [(1024, 64), (4096, 4096), (384, 13000), (128, 1 << 17)])
def test_samples_are_small_and_spread(rows: int, cols: int, kind: str, step: int) -> None:
    name, whole = f"blk.0.{kind}.weight", step if kind == "attn_q" else 1
    source = _Numbered({name: (rows, cols)}, step, whole)
    w, share = _sample(source, name)  # type: ignore[arg-type]
    found = w[:, 0].astype(int).tolist()
    assert w.size <= max(SAMPLE, cols)
    assert w.size >= min(SAMPLE, rows * cols) // 2
    assert share == len(w) / rows
    assert found == sorted(set(found))
    spread = len({row // whole for row in found})
    assert spread >= min(8, len(found), rows // whole)


class _Numbered:
    """A source whose rows hold their own number, and can be read in multiples of `whole` only."""

    def __init__(self, shapes: dict[str, tuple[int, int]], step: int, whole: int) -> None:
        self.shapes, self.row_step, self._whole = shapes, step, whole

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        assert start % self._whole == stop % self._whole == 0
        assert 0 <= start < stop <= self.shapes[name][0]
        numbers = np.arange(start, stop, dtype=np.float32)[:, None]
        return np.broadcast_to(numbers, (stop - start, self.shapes[name][1]))


def test_outliers_count_as_bits(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", WIDE)
    report = run(source, tmp_path / "out.gguf", target=Target(bpw=6.0, outliers=True))
    assert 5.6 < report.bits_per_weight <= 6.0


def _aligned(folder: Path, alignment: int) -> Path:
    """The model as a GGUF file whose tensors start at multiples of `alignment`."""
    source, path = open_source(folder), folder / "aligned.gguf"
    metadata = {**source.metadata(), "general.alignment": np.uint32(alignment)}
    specs = [TensorSpec(name, shape, blocks.get("F32")) for name, shape in source.shapes.items()]
    with GgufWriter(path, metadata, specs) as writer:
        for name, shape in source.shapes.items():
            writer.write(name, source.read(name, 0, shape[0] if len(shape) > 1 else 1))
    source.close()
    return path


def test_hessians_decide_which_matrix_matters(rng: np.random.Generator, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", WIDE)
    kinds = {"attn_q": 256, "attn_output": 256, "ffn_gate": 256, "ffn_down": 512}
    loud = "blk.1.ffn_down.weight"
    matrices = {
        (f"blk.{i}.{kind}.weight",): np.eye(n, dtype=np.float32)
        for i in range(2)
        for kind, n in kinds.items()
    }
    matrices[(loud,)] *= 1000
    hessian.write(tmp_path / "h.gguf", matrices, tokens=1)
    report = run(source, tmp_path / "o.gguf", hessians=tmp_path / "h.gguf", target=Target(bpw=4.5))
    bits = {t.name: blocks.get(t.format).bits_per_weight for t in report.tensors}
    assert bits[loud] > bits["blk.0.ffn_down.weight"] + 1
    text = {t.name: t.method for t in report.tensors}
    assert text[loud] == "search"


def test_gptq_says_which_matrices_it_left_to_search(tmp_path: Path) -> None:
    source, loud = write_checkpoint(tmp_path / "model", WIDE), "blk.1.ffn_down.weight"
    hessian.write(tmp_path / "h.gguf", {(loud,): np.eye(512, dtype=np.float32)}, tokens=1)
    report = run(source, tmp_path / "o.gguf", "Q4_K_S", method="gptq", hessians=tmp_path / "h.gguf")
    methods = {t.name: t.method for t in report.tensors}
    assert methods[loud] == "gptq"
    assert methods["token_embd.weight"] == "search"
    assert sorted(set(methods.values())) == ["gptq", "rtn", "search"]
    said = [warning for warning in report.warnings if "Hessian" in warning]
    assert len(said) == 1
    assert said[0].startswith("no Hessian for 13 of 14 matrices of the layers, such as blk.0.attn_")


def test_hessians_of_all_layers_need_no_warning(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", WIDE)
    with contextlib.closing(open_source(source)) as opened:
        names = {n: shape[-1] for n, shape in opened.shapes.items() if len(shape) == 2}
    blocks_only = {(n,): np.eye(k, dtype=np.float32) for n, k in names.items() if n[:4] == "blk."}
    hessian.write(tmp_path / "h.gguf", blocks_only, tokens=1)
    report = run(source, tmp_path / "o.gguf", "Q4_0", method="gptq", hessians=tmp_path / "h.gguf")
    assert {t.name: t.method for t in report.tensors}["token_embd.weight"] == "search"
    assert not any("Hessian" in warning for warning in report.warnings)
    hessian.write(
        tmp_path / "x.gguf", {("blk.7.x.weight",): np.eye(512, dtype=np.float32)}, tokens=1
    )
    with pytest.raises(RequestError, match=r"Hessian of 512 inputs: .* has no such tensor"):
        run(source, tmp_path / "p.gguf", method="gptq", hessians=tmp_path / "x.gguf")


@pytest.mark.parametrize(("hidden", "name"), [(256, "Q4_K_M"), (96, "IQ4_NL")])
def test_without_a_word_four_bits_are_chosen(hidden: int, name: str, tmp_path: Path) -> None:
    config = {**WIDE, "hidden_size": hidden}
    source = open_source(write_checkpoint(tmp_path / "model", config))
    found, why = sensible(source)
    source.close()
    assert (found, why.split(":")[0]) == (name, name)


@pytest.mark.parametrize(
    ("target", "recipe", "said"),
    [
        (Target(bpw=4, size=10), None, "bpw and size are both given"),
        (Target(bpw=4), "Q4_0", "recipe Q4_0 with bpw or size"),
        (Target(bpw=-1), None, "bpw = -1: expected more than 0"),
        (Target(bpw=float("nan")), None, "bpw = nan"),
        (Target(size=0), None, "size = 0"),
        (Target(size=1000), None, "the smallest formats need"),
    ],
)
def test_targets_that_cannot_be_meant(
    target: Target, recipe: str | None, said: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "model", WIDE)
    with pytest.raises(RequestError, match=said):
        run(source, tmp_path / "out.gguf", recipe, target=target)


def test_command_line(tmp_path: Path) -> None:
    source, recipe = write_checkpoint(tmp_path / "model", WIDE), tmp_path / "mine.toml"
    out = tmp_path / "o.gguf"
    made = edgeq("convert", source, "-o", out, "--size", "1.2MB", "--save-recipe", recipe, "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["size"] <= 1_200_000
    again = edgeq("convert", source, "-o", tmp_path / "p.gguf", "-t", recipe)
    assert again.exit_code == 0
    assert (tmp_path / "p.gguf").read_bytes() == out.read_bytes()
    here = edgeq("convert", source, "-o", tmp_path / "q.gguf", "--save-recipe", recipe)
    assert (here.exit_code, "mine.toml: exists already" in here.stderr) == (2, True)
    plain = edgeq("convert", source, "-o", tmp_path / "q.gguf", "--json")
    assert "Q4_K_M: 4 bits" in plain.stderr
    assert json.loads(plain.stdout)["why"].startswith("Q4_K_M: 4 bits")
    wrong = edgeq("convert", source, "--size", "big")
    assert (wrong.exit_code, "'big': expected a number of bytes" in wrong.stderr) == (2, True)
    shown = edgeq("convert", "--help").stdout
    assert "Error feedback over correlated inputs" in shown
