"""Architectures: converted checkpoints give the logits of their reference implementation."""

from collections.abc import Callable
from pathlib import Path

import golden
import numpy as np
import pytest

import edgeq
from edgeq.errors import ModelError
from edgeq.models import rope, weights
from edgeq.models.arch import Rope

ARCHITECTURES = ["llama", "llama3_rope", "llama_headdim", "llama_yarn", "qwen2", "qwen3"]
# Distance of llama.cpp's logits (llama-cpp-python 0.3.36) from the same references on the same
# Q8_0 files, plainly rounded so that they stay the same. These random models magnify rounding.
LLAMA_CPP_Q8_0 = {
    "llama": 0.0490,
    "llama3_rope": 0.0515,
    "llama_headdim": 0.0498,
    "llama_yarn": 0.0562,
    "qwen2": 0.0489,
    "qwen3": 0.0365,
}
Convert = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def convert(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Converter of reference checkpoints, each pair of name and recipe once."""
    folder, made = tmp_path_factory.mktemp("models"), dict[tuple[str, str], Path]()

    def once(name: str, recipe: str) -> Path:
        if (name, recipe) not in made:
            out = folder / f"{name}-{recipe}.gguf"
            source = shared_data / "arch" / name
            made[name, recipe] = edgeq.convert(source, out, recipe, method="rtn")
        return made[name, recipe]

    return once


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_the_reference(name: str, shared_data: Path, convert: Convert) -> None:
    ids, expected = golden.read(shared_data / "arch" / name / "golden.safetensors")
    with edgeq.load(convert(name, "F32")) as model:
        assert golden.distance(model.logits(ids), expected) < 2e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_8_bit_logits_are_as_near_as_llama_cpps(
    name: str, shared_data: Path, convert: Convert
) -> None:
    ids, expected = golden.read(shared_data / "arch" / name / "golden.safetensors")
    with edgeq.load(convert(name, "Q8_0")) as model:
        assert golden.distance(model.logits(ids), expected) < 1.01 * LLAMA_CPP_Q8_0[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("recipe", "limit"), [("F32", 1e-3), ("Q8_0", 3e-2)])
def test_a_prompt_may_come_in_pieces(
    name: str, recipe: str, limit: float, shared_data: Path, convert: Convert
) -> None:
    """The last bits of a sum differ, and with Q8_0 that flips some codes of the activations."""
    ids, _ = golden.read(shared_data / "arch" / name / "golden.safetensors")
    with edgeq.load(convert(name, recipe)) as model:
        whole = model.logits(ids)[-1]
        for size in (1, 7):
            model.reset()
            for first in range(0, len(ids), size):
                last = model.feed(ids[first : first + size], logits=True)
            assert golden.distance(last, whole) < limit


def test_threads_do_not_change_the_logits(shared_data: Path, convert: Convert) -> None:
    ids, _ = golden.read(shared_data / "arch" / "qwen3" / "golden.safetensors")
    path = convert("qwen3", "Q8_0")
    results = []
    for threads, batch in ((1, None), (2, 1), (3, None), (5, 2), (1, 3)):
        with edgeq.load(path, threads=threads, threads_batch=batch) as model:
            assert (model.threads, model.threads_batch) == (threads, batch or threads)
            results.append(np.concatenate([model.logits(ids), model.step(ids[:2])]))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_a_missing_tensor_is_named(shared_data: Path, convert: Convert) -> None:
    from edgeq import models

    with edgeq.open_gguf(convert("llama", "F32")) as gguf:
        arch = models.find("llama").arch(gguf)
        tensors = gguf.tensors
        gguf.tensors = {k: v for k, v in tensors.items() if k != "blk.1.attn_k.weight"}
        with pytest.raises(ModelError, match=r"1 tensors are missing: blk\.1\.attn_k\.weight"):
            weights.bind(gguf, arch)
        gguf.tensors = {**tensors, "blk.0.ffn_down.weight": tensors["blk.0.ffn_up.weight"]}
        with pytest.raises(ModelError, match=r"ffn_down\.weight has shape .* expected \[256"):
            weights.bind(gguf, arch)


def test_a_tensor_without_a_place_is_refused(shared_data: Path, convert: Convert) -> None:
    from edgeq import models

    with edgeq.open_gguf(convert("llama", "F32")) as gguf:
        arch, tensors = models.find("llama").arch(gguf), gguf.tensors
        for name in ("blk.0.attn_q_norm.weight", "output_norm.bias", "blk.2.ffn_up.weight"):
            gguf.tensors = {**tensors, name: tensors["output_norm.weight"]}
            with pytest.raises(ModelError, match=f"tensor {name} has no place"):
                weights.bind(gguf, arch)
        gguf.tensors = {**tensors, "extra.weight": tensors["output_norm.weight"]}
        assert weights.bind(gguf, arch).unused == ("extra.weight",)


def test_yarn_leaves_fast_pairs_and_slows_slow_ones() -> None:
    plain = rope.frequencies(Rope(dim=64, base=10000.0, style="norm"))
    yarn = Rope(64, 10000.0, "norm", scaling="yarn", factor=4.0, original_context=4096)
    ratio = rope.frequencies(yarn) / plain
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(0.25)
    assert (np.diff(ratio) <= 0).all()
    assert rope.magnitude(yarn) == pytest.approx(1.1386294)


def test_linear_scaling_divides_positions() -> None:
    turn = rope.frequencies(Rope(8, 10000.0, "norm", scaling="linear", factor=2.0))
    plain = rope.frequencies(Rope(8, 10000.0, "norm"))
    np.testing.assert_allclose(
        rope.tables(turn, 1.0, 6, 1), rope.tables(plain, 1.0, 3, 1), rtol=1e-6
    )
