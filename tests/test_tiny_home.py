"""The trained example model against its float original and against other tools' files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest

import edgeq
from edgeq import blocks
from edgeq.engine import Model
from edgeq.errors import RequestError
from edgeq.evaluate import windows
from edgeq.gguf import GgufWriter, TensorSpec

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
Convert = Callable[[str], Path]


@pytest.fixture(scope="module")
def data(shared_data: Path) -> Path:
    return shared_data / "tiny-home"


@pytest.fixture(scope="module")
def measured(data: Path) -> dict[str, Any]:
    return json.loads((data / "golden.json").read_text())


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    folder = tmp_path_factory.mktemp("tiny-home")

    def once(recipe: str) -> Path:
        out = folder / f"{recipe}.gguf"
        return out if out.exists() else edgeq.convert(EXAMPLE, out, recipe)

    return once


def questions(data: Path) -> list[str]:
    lines = (data / "questions.jsonl").read_text().splitlines()
    return [json.loads(line)["question"] for line in lines]


def answer(model: Model, question: str) -> str:
    message = {"role": "user", "content": question}
    return "".join(model.chat([message], temperature=0, max_tokens=60)).strip()


@pytest.mark.parametrize("recipe", ["F16", "Q8_0"])
def test_answers_equal_the_float_model(
    recipe: str, data: Path, measured: dict[str, Any], convert: Convert
) -> None:
    with edgeq.load(convert(recipe)) as model:
        answers = [answer(model, question) for question in questions(data)]
    same = sum(a == b for a, b in zip(answers, measured["expected_answers"], strict=True))
    assert same >= 0.98 * len(answers)


@pytest.mark.parametrize(("recipe", "low"), [("F16", -0.005), ("Q8_0", -0.005), ("Q4_K_M", -1)])
def test_perplexity_equals_llama_perplexity(
    recipe: str, low: float, data: Path, measured: dict[str, Any], convert: Convert
) -> None:
    text = (data / "eval.txt").read_text()
    with edgeq.load(convert(recipe)) as model:
        ours = edgeq.perplexity(model, text, ctx=measured["perplexity_ctx"])
    theirs = measured["recipes"][recipe]["plain"]["ppl"]
    assert low < ours / theirs - 1 <= 0.005


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K_M", "Q5_K_M"])
def test_a_file_of_llama_quantize_runs(name: str, data: Path, measured: dict[str, Any]) -> None:
    path = data / "files_from_llama_cpp" / f"{name}.gguf"
    with edgeq.load(path) as model:
        assert answer(model, "What is the capital of Japan?") == "Tokyo"
        ours = edgeq.perplexity(model, (data / "eval.txt").read_text(), ctx=256)
    assert abs(ours / measured["recipes"][name]["plain"]["ppl"] - 1) < 0.005


def test_reference_logits(data: Path, convert: Convert) -> None:
    ids, expected = golden.read(data / "golden_logits.safetensors")
    with edgeq.load(convert("F16")) as model:
        assert golden.distance(model.logits(ids), expected) < 2e-3


def dequantized(path: Path, out: Path) -> Path:
    """The same weights as F32."""
    with edgeq.open_gguf(path) as gguf:
        f32 = blocks.get("F32")
        specs = [TensorSpec(t.name, t.shape, f32) for t in gguf.tensors.values()]
        with GgufWriter(out, gguf.typed_metadata(), specs) as writer:
            for t in gguf.tensors.values():
                writer.write(t.name, edgeq.dequantize(gguf.tensor(t.name), t.format))
    return out


def divergence(path: Path, reference: Path, text: str, ctx: int) -> float:
    """Mean KL divergence from the reference, at the positions that llama-perplexity scores."""
    with edgeq.load(path) as model, edgeq.load(reference, kv="f32") as exact:
        ids, found = exact.tokenizer.encode(text, special=False, bos=True), []
        for window, first in windows(ids, ctx, exact.tokenizer.bos_id):
            p, q = (m.logits(window)[first - 1 : -1].astype(np.float64) for m in (exact, model))
            p, q = (v - np.log(np.exp(v).sum(axis=1, keepdims=True)) for v in (p, q))
            found.append((np.exp(p) * (p - q)).sum(axis=1))
    return float(np.concatenate(found).mean())


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K_M"])
def test_rounding_of_activations_costs_no_more_than_in_llama_cpp(
    name: str, data: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    """The same file, against its weights in float arithmetic; a third of the text is enough."""
    path, text = data / "files_from_llama_cpp" / f"{name}.gguf", (data / "eval.txt").read_text()
    text = text[: len(text) // 3]
    reference = dequantized(path, tmp_path / "f32.gguf")
    ours = divergence(path, reference, text, measured["perplexity_ctx"])
    assert 0 < ours <= measured["kld_same_file"][name]["kld_mean"]


def test_the_size_is_llama_quantizes(measured: dict[str, Any], convert: Convert) -> None:
    theirs = measured["recipes"]["Q4_K_M"]["plain"]["bytes"]
    assert abs(convert("Q4_K_M").stat().st_size - theirs) < 1024  # metadata may differ a little


def test_windows_are_llama_perplexitys() -> None:
    parts = list(windows(range(100, 110), 4, bos=1))
    assert parts == [([1, 101, 102, 103], 3), ([1, 105, 106, 107], 3)]
    assert next(windows(range(512), 512, None))[1] == 257  # 255 targets are scored


def test_a_short_text_is_refused(convert: Convert) -> None:
    with edgeq.load(convert("Q8_0")) as model:
        with pytest.raises(RequestError, match="expected at least 512, two windows"):
            edgeq.perplexity(model, "too short", ctx=256)
        for ctx in (512, 3, 0):
            with pytest.raises(RequestError, match=f"ctx = {ctx}"):
                edgeq.perplexity(model, "x" * 10000, ctx=ctx)
